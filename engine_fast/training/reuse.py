"""What the stages of several trials in one process load and compute once.

B sentences, S source positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from engine_fast.models import Teacher

MAX_BYTES = 512 * 2**20


class Reuse:
    """Frozen teachers by what they were loaded from, and what they say of the sources they have met.

    Trials of one seed meet the same batches in the same order. So what is kept is what came first: dropping the oldest
    would drop each batch just before it comes again.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        """max_bytes: of encoder states kept."""
        self._max_bytes, self._bytes = max_bytes, 0
        self._teachers: dict[Hashable, Teacher] = {}
        self._encoded: dict[tuple[Hashable, bytes], Any] = {}
        self.reference_energies: dict[str, float] = {}
        """What evaluations have found of the references."""

    def teacher(self, origin: Hashable, load: Callable[[], Teacher]) -> Teacher:
        """load(), once for each origin, which must say all that decides the result. Nobody may change the teacher."""
        if origin not in self._teachers:
            self._teachers[origin] = load()
        return self._teachers[origin]

    def encoded(self, origin: Hashable, source_BS: Tensor, encode: Callable[[Tensor], Any]) -> Any:
        """encode(source_BS), once for equal sources of one origin as far as there is room. Nobody may change it."""
        content = source_BS.cpu().numpy()
        key = origin, hashlib.blake2b(content.tobytes() + repr(content.shape).encode(), digest_size=16).digest()
        if key in self._encoded:
            return self._encoded[key]
        memory = encode(source_BS)
        size = num_bytes(memory)
        if self._bytes + size <= self._max_bytes:
            self._encoded[key] = memory
            self._bytes += size
        return memory


def num_bytes(memory: Any) -> int:
    """Of all tensors in an object, a list, a tuple or a mapping, at any depth."""
    if isinstance(memory, Tensor):
        return memory.nbytes
    if isinstance(memory, list | tuple):
        return sum(map(num_bytes, memory))
    if isinstance(memory, dict):
        return sum(map(num_bytes, memory.values()))
    if is_dataclass(memory):
        return sum(num_bytes(getattr(memory, field.name)) for field in fields(memory))
    return sum(map(num_bytes, vars(memory).values())) if hasattr(memory, "__dict__") else 0
