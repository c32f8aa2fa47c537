"""One thread a model: what waits is gathered into batches of equal settings and similar length, and worked off.

Nothing here knows the web or torch; a ticket's future is a plain concurrent.futures.Future.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

from engine_fast.decoding.translate import plan_batches
from engine_fast.inference.serving.limits import Limits

_AHEAD = 2
log = logging.getLogger("engine_fast.serve")


class QueueFull(Exception):
    """No room for a request's sentences now."""


class Closed(Exception):
    """The service ends, and takes on nothing new."""


class Job(Protocol):
    """What a thread does for its model."""

    def prepare(self, texts: Sequence[str]) -> list[Any]:
        """Of each text what run() takes, with a len() of at least 1: what a batch is measured in."""
        ...

    def width(self, settings: Any) -> int:
        """How many rows a sentence takes in a batch of these settings."""
        ...

    def run(self, settings: Any, prepared: Sequence[Any]) -> list[Any]:
        """One result for each sentence, in order."""
        ...


@dataclass(slots=True, eq=False)
class Ticket:
    """The sentences of one request, and what will become of them."""

    settings: Hashable
    future: Future[list[Any]] = field(default_factory=Future)
    results: list[Any] = field(default_factory=list)
    num_open: int = 0

    def cancel(self) -> None:
        """Nobody waits for it any more: what has not begun is dropped."""
        self.future.cancel()

    def settle(self, outcome: list[Any] | Exception) -> None:
        try:
            if isinstance(outcome, Exception):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)
        except InvalidStateError:
            pass  # it was cancelled meanwhile, or another of its sentences has failed before

    def deliver(self, place: int, result: Any) -> None:
        self.results[place] = result
        self.num_open -= 1
        if not self.num_open:
            self.settle(self.results)


@dataclass(slots=True, eq=False)
class _Item:
    ticket: Ticket
    place: int
    """In the ticket."""
    text: str
    arrived: float
    prepared: Any = None
    """By the thread, once it has seen it."""


class Worker:
    """A queue and the thread that empties it.

    A batch holds sentences of the settings that the oldest one has, of any requests, as many as fit into
    limits.batch_tokens by their padded length. It is the one with the oldest of all in it, among batches of similar
    length made of the oldest that fill _AHEAD of them: so it has little padding, and nobody is overtaken by many.
    on_batch: told the number of sentences and the seconds of each batch that was run.
    """

    def __init__(
        self, name: str, job: Job, limits: Limits, *, on_batch: Callable[[int, float], object] = lambda *_: None
    ) -> None:
        self.name = name
        self._job, self._limits, self._on_batch = job, limits, on_batch
        self._changed = threading.Condition()  # guards the inbox, the count and the two flags
        self._inbox: list[_Item] = []
        self._num_waiting = 0
        self._closed = self._stopping = False
        self._ready: list[_Item] = []  # the thread's own: prepared, oldest first
        self._thread = threading.Thread(target=self._work, name=f"engine-fast-{name}", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Sentences that no batch has taken yet."""
        return self._num_waiting

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, texts: Sequence[str], settings: Hashable) -> Ticket:
        """Queue a request; its future gets one result for each text, in order. Raises QueueFull, Closed."""
        ticket = Ticket(settings, results=[None] * len(texts), num_open=len(texts))
        now = time.monotonic()
        with self._changed:
            if self._closed:
                raise Closed
            if self._num_waiting + len(texts) > self._limits.max_queue:
                raise QueueFull
            self._num_waiting += len(texts)
            self._inbox += [_Item(ticket, place, text, now) for place, text in enumerate(texts)]
            self._changed.notify()
        if not texts:
            ticket.settle([])
        return ticket

    def close(self, seconds: float) -> bool:
        """Take on nothing new and work off what waits, for so long at most; whether all of it was."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)
        with self._changed:
            self._stopping = True
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            try:
                self._run(batch)
            except Exception as error:  # a thread that ended would leave its model without an answer for ever
                log.exception("%s: a batch of %d failed", self.name, len(batch))
                for item in batch:
                    item.ticket.settle(error)
        with self._changed:
            for item in self._ready + self._inbox:
                item.ticket.settle(Closed())
            self._num_waiting = 0

    def _next_batch(self) -> list[_Item] | None:
        """None: closed, and nothing left to do or no more time to do it."""
        while True:
            with self._changed:
                while not (self._closed or self._ready or self._has_waited_enough()):
                    self._changed.wait(self._patience())
                arrived, self._inbox = self._inbox, []
                if self._stopping or not (arrived or self._ready or not self._closed):
                    self._inbox = arrived
                    return None
            before = len(self._ready) + len(arrived)
            self._prepare([item for item in arrived if not item.ticket.future.done()])
            self._ready = [item for item in self._ready if not item.ticket.future.done()]
            batch = self._gather() if self._ready else []
            with self._changed:
                self._num_waiting -= before - len(self._ready)
            if batch:
                return batch

    def _has_waited_enough(self) -> bool:
        return bool(self._inbox) and (self._patience() or 0) <= 0

    def _patience(self) -> float | None:
        """Seconds until the oldest arrival begins whether or not others have joined it; None: there is none."""
        return self._inbox[0].arrived + self._limits.gather_seconds - time.monotonic() if self._inbox else None

    def _prepare(self, items: list[_Item]) -> None:
        try:
            prepared = self._job.prepare([item.text for item in items])
        except Exception as error:
            if len(items) == 1:
                log.exception("%s: a text could not be prepared", self.name)
                items[0].ticket.settle(error)
                return
            for item in items:
                self._prepare([item])
            return
        for item, each in zip(items, prepared, strict=True):
            item.prepared = each
        self._ready += items

    def _gather(self) -> list[_Item]:
        first = self._ready[0]
        budget = max(1, self._limits.batch_tokens // self._job.width(first.ticket.settings))
        equal = [item for item in self._ready if item.ticket.settings == first.ticket.settings]
        lengths = [len(item.prepared) for item in equal]
        near = sum(total <= _AHEAD * budget for total in accumulate(lengths))
        plan = plan_batches(lengths[: max(1, near)], budget)
        chosen = next([equal[i] for i in batch] for batch in plan if 0 in batch)
        taken = set(map(id, chosen))
        self._ready = [item for item in self._ready if id(item) not in taken]
        return chosen

    def _run(self, batch: list[_Item]) -> None:
        start = time.perf_counter()
        try:
            results = self._job.run(batch[0].ticket.settings, [item.prepared for item in batch])
        except Exception:
            if len(batch) == 1:
                raise
            log.exception("%s: a batch of %d failed; trying its sentences one by one", self.name, len(batch))
            for item in batch:
                self._run_alone(item)
            return
        self._on_batch(len(batch), time.perf_counter() - start)
        for item, result in zip(batch, results, strict=True):
            item.ticket.deliver(item.place, result)

    def _run_alone(self, item: _Item) -> None:
        """So that a sentence which cannot be translated takes no other request down with it."""
        try:
            self._run([item])
        except Exception as error:
            log.exception("%s: a sentence of %d tokens failed", self.name, len(item.prepared))
            item.ticket.settle(error)
