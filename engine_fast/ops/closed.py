"""energy and soft_embedding by their closed forms, a block of rows at a time.

Same values and gradients as `ops.reference`, within rounding. Between forward and backward nothing of size (N, V) is
kept but the logits themselves (and noise); probabilities exist for one block of rows, small enough for a cache.

With q = O(z), c = softmax((z + g) / temperature), L = logsumexp(s), p = softmax(s):

    e = L - <q, s>        ds = p - q        dz = c * (<c, s> - s) / temperature, or L - s for the identity Jacobian
    x = q @ W             dW = q' @ du      dz = c * (du W' - <c, du W'>) / temperature, or du W'

N rows, V vocabulary, D width, R rows of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine_fast.errors import ConfigError
from engine_fast.operators import Operator, get_operator, gumbel_noise

BLOCK_ELEMENTS = 1 << 21
"""Of one block of logits; large enough for an efficient product with the table."""


def energy(
    z: Tensor, s: Tensor, operator: str | Operator = "ST", *, noise: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """See `ops.reference.energy`. Gradients come in the dtypes of z and s; not differentiable twice."""
    if z.ndim != 2 or z.shape != s.shape:
        raise ConfigError(f"energy: z {tuple(z.shape)}, s {tuple(s.shape)}, expected two equal (N, V) shapes.")
    op = get_operator(operator)
    e: Tensor = _Energy.apply(z, s, _noise(z, op, noise), op, temperature)
    return e


def soft_embedding(
    z: Tensor, table: Tensor, operator: str | Operator = "SX", *, noise: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """See `ops.reference.soft_embedding`. Hard operators gather rows; not differentiable twice."""
    if z.ndim != 2 or table.ndim != 2 or z.shape[1] != table.shape[0]:
        raise ConfigError(f"soft_embedding: z {tuple(z.shape)}, table {tuple(table.shape)}, expected (N, V), (V, D).")
    op = get_operator(operator)
    x: Tensor = _SoftEmbedding.apply(z, table, _noise(z, op, noise), op, temperature)
    return x


class _Energy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, s: Tensor, noise: Tensor | None, op: Operator, temperature: float) -> Tensor:
        ctx.save_for_backward(z, s, noise)
        ctx.op, ctx.temperature = op, temperature
        e = z.new_empty(len(z), dtype=_wide(s))
        for rows in _blocks(z):
            s_RV = _widen(s[rows])
            total_R = s_RV.logsumexp(-1)
            if op.hard:
                e[rows] = total_R - s_RV.gather(1, _words(z, noise, rows)).squeeze(1)
            else:
                c_RV = _carrier(z, noise, rows, temperature)
                e[rows] = total_R - _dot(c_RV, s_RV)
        return e

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, s, noise = ctx.saved_tensors
        op, temperature, (du,) = ctx.op, ctx.temperature, grads
        dz = torch.empty_like(z) if ctx.needs_input_grad[0] else None
        ds = torch.empty_like(s) if ctx.needs_input_grad[1] else None
        for rows in _blocks(z):
            s_RV, du_R1 = _widen(s[rows]), du[rows, None]
            total_R = s_RV.logsumexp(-1)
            words_R1 = _words(z, noise, rows) if op.hard else None
            c_RV = None
            if op.jacobian == "softmax" and (dz is not None or not op.hard):
                c_RV = _carrier(z, noise, rows, temperature)
            if ds is not None:
                p_RV = (s_RV - total_R[:, None]).exp_()
                if words_R1 is not None:
                    p_RV.scatter_add_(1, words_R1, p_RV.new_full(words_R1.shape, -1.0))
                else:
                    assert c_RV is not None
                    p_RV.sub_(c_RV)
                ds[rows] = p_RV.mul_(du_R1)
            if dz is not None:
                if c_RV is None:
                    dz[rows] = (total_R[:, None] - s_RV).mul_(du_R1)
                else:
                    mean_R = _dot(c_RV, s_RV)
                    dz[rows] = c_RV.mul_((mean_R[:, None] - s_RV).mul_(du_R1 / temperature))
        return dz, ds, None, None, None


class _SoftEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, table: Tensor, noise: Tensor | None, op: Operator, temperature: float) -> Tensor:
        ctx.save_for_backward(z, table, noise)
        ctx.op, ctx.temperature = op, temperature
        x = table.new_empty(len(z), table.shape[1])
        for rows in _blocks(z):
            if op.hard:
                x[rows] = table[_words(z, noise, rows).squeeze(1)]
            else:
                torch.mm(_carrier(z, noise, rows, temperature).to(table.dtype), table, out=x[rows])
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, table, noise = ctx.saved_tensors
        op, temperature, (du,) = ctx.op, ctx.temperature, grads
        dz = torch.empty_like(z) if ctx.needs_input_grad[0] else None
        dtable = torch.zeros_like(table) if ctx.needs_input_grad[1] else None
        for rows in _blocks(z):
            c_RV = None
            if op.jacobian == "softmax" and (dz is not None or not op.hard):
                c_RV = _carrier(z, noise, rows, temperature)
            if dtable is not None:
                if op.hard:
                    dtable.index_add_(0, _words(z, noise, rows).squeeze(1), du[rows])
                else:
                    assert c_RV is not None
                    dtable.addmm_(c_RV.to(table.dtype).t(), du[rows])
            if dz is not None:
                dq_RV = (du[rows] @ table.t()).to(_wide(z))
                if c_RV is None:
                    dz[rows] = dq_RV
                else:
                    dz[rows] = c_RV.mul_(dq_RV.sub_(_dot(c_RV, dq_RV)[:, None]).div_(temperature))
        return dz, dtable, None, None, None


def _noise(z: Tensor, op: Operator, noise: Tensor | None) -> Tensor | None:
    if not op.gumbel:
        return None
    if noise is None:
        return gumbel_noise(z.shape, device=z.device)
    if noise.shape != z.shape:
        raise ConfigError(f"relax: noise {tuple(noise.shape)}, expected the shape of z {tuple(z.shape)}.")
    return noise


def _blocks(z: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // max(1, z.shape[1]))
    return (slice(start, start + step) for start in range(0, len(z), step))


def _wide(x: Tensor) -> torch.dtype:
    """float64 stays; everything narrower is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _widen(x: Tensor) -> Tensor:
    return x.to(_wide(x))


def _perturbed(z: Tensor, noise: Tensor | None, rows: slice) -> Tensor:
    z_RV = _widen(z[rows])
    return z_RV if noise is None else z_RV + noise[rows].to(z_RV.dtype)


def _carrier(z: Tensor, noise: Tensor | None, rows: slice, temperature: float) -> Tensor:
    z_RV = _perturbed(z, noise, rows)
    return (z_RV if temperature == 1.0 else z_RV / temperature).softmax(-1)


def _words(z: Tensor, noise: Tensor | None, rows: slice) -> Tensor:
    """(R, 1) indices of the one-hot choice."""
    return _perturbed(z, noise, rows).argmax(-1, keepdim=True)


def _dot(a_RV: Tensor, b_RV: Tensor) -> Tensor:
    dot_R: Tensor = torch.linalg.vecdot(a_RV, b_RV)
    return dot_R
