"""The corpus as the trainer sees it: only sentences that fit the model, in updates counted from the first."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from engine_fast.config import BatchConfig
from engine_fast.data.batching import Batch, BatchPlan, Indices, Lengths, Update
from engine_fast.data.symbols import PAD
from engine_fast.distributed import World
from engine_fast.errors import DataError


class Corpus(Protocol):
    """What training asks of a corpus; ParallelCorpus is one."""

    @property
    def source_lengths(self) -> Lengths: ...
    @property
    def target_lengths(self) -> Lengths: ...
    def collate(self, indices: Indices | Sequence[int]) -> Batch: ...


class Subset:
    """Some sentences of a corpus, numbered anew."""

    def __init__(self, corpus: Corpus, chosen: Indices) -> None:
        self._corpus, self._chosen = corpus, chosen
        self.source_lengths = corpus.source_lengths[chosen]
        self.target_lengths = corpus.target_lengths[chosen]

    def collate(self, indices: Indices | Sequence[int]) -> Batch:
        return self._corpus.collate(self._chosen[np.asarray(indices, dtype=np.int64)])


def fitting(corpus: Corpus, longest: int, *, what: str, has_length_classes: bool) -> tuple[Corpus, int]:
    """The sentences that the models have positions (and a student a length class) for, and the number of the others.

    longest: max_positions of the model, and of the teachers it learns from.

    Raises DataError if nothing is left.
    """
    fits = corpus.source_lengths <= longest
    fits &= corpus.target_lengths <= longest - has_length_classes
    num_left = int(fits.sum())
    if not num_left:
        raise DataError(
            f"{what}: none of its {len(fits)} sentences can be used with max_positions = {longest}. "
            "Prepare a corpus with shorter sentences, or raise architecture.max_positions."
        )
    if num_left == len(fits):
        return corpus, 0
    return Subset(corpus, np.flatnonzero(fits).astype(np.int64)), len(fits) - num_left


@dataclass(frozen=True, slots=True)
class Feed:
    """One update's work for this rank."""

    epoch: int
    next_epoch: int
    """Epoch of the update that follows."""
    next_consumed: int
    """Micro-batches of that epoch, over all ranks, that come before it. With next_epoch what a checkpoint keeps."""
    batches: tuple[tuple[Batch, float], ...]
    """Micro-batches and their weights: 1, or 0 for a stand-in where this rank has nothing to do."""
    num_target_tokens: int
    digest: int
    """Of the sentences of all ranks' micro-batches."""


class Feeder:
    """Updates in order, collated one ahead on request."""

    def __init__(self, corpus: Corpus, batch: BatchConfig, *, seed: int, world: World) -> None:
        self._corpus, self._device = corpus, world.device
        self._plan = BatchPlan(corpus, batch, seed=seed, rank=world.rank, world_size=world.size)
        self._epoch, self._consumed, self._updates = 0, 0, deque(self._plan.updates(0))
        self._ahead: Feed | None = None
        # A stand-in has a word besides the end symbol, so that every parameter takes part in the backward pass.
        self._stand_in = np.array([int(np.argmax(corpus.target_lengths > 1))], dtype=np.int64)

    def seek(self, epoch: int, consumed: int) -> None:
        """Continue after the first `consumed` micro-batches of `epoch`, whatever the number of ranks was then."""
        self._epoch, self._consumed, self._ahead = epoch, consumed, None
        self._updates = deque(self._plan.updates(epoch, consumed=consumed))
        self._roll()

    def prefetch(self) -> None:
        """Collate the next update now, while a device is busy with this one."""
        if self._ahead is None:
            self._ahead = self._collate(self._updates.popleft())

    def take(self) -> Feed:
        self.prefetch()
        feed, self._ahead = self._ahead, None
        assert feed is not None
        return feed

    def _collate(self, update: Update) -> Feed:
        epoch = self._epoch
        self._consumed += update.num_micro_batches
        self._roll()
        batches = tuple(
            (self._corpus.collate(part if len(part) else self._stand_in).to(self._device), float(len(part) > 0))
            for part in update.batches
        )
        return Feed(epoch, self._epoch, self._consumed, batches, update.num_target_tokens, update.digest)

    def _roll(self) -> None:
        if not self._updates:
            self._epoch, self._consumed = self._epoch + 1, 0
            self._updates.extend(self._plan.updates(self._epoch))


def clipped(batch: Batch, max_positions: int) -> torch.Tensor:
    """The sources, (B, S) with S <= max_positions: what is translated of a sentence that is too long.

    A cut sentence loses its last words and keeps its end symbol.
    """
    source = batch.source
    if source.shape[1] <= max_positions:
        return source
    ends = source.gather(1, (source != PAD).sum(1, keepdim=True) - 1)
    cut = source[:, :max_positions].clone()
    cut[:, -1:] = torch.where(source[:, max_positions - 1 : max_positions] == PAD, cut[:, -1:], ends)
    return cut
