"""Ranks as threads of one process: the collectives of World without a process group, for tests of what ranks do."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine_fast.distributed import World

T = TypeVar("T")


class _Meeting:
    """Where the threads hand over copies of values."""

    def __init__(self, size: int) -> None:
        self._values: list[Any] = [None] * size
        self._gate = threading.Barrier(size, timeout=60)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        pickle.dumps(value)  # what a real collective would send
        self._values[rank] = value
        self._gate.wait()
        found = copy.deepcopy(self._values)
        self._gate.wait()
        return found

    def close(self) -> None:
        """Those who wait here get a BrokenBarrierError."""
        self._gate.abort()


@dataclass(frozen=True)
class ThreadWorld(World):
    meeting: _Meeting

    def barrier(self) -> None:
        self.gather(None)

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self.gather(tensor)).amax(0))

    def broadcast(self, value: T) -> T:
        return self.gather(value)[0]

    def gather(self, value: T) -> list[T]:
        return self.meeting.exchange(self.rank, value)


def run_ranks(size: int, body: Callable[[World], Any]) -> list[Any]:
    """body(world) of every rank; what it returned or raised, in the order of ranks.

    When a rank has died and others wait for it in a collective, they are stopped a second later, as by a launcher.
    """
    meeting = _Meeting(size)
    outcomes: list[Any] = [None] * size
    died = threading.Event()

    def live(rank: int) -> None:
        try:
            outcomes[rank] = body(ThreadWorld(rank, size, torch.device("cpu"), meeting))
        except BaseException as error:
            outcomes[rank] = error
            died.set()

    threads = [threading.Thread(target=live, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if died.wait(0.01):
            for thread in threads:
                thread.join(1)
            meeting.close()
    return outcomes
