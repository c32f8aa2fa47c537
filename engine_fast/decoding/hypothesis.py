"""What a decoder returns, and the one way in which candidates are ordered."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One translation."""

    tokens: list[int]
    """Ids, EOS at the end."""
    score: float
    """What it was ranked by; higher is better."""
    log_probability: float
    """Sum of its tokens' log-probabilities in nats."""


def top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the k largest along the last dimension, best first; among equals the lowest index.

    torch.topk promises no order among equals, so a batch of another shape could pick another word.
    """
    size = values.shape[-1]
    best, index = values.topk(min(k + 1, size))
    if size > k:
        crossing = (best[..., k] == best[..., k - 1]) & best[..., k].isfinite()
        best, index = best[..., :k], index[..., :k]
        if crossing.any():
            ordered, where = values[crossing].sort(dim=-1, descending=True, stable=True)
            best[crossing], index[crossing] = ordered[..., :k], where[..., :k]
    index, by_index = index.sort(dim=-1)
    best, by_value = best.gather(-1, by_index).sort(dim=-1, descending=True, stable=True)
    return best, index.gather(-1, by_value)


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores are float32, and float64 for a float64 model."""
    return torch.float64 if dtype == torch.float64 else torch.float32
