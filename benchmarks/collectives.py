"""How much is sent between ranks, how long that takes, and how long ranks wait for each other before it.

Import and `install()` before the process group starts: DeepSpeed keeps references to torch's functions.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

KINDS = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "broadcast": "broadcast",
    "reduce": "reduce",
}
"""torch.distributed's functions that carry tensors of a training update -> what they are counted as."""


class Recorder:
    """Counts while `recording`; otherwise every function is torch's own.

    Each collective is preceded by a barrier, which is the time that ranks wait for the slower one, and is finished
    before the call returns: nothing is hidden behind computation, so what is measured is the cost of communication.
    """

    def __init__(self) -> None:
        self.on = False
        self.inside = False
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        """Of the whole tensor: what is reduced, or what all shares make together."""
        self.seconds = 0.0
        self.waiting = 0.0

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.calls, self.bytes, self.seconds, self.waiting, self.on = Counter(), Counter(), 0.0, 0.0, True
        try:
            yield
        finally:
            self.on = False

    def install(self) -> None:
        """Wrap torch.distributed's collectives, once."""
        barrier = dist.barrier
        for name, kind in KINDS.items():
            original = getattr(dist, name)
            for module in (dist, dist.distributed_c10d):
                setattr(module, name, self._wrapped(original, kind, barrier))

    def _wrapped(self, original: Callable[..., Any], kind: str, barrier: Callable[[], Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.on or self.inside:
                return original(*args, **kwargs)
            self.inside = True
            try:
                started = time.perf_counter()
                barrier()
                ready = time.perf_counter()
                handle = original(*args, **kwargs)
                if handle is not None and hasattr(handle, "wait"):
                    handle.wait()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                ended = time.perf_counter()
            finally:
                self.inside = False
            self.waiting += ready - started
            self.seconds += ended - ready
            self.calls[kind] += 1
            self.bytes[kind] += size_of(kind, args, kwargs)
            return handle

        return call


def size_of(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes of the largest tensor of a call: the input of a reduction, the output of a gathering."""
    sizes = [_bytes(value) for value in (*args, *kwargs.values())]
    return max(sizes, default=0)


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        return sum(_bytes(each) for each in value)
    return 0
