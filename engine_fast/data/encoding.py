"""Sentence pairs to ids, in parallel and in order, with a bounded number of chunks in flight.

Threads, not processes: SentencePiece works outside the interpreter lock and encodes about 100,000 sentences a second
and thread, a thread needs no copy of the model and no import, and nothing outlives a killed run.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from engine_fast.data.symbols import EOS
from engine_fast.data.vocabulary import Vocabulary

_CHUNK = 2000


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """One pair of lines and its ids, end symbols included."""

    source: str
    target: str
    source_ids: list[int]
    target_ids: list[int]


def encode_pairs(
    pairs: Iterable[tuple[str, str]], source: Vocabulary, target: Vocabulary, *, workers: int = 0
) -> Iterator[EncodedPair]:
    """Encode a stream of pairs; workers = 0 takes one thread per usable core. Memory: 2 * workers + 1 chunks."""
    workers = workers or len(os.sched_getaffinity(0))
    stream = iter(pairs)

    def encode(chunk: list[tuple[str, str]]) -> list[EncodedPair]:
        source_ids = source.encode_batch([one for one, _ in chunk])
        target_ids = target.encode_batch([other for _, other in chunk])
        return [
            EncodedPair(one, other, [*one_ids, EOS], [*other_ids, EOS])
            for (one, other), one_ids, other_ids in zip(chunk, source_ids, target_ids, strict=True)
        ]

    with ThreadPoolExecutor(workers, thread_name_prefix="encode") as pool:
        waiting: deque[Future[list[EncodedPair]]] = deque()
        while chunk := list(itertools.islice(stream, _CHUNK)):
            waiting.append(pool.submit(encode, chunk))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
