"""Ranks as threads of one process: the collectives of World without a process group, for tests of what ranks do."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from engine_fast.distributed import World

T = TypeVar("T")
_TIMEOUT = 60.0


class _Meeting:
    """Where the threads hand over pickled values. One that stays away breaks it for all after a while."""

    def __init__(self, size: int) -> None:
        self._values: list[bytes] = [b""] * size
        self._gate = threading.Barrier(size, timeout=_TIMEOUT)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = pickle.dumps(value)
        self._gate.wait()
        found = [pickle.loads(each) for each in self._values]  # noqa: S301 - our own, a moment ago
        self._gate.wait()
        return found


@dataclass(frozen=True)
class ThreadWorld(World):
    meeting: _Meeting

    def barrier(self) -> None:
        self.gather(None)

    def broadcast(self, value: T) -> T:
        return self.gather(value)[0]

    def gather(self, value: T) -> list[T]:
        return self.meeting.exchange(self.rank, value)


def run_ranks(size: int, body: Callable[[World], Any]) -> list[Any]:
    """body(world) of every rank; what it returned or raised, in the order of ranks."""
    meeting = _Meeting(size)
    outcomes: list[Any] = [None] * size

    def live(rank: int) -> None:
        try:
            outcomes[rank] = body(ThreadWorld(rank, size, torch.device("cpu"), meeting))
        except BaseException as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=live, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes
