"""soft_embedding(z, table): the fused operator, its shapes and its gradient. N rows, V vocabulary, D width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine_fast.operators import Operator, get_operator
from engine_fast.ops import checks, library, reference
from engine_fast.ops.energy import unweighted

STATISTICS = 3
"""Saved scalars a row: max, sum, argmax of z + g. csrc/row/state.h."""


def soft_embedding(
    z: Tensor,
    table: Tensor,
    operator: str | Operator = "SX",
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    ignore: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """x[n] = O(z[n]) @ table, (N, D), dtype of table.

    See `ops.reference.soft_embedding`. The softmax exists for about a million elements at a time, hard operators look
    rows up; the backward pass needs no (N, V) tensor but dz itself. float32 sums over V.

    Args: z: (N, V) logits, any strides; table: (V, D); float32, bfloat16, float16 (GPU), float64; one may be float32
        beside a half. Under autocast the table is rounded and z is not.
    Gradients: dz in the dtype of z along the operator's Jacobian; to table only if it requires one.
    """
    op = get_operator(operator)
    checks.soft_embedding(z, table, noise, seed, ignore, temperature)
    if not library.fused(z):
        return reference.soft_embedding(z, table, op, noise=noise, seed=seed, ignore=ignore, temperature=temperature)
    if library.checks_finite():
        checks.finite("soft_embedding", table=table)
    table = library.autocast(table)[0]  # only the product is rounded: the words are those of the logits as they came
    if z.dtype != table.dtype and torch.float32 not in (z.dtype, table.dtype):
        z = z.float()
    checks.kernel_dtype("soft_embedding", z=z, table=table)
    options = unweighted(z, op, noise, seed, ignore, temperature)
    x: Tensor = _soft_embedding(z, table, *options)[0]
    return x


@library.fake("soft_embedding")
def _(z: Tensor, table: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    torch._check(z.ndim == 2 and z.shape[1] == table.shape[0], lambda: f"soft_embedding: {z.shape}, {table.shape}")
    return table.new_empty(z.shape[0], table.shape[1]), z.new_empty(z.shape[0], STATISTICS, dtype=library.wide(z))


@library.fake("soft_embedding_backward")
def _(grad: Tensor, z: Tensor, table: Tensor, stats: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    *_, need_z, need_table = options
    return z.new_empty(z.shape if need_z else 0), table.new_empty(table.shape if need_table else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, table, noise, seed, ignore, *ctx.relaxation = inputs
    ctx.save_for_backward(z, table, output[1], noise, seed, ignore)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 6
    if grad is None:
        return None, None, *nothing
    z, table, stats, *options = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    dz, dtable = torch.ops.engine_fast.soft_embedding_backward(grad, z, table, stats, *options, *ctx.relaxation, *needs)
    return dz if needs[0] else None, dtable if needs[1] else None, *nothing


_soft_embedding = library.differentiable("soft_embedding", _backward, _setup)
