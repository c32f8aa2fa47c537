"""Several ranks as threads of one process: what a store does among them, without a process group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from engine_fast.distributed import World


class Member(World):
    """One of `crew`'s ranks: its collectives meet at a barrier."""

    __slots__ = ("_barrier", "_box")

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, box: list[Any]) -> None:
        super().__init__(rank, size, torch.device("cpu"))
        object.__setattr__(self, "_barrier", barrier)
        object.__setattr__(self, "_box", box)

    def gather(self, value: Any) -> list[Any]:
        self._box[self.rank] = value
        self._barrier.wait(20)
        values = list(self._box)
        self._barrier.wait(20)
        return values

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]

    def barrier(self) -> None:
        self.gather(None)


def together(size: int, work: Callable[[World], Any]) -> list[Any]:
    """What `work` returns, or the exception that it raises, for every rank."""
    barrier, box = threading.Barrier(size), [None] * size

    def one(rank: int) -> Any:
        try:
            return work(Member(rank, size, barrier, box))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
