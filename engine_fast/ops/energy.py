"""energy(z, s): the fused operator, its shapes and its gradient. N rows, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine_fast.operators import Operator, draw_seed, get_operator
from engine_fast.ops import checks, library, reference

STATISTICS = 6
"""Saved scalars a row: max, sum, argmax of z + g; max and sum of s; <softmax(z + g), s> - max. csrc/row/state.h."""


def energy(
    z: Tensor,
    s: Tensor,
    operator: str | Operator = "ST",
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    weight: Tensor | None = None,
    ignore: Tensor | None = None,
    temperature: float = 1.0,
    overwrite: bool = False,
) -> Tensor:
    """e[n] = weight[n] * (logsumexp(s[n]) - <q[n], s[n]>), with q = O(z) (paper, eq. 3).

    See `ops.reference.energy`. One visit a row; between forward and backward six scalars a row are kept besides z and
    s, sums over V are accumulated in float32 (float64 for float64), ties go to the lowest index, NaN stays in its row.

    Args:
        z, s: (N, V) logits, any strides; float32, bfloat16, float16 (GPU), float64; one may be float32 beside a half.
        noise, seed: Gumbel noise itself, or its key; default: a key drawn from torch's generator. Read by SG and
            GX only.
        overwrite: the backward pass writes dz and ds over z and s; only where nobody reads the logits after it.
            Without effect where z and s share memory or their columns are apart, with retain_graph=True, under
            torch.compile and on the reference path.
    Returns: (N,) nats, float32 (float64).
    Gradients: dz, ds in the dtypes of z and s; not differentiable twice.
    """
    op = get_operator(operator)
    checks.energy(z, s, noise, seed, weight, ignore, temperature)
    if not library.fused(z):
        return reference.energy(z, s, op, noise=noise, seed=seed, weight=weight, ignore=ignore, temperature=temperature)
    checks.kernel_dtype("energy", z=z, s=s)
    options = weighted(z, op, noise, seed, weight, ignore, temperature)
    e: Tensor = _energy(z, s, *options, overwrite)[0]
    return e


def unweighted(
    like: Tensor,
    op: Operator,
    noise: Tensor | None,
    seed: int | Tensor | None,
    ignore: Tensor | None,
    temperature: float,
) -> tuple[Any, ...]:
    """The options that end an operator's schema; draws the seed of a Gumbel operator that has neither."""
    if not op.gumbel:
        noise = seed = None
    elif noise is None:
        seed = draw_seed(like.device) if seed is None else torch.as_tensor(seed, dtype=torch.int64).to(like.device)
    return noise, seed, ignore, op.hard, op.jacobian == "identity", temperature


def weighted(
    like: Tensor,
    op: Operator,
    noise: Tensor | None,
    seed: int | Tensor | None,
    weight: Tensor | None,
    ignore: Tensor | None,
    temperature: float,
) -> tuple[Any, ...]:
    """The same with the weights of rows."""
    noise, seed, *rest = unweighted(like, op, noise, seed, ignore, temperature)
    return noise, seed, weight, *rest


@library.fake("energy")
def _(z: Tensor, s: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    torch._check(z.ndim == 2 and z.shape == s.shape, lambda: f"energy: z {z.shape}, s {s.shape}")
    wide = library.wide(z)
    return z.new_empty(z.shape[0], dtype=wide), z.new_empty(z.shape[0], STATISTICS, dtype=wide)


@library.fake("energy_backward")
def _(grad: Tensor, z: Tensor, s: Tensor, stats: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    *_, need_z, need_s = options
    return z.new_empty(z.shape if need_z else 0), s.new_empty(s.shape if need_s else 0)


@library.fake("energy_backward_")
def _(grad: Tensor, z: Tensor, s: Tensor, stats: Tensor, *options: Any) -> None:
    return None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, s, noise, seed, weight, ignore, *ctx.relaxation, ctx.overwrite = inputs
    ctx.save_for_backward(z, s, output[1], noise, seed, weight, ignore)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 8
    if grad is None:
        return None, None, *nothing
    z, s, stats, *options = ctx.saved_tensors
    need_z, need_s = ctx.needs_input_grad[:2]
    if not (ctx.overwrite and library.may_overwrite(z, s, grad) and _apart(z, s, need_z, need_s)):
        dz, ds = torch.ops.engine_fast.energy_backward(grad, z, s, stats, *options, *ctx.relaxation, need_z, need_s)
        return dz if need_z else None, ds if need_s else None, *nothing
    targets = z.detach() if need_z else None, s.detach() if need_s else None
    torch.ops.engine_fast.energy_backward_(grad, z, s, stats, *options, *ctx.relaxation, *targets)
    return *targets, *nothing


def _apart(z: Tensor, s: Tensor, need_z: bool, need_s: bool) -> bool:
    """Whether every element that is written has memory of its own, in rows that a kernel can write."""
    whole = all(x.stride(1) == 1 and x.stride(0) >= x.shape[1] for x, need in ((z, need_z), (s, need_s)) if need)
    return whole and z.untyped_storage().data_ptr() != s.untyped_storage().data_ptr()


_energy = library.differentiable("energy", _backward, _setup)
