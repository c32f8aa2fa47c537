"""The models of an application with their threads, and how a request waits for them."""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from typing import Any, Literal

import torch
from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError

from engine_fast import __version__
from engine_fast.inference.serving.batching import Closed, QueueFull, Worker
from engine_fast.inference.serving.limits import Limits
from engine_fast.inference.serving.metrics import Metrics
from engine_fast.inference.serving.schema import Decoding, Health, Served
from engine_fast.inference.serving.systems import System, Translation, Wish

CLIENT_GONE = 499
"""What counts for a client that has closed its connection; nobody receives it."""


class Service:
    """Systems by name, the default first. Threads run from start() to stop()."""

    def __init__(self, systems: Mapping[str, System], limits: Limits, metrics: Metrics) -> None:
        self.systems, self.limits, self.metrics = dict(systems), limits, metrics
        self._workers: dict[str, Worker] = {}
        self._status: Literal["starting", "ready", "stopping"] = "starting"

    def start(self) -> None:
        """Start the threads and let each translate a word, because a network's first batch is its slowest."""
        for name, system in self.systems.items():
            self._workers[name] = self._worker(name, system)
            self.metrics.watch_queue(name, lambda name=name: self._workers[name].num_waiting)  # type: ignore[misc]
        first = [self._workers[name].submit(["a"], system.settled(Wish())) for name, system in self.systems.items()]
        wait([ticket.future for ticket in first])
        self._status = "ready"

    def _worker(self, name: str, system: System) -> Worker:
        return Worker(name, system, self.limits, on_batch=lambda count, seconds: self.metrics.ran(name, count, seconds))

    def stop(self) -> bool:
        """Work off what waits, for limits.drain_seconds at most; whether all of it was."""
        self._status = "stopping"
        deadline = time.monotonic() + self.limits.drain_seconds
        closed = [worker.close(max(0.0, deadline - time.monotonic())) for worker in self._workers.values()]
        return all(closed)

    def health(self) -> Health:
        status: Literal["starting", "ready", "failed", "stopping"] = self._status
        if status == "ready" and not all(worker.alive for worker in self._workers.values()):
            status = "failed"
        return Health(
            status=status,
            models=[_served(name, system) for name, system in self.systems.items()],
            reranks="teacher" in self.systems,
            max_characters=self.limits.max_characters,
            max_sentences=self.limits.max_sentences,
            versions={"engine_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        )

    def choose(self, asked: Decoding) -> System:
        """The system that a request is for. Raises 404 for one that is not served."""
        name = asked.model or str(next(iter(self.systems)))
        if name not in self.systems:
            raise HTTPException(404, f"model {name!r} is not served here; {', '.join(self.systems)} are")
        return self.systems[name]

    def check_lines(self, lines: Sequence[str], field: str) -> None:
        """Raises 422."""
        if len(lines) > self.limits.max_sentences:
            raise refused((field,), f"{len(lines)} sentences, expected at most {self.limits.max_sentences}")
        for place, line in enumerate(lines):
            if len(line) > self.limits.max_characters:
                wanted = f"expected at most {self.limits.max_characters}; split it"
                raise refused((field, place), f"sentence {place + 1} has {len(line)} characters, {wanted}")

    async def ask(self, request: Request, system: System, lines: Sequence[str], wish: Wish) -> list[Any] | None:
        """One result for each line; None where the client has gone meanwhile. What has not begun is dropped then.

        Raises 429 for a full queue, 503 when the service ends, 504 after limits.timeout_seconds, 500 for a failure.
        """
        try:
            ticket = self._workers[system.name].submit(lines, system.settled(wish))
        except QueueFull:
            raise HTTPException(429, "the queue is full; try again in a moment", {"Retry-After": "1"}) from None
        except (Closed, KeyError):
            raise _not_now() from None
        answer = asyncio.wrap_future(ticket.future)
        gone = asyncio.ensure_future(_disconnected(request))
        either: set[asyncio.Future[Any]] = {answer, gone}
        try:
            await asyncio.wait(either, timeout=self.limits.timeout_seconds, return_when="FIRST_COMPLETED")
            if not answer.done():
                self.metrics.dropped("disconnected" if gone.done() else "timeout")
                if gone.done():
                    return None
                raise HTTPException(504, f"no translation within {self.limits.timeout_seconds:g} seconds")
        finally:
            gone.cancel()
            answer.cancel()  # cancels the ticket too; without effect on what is done
        try:
            results = answer.result()
        except Closed:
            raise _not_now() from None
        except Exception as error:  # the thread has written its traceback into the log
            raise HTTPException(500, f"a sentence could not be translated ({type(error).__name__})") from error
        for result in results:
            if isinstance(result, Translation):
                self.metrics.translated(system.name, len(result.source), len(result.hypothesis.tokens))
        return results


def refused(where: tuple[str | int, ...], message: str) -> RequestValidationError:
    """A 422 in the form in which FastAPI tells its own."""
    return RequestValidationError([{"type": "value_error", "loc": ("body", *where), "msg": message}])


def _not_now() -> HTTPException:
    return HTTPException(503, "the service is starting or ending; try again in a moment", {"Retry-After": "5"})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _served(name: str, system: System) -> Served:
    settings = system.translator.settings
    return Served(
        name=name,
        kind=system.loaded.model.kind,
        student=system.is_student,
        refines=system.refines,
        iterations=settings.iterations,
        length_beam=settings.length_beam,
        beam=settings.beam,
        max_tokens=system.max_positions,
    )
