"""Gradients through a float16 teacher at a scale that float16 can hold.

The loop divides the loss by the update's target tokens, so each row's gradient is about 1e-5: in a float16 teacher's
activations half of it vanishes (the smallest normal number is 6e-5). An fp16 student has its own loss scale; an fp32
one has none. Here the teacher is differentiated as if the loss had not been divided, and the student's side is divided
again, in float32. The factor is a power of two, so nothing is rounded on the way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine_fast.models import Student, Through


class GradientScale:
    """The identity forward; backward, a factor 1/g inside of enter() and g again outside of leave().

    g is the power of two next below the gradient that arrives at watch(), which must be the root of all that is
    entered: autograd then meets it first.
    """

    def __init__(self) -> None:
        self.factor: Tensor | None = None
        """1/g of the backward pass in hand, a float32 scalar."""

    def watch(self, total: Tensor) -> Tensor:
        """The scalar loss; its gradient is read in the backward pass."""
        watched: Tensor = _Watch.apply(total, self)
        return watched

    def enter(self, x: Tensor) -> Tensor:
        """x, whose gradient is multiplied by 1/g."""
        entered: Tensor = _Multiply.apply(x, self, False)
        return entered

    def leave(self, x: Tensor) -> Tensor:
        """x, whose gradient is multiplied by g."""
        left: Tensor = _Multiply.apply(x, self, True)
        return left


class ScaledHead:
    """A student whose head works inside of the scale, and whose states and weights get gradients outside of it."""

    def __init__(self, student: Student, scale: GradientScale) -> None:
        self._student, self._scale = student, scale

    def project(self, hidden: Tensor) -> Tensor:
        return self._scale.leave(self._student.project(hidden))

    def project_through(self, hidden: Tensor, through: Through) -> Any:
        def scaled(inner: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            return through(inner, self._scale.leave(weight), None if bias is None else self._scale.leave(bias))

        return self._student.project_through(self._scale.leave(hidden), scaled)


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, scale: GradientScale) -> Tensor:
        ctx.scale = scale
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        size = grad.float().abs()
        # 0 for a stand-in batch: then nothing needs a scale.
        ctx.scale.factor = torch.where(size > 0, torch.exp2(-torch.floor(torch.log2(size))), torch.ones_like(size))
        return grad, None


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: GradientScale, divide: bool) -> Tensor:
        ctx.scale, ctx.divide = scale, divide
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        factor = ctx.scale.factor
        assert factor is not None, "watch() is not the root of this backward pass"
        return grad * (1 / factor if ctx.divide else factor).to(grad.dtype), None, None
