"""Which training pairs are dropped, and why. The first rule that applies is the one counted."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from engine_fast.config import FilterConfig

RULES = ("empty", "identical", "duplicate", "too_long", "ratio")
_JUDGED_FROM = 10
"""A ratio of short sides says little: ratio applies when the longer side has this many pieces."""
_HASHES_AT_ONCE = 1 << 21


def text_rule(filters: FilterConfig, source: str, target: str) -> str | None:
    """The rule that drops a pair of normalised lines, or None."""
    if not source or not target:
        return "empty"
    if filters.drop_identical and source == target:
        return "identical"
    return None


def length_rule(filters: FilterConfig, num_source: int, num_target: int) -> str | None:
    """The rule that drops a pair by its lengths in pieces, end symbols included, or None."""
    shorter, longer = sorted((num_source, num_target))
    if longer > filters.max_tokens:
        return "too_long"
    if longer >= _JUDGED_FROM and longer > filters.max_ratio * shorter:
        return "ratio"
    return None


class PairHashes:
    """Finds repeated pairs in bounded memory: 8 bytes a pair go to a file, which is then judged part by part.

    Two different pairs share a hash with probability n^2 / 2^65: 3e-4 that it happens once among 100 million.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = path.open("xb", buffering=1 << 20)
        self.count = 0

    def __enter__(self) -> PairHashes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        self._path.unlink()

    def add(self, source: str, target: str) -> None:
        """Note the next pair."""
        self._stream.write(blake2b(f"{source}\n{target}".encode(), digest_size=8).digest())
        self.count += 1

    def repeated(self) -> npt.NDArray[np.bool_]:
        """(count,) bool: an equal pair came before."""
        self._stream.flush()
        result = np.zeros(self.count, dtype=np.bool_)
        if not self.count:
            return result
        hashes = np.memmap(self._path, dtype=np.uint64, mode="r")
        num_parts = -(-self.count // _HASHES_AT_ONCE)
        for part in range(num_parts):
            positions = np.concatenate(
                [
                    start + np.flatnonzero(hashes[start : start + _HASHES_AT_ONCE] % num_parts == part)
                    for start in range(0, self.count, _HASHES_AT_ONCE)
                ]
            )
            values = np.asarray(hashes[positions])
            order = np.argsort(values, kind="stable")  # stable: of equal hashes the first pair stays in front
            again = values[order][1:] == values[order][:-1]
            result[positions[order[1:][again]]] = True
        return result
