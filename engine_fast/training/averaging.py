"""Averages of weights: exponential along the run, or plain over the last checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class ExponentialAverage:
    """a <- decay * a + (1 - decay) * w after every update, over this rank's float32 master weights."""

    def __init__(self, shards: Sequence[Tensor], decay: float) -> None:
        self._decay = decay
        self.shards = [shard.detach().clone() for shard in shards]

    def update(self, shards: Sequence[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_lerp_(self.shards, list(shards), 1 - self._decay)

    @contextmanager
    def in_place_of(self, shards: Sequence[Tensor]) -> Iterator[None]:
        """Exchange the values of the average and of the weights for the duration of the block."""
        self._exchange(shards)
        try:
            yield
        finally:
            self._exchange(shards)

    def load(self, shards: Sequence[Tensor]) -> None:
        """Continue from an average that these weights hold."""
        for average, weights in zip(self.shards, shards, strict=True):
            average.copy_(weights)

    def _exchange(self, shards: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for average, weights in zip(self.shards, shards, strict=True):
                kept = average.clone()
                average.copy_(weights)
                weights.copy_(kept)


def mean_of(weights: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensor by tensor mean of several float32 weight sets, summed in float64."""
    return {
        name: (sum((each[name].double() for each in weights[1:]), weights[0][name].double()) / len(weights)).float()
        for name in weights[0]
    }
