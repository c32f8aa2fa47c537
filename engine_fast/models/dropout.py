"""Dropout that costs a quarter of torch's on a CPU, where one random number a value is most of the work."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """x times a mask of 0 (with probability p) or 1/(1-p); a byte a value is kept for the backward pass.

    On a CPU four 16-bit uniform numbers are cut from each 64-bit draw of torch's generator, so p is rounded to
    a multiple of 2^-16; elsewhere this is F.dropout.
    """
    if not training or p == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    uniform = draws.view(torch.int16)[: x.numel()].view(x.shape)
    keep = uniform >= round(p * 2**16) - 2**15
    y: Tensor = _Keep.apply(x, keep, 1 / (1 - p))
    return y


class _Keep(torch.autograd.Function):
    """x * keep * scale; torch's own product would keep a mask of x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return x * keep.to(x.dtype).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (keep,) = ctx.saved_tensors
        return grads[0] * keep.to(grads[0].dtype).mul_(ctx.scale), None, None
