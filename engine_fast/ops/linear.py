"""The operators that own the vocabulary's matrices: fused, their shapes and their gradients.

N rows, V vocabulary, D width. Logits exist for one tile of rows at a time. Under ZeRO-3 call them inside the module
that owns the weight, where it is whole.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine_fast.operators import Operator, get_operator
from engine_fast.ops import checks, library, reference
from engine_fast.ops.energy import STATISTICS, energy, unweighted, weighted


def linear_energy(
    h_student: Tensor,
    w_student: Tensor,
    h_teacher: Tensor,
    w_teacher: Tensor,
    operator: str | Operator = "ST",
    *,
    bias_student: Tensor | None = None,
    bias_teacher: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    weight: Tensor | None = None,
    ignore: Tensor | None = None,
    temperature: float = 1.0,
    reduction: checks.Reduction = "none",
) -> Tensor:
    """energy(h_student w_student' + b, h_teacher w_teacher' + b) without (N, V) tensors.

    See `ops.reference.linear_energy`.

    Args:
        h_student, h_teacher: (N, D) hidden states; the widths may differ. w_student, w_teacher: (V, D) heads, each of
            the dtype of its hidden states; one side may be float32 beside a half.
        reduction: "none": (N,) energies; the backward pass computes the logits of each tile again. "sum": their sum,
            (), whose gradients are made in the forward pass, for only a factor is missing.
    Returns: nats, float32 (float64 for float64).
    Gradients: to everything that requires one and to nothing else: a frozen teacher's head costs none.
    """
    op = get_operator(operator)
    checks.linear_energy(h_student, w_student, bias_student, h_teacher, w_teacher, bias_teacher, reduction)
    checks.options("linear_energy", h_student, len(h_student), len(w_student), noise, seed, weight, ignore, temperature)
    if not library.fused(h_student):
        return reference.linear_energy(
            h_student, w_student, h_teacher, w_teacher, op, bias_student=bias_student, bias_teacher=bias_teacher,
            noise=noise, seed=seed, weight=weight, ignore=ignore, temperature=temperature, reduction=reduction,
        )  # fmt: skip
    _check_finite("linear_energy", w_student=w_student, bias_student=bias_student)
    _check_finite("linear_energy", w_teacher=w_teacher, bias_teacher=bias_teacher)
    heads = library.autocast(h_student, w_student, bias_student, h_teacher, w_teacher, bias_teacher)
    checks.kernel_dtype("linear_energy", h_student=heads[0], h_teacher=heads[3])
    options = weighted(h_student, op, noise, seed, weight, ignore, temperature)
    if reduction == "none" or any(head is not None and head.dtype == torch.float16 for head in heads):
        # A gradient made before the loss scale is known would leave float16's range.
        e: Tensor = _linear_energy(*heads, *options)
        return e.sum() if reduction == "sum" else e
    needs = [torch.is_grad_enabled() and head is not None and head.requires_grad for head in heads]
    if not any(needs):
        total: Tensor = _linear_energy(*heads, *options).sum()
    else:
        total = _linear_energy_sum(*heads, *options, needs, True)[0]
    return total


def teacher_energy(
    z: Tensor,
    h_teacher: Tensor,
    w_teacher: Tensor,
    operator: str | Operator = "ST",
    *,
    bias_teacher: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    weight: Tensor | None = None,
    ignore: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """energy(z, h_teacher w_teacher' + b), (N,), for logits z (N, V) that exist already.

    See `ops.reference.teacher_energy`. The teacher's logits are kept once, and the backward pass turns them into
    dz where they stand; h_teacher's gradient is made in the forward pass.

    Args: z: (N, V), float32, float64, bfloat16 or (GPU) float16; h_teacher (N, D) and w_teacher (V, D) of one dtype,
        that of z or a half beside float32.
    Returns: (N,) nats, float32 (float64 for float64).
    Gradients: to z and h_teacher. A head that is not frozen gets its own through F.linear and `energy`.
    """
    op = get_operator(operator)
    checks.head("teacher_energy", "h_teacher", h_teacher, "w_teacher", w_teacher, "bias_teacher", bias_teacher)
    checks.teacher_logits(z, h_teacher, w_teacher)
    checks.options("teacher_energy", z, z.shape[0], z.shape[1], noise, seed, weight, ignore, temperature)
    if not library.fused(z):
        return reference.teacher_energy(
            z, h_teacher, w_teacher, op,
            bias_teacher=bias_teacher, noise=noise, seed=seed, weight=weight, ignore=ignore, temperature=temperature,
        )  # fmt: skip
    grad = torch.is_grad_enabled()
    if grad and (w_teacher.requires_grad or (bias_teacher is not None and bias_teacher.requires_grad)):
        s = F.linear(h_teacher, w_teacher, bias_teacher)
        return energy(z, s, op, noise=noise, seed=seed, weight=weight, ignore=ignore, temperature=temperature)
    _check_finite("teacher_energy", w_teacher=w_teacher, bias_teacher=bias_teacher)
    head = library.autocast(h_teacher, w_teacher, bias_teacher)
    checks.kernel_dtype("teacher_energy", z=z, h_teacher=head[0])
    options = weighted(z, op, noise, seed, weight, ignore, temperature)
    need_logits, need_hidden = grad and z.requires_grad, grad and h_teacher.requires_grad
    e: Tensor = _teacher_energy(z, *head, *options, need_logits, need_hidden, True)[0]
    return e


def linear_soft_embedding(
    h: Tensor,
    w_student: Tensor,
    table: Tensor,
    operator: str | Operator = "SX",
    *,
    bias_student: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    ignore: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """soft_embedding(h w_student' + b, table), (N, D), without (N, V) tensors.

    See `ops.reference.linear_soft_embedding`. The backward pass computes the logits of each tile again. h and w_student
    are of one dtype, table of that or a half beside float32; the result has table's (autocast's under autocast).
    Gradients: to everything that requires one; a frozen table costs none.
    """
    return _embed(h, w_student, table, operator, bias_student, noise, seed, ignore, temperature, keep=False)[0]


def linear_soft_embedding_and_logits(
    h: Tensor,
    w_student: Tensor,
    table: Tensor,
    operator: str | Operator = "SX",
    *,
    bias_student: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    ignore: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(linear_soft_embedding(..), z): the logits, (N, V), are computed once and kept for `teacher_energy`.

    z has the dtype of h; `ignore` zeroes rows of x and leaves z alone. Gradients of both meet, tile by tile, in one
    product with the head and one with the hidden states.
    """
    return _embed(h, w_student, table, operator, bias_student, noise, seed, ignore, temperature, keep=True)


def _embed(
    h: Tensor,
    w_student: Tensor,
    table: Tensor,
    operator: str | Operator,
    bias_student: Tensor | None,
    noise: Tensor | None,
    seed: int | Tensor | None,
    ignore: Tensor | None,
    temperature: float,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    op, where = get_operator(operator), "linear_soft_embedding"
    checks.head(where, "h", h, "w_student", w_student, "bias_student", bias_student)
    checks.table(where, w_student, table, h)
    checks.options(where, h, len(h), len(w_student), noise, seed, None, ignore, temperature)
    if not library.fused(h):
        return reference.linear_soft_embedding_and_logits(
            h, w_student, table, op,
            bias_student=bias_student, noise=noise, seed=seed, ignore=ignore, temperature=temperature,
        )  # fmt: skip
    _check_finite(where, w_student=w_student, bias_student=bias_student, table=table)
    matrices = library.autocast(h, w_student, bias_student, table)
    checks.kernel_dtype(where, h=matrices[0], table=matrices[3])
    options = unweighted(h, op, noise, seed, ignore, temperature)
    x, z = _linear_soft_embedding(*matrices, *options, keep)
    return x, z


def _check_finite(where: str, **weights: Tensor | None) -> None:
    if library.checks_finite():
        checks.finite(where, **weights)


# ---------------------------------------------------------------- shapes


def _gradients_like(tensors: list[Tensor | None], needs: list[bool], like: Tensor) -> list[Tensor]:
    pairs = zip(tensors, needs, strict=True)
    return [(like if t is None else t).new_empty(t.shape if need and t is not None else 0) for t, need in pairs]


@library.fake("linear_energy")
def _(h_student: Tensor, *rest: Any) -> Tensor:
    return h_student.new_empty(h_student.shape[0], dtype=library.wide(h_student))


@library.fake("linear_energy_gradients")
def _(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    heads, needs, h = list(rest[:6]), rest[-1], rest[0]
    return h.new_empty(h.shape[0], dtype=library.wide(h)), *_gradients_like(heads, needs, h)


@library.fake("linear_energy_sum")
def _(*rest: Any) -> tuple[Tensor, ...]:
    heads, needs, h = list(rest[:6]), rest[-2], rest[0]
    return h.new_empty((), dtype=library.wide(h)), *_gradients_like(heads, needs, h)


@library.fake("teacher_energy")
def _(z: Tensor, h_teacher: Tensor, w_teacher: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    need_logits, need_hidden, _ = rest[-3:]
    wide = library.wide(z)
    return (
        z.new_empty(z.shape[0], dtype=wide),
        h_teacher.new_empty(z.shape[0] if need_logits else 0, z.shape[1]),
        z.new_empty(z.shape[0], STATISTICS, dtype=wide),
        h_teacher.new_empty(h_teacher.shape if need_hidden else 0),
    )


@library.fake("linear_soft_embedding")
def _(h: Tensor, w_student: Tensor, b_student: Tensor | None, table: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    keep = rest[-1]
    return table.new_empty(h.shape[0], table.shape[1]), h.new_empty(h.shape[0] if keep else 0, w_student.shape[0])


@library.fake("linear_soft_embedding_backward")
def _(
    grad: Tensor | None, grad_z: Tensor | None, h: Tensor, w: Tensor, b: Tensor | None, table: Tensor, *rest: Any
) -> list[Tensor]:
    *three, dtable = _gradients_like([h, w, b, table], rest[-1], h)
    return [*three, dtable]


# ---------------------------------------------------------------- gradients


def _setup_energy(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.relaxation = inputs[10:]
    ctx.set_materialize_grads(False)


def _backward_energy(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:6])
    if grad is None:
        return (None,) * 13
    gradients = torch.ops.engine_fast.linear_energy_gradients(grad, *ctx.saved_tensors, *ctx.relaxation, needs)[1:]
    return *_wanted(gradients, needs), *(None,) * 7


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs, ctx.overwrite = inputs[-2:]
    ctx.save_for_backward(*(made for made, need in zip(output[1:], ctx.needs, strict=True) if need))
    ctx.set_materialize_grads(False)


def _backward_sum(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 15
    made = iter(ctx.saved_tensors)
    gradients = [next(made) if need else None for need in ctx.needs]
    if ctx.overwrite and library.may_overwrite(grad, *ctx.saved_tensors):
        scaled = [None if g is None else g.detach().mul_(grad) for g in gradients]
    else:
        scaled = [None if g is None else g * grad for g in gradients]
    return *scaled, *(None,) * 9


def _setup_teacher(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, _, _, _, *options, _, _, ctx.overwrite = inputs
    _, s, stats, dh = output
    ctx.save_for_backward(z, s, stats, dh, *options[:4])
    ctx.relaxation = options[4:]
    ctx.set_materialize_grads(False)


def _backward_teacher(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 12
    if grad is None:
        return None, None, *nothing
    z, s, stats, dh, *options = ctx.saved_tensors
    need_z, need_h = ctx.needs_input_grad[:2]
    dz = None
    if need_z and z.dtype == s.dtype and ctx.overwrite and library.may_overwrite(z, s, grad):
        dz = s.detach()
        torch.ops.engine_fast.energy_backward_(grad, z, s, stats, *options, *ctx.relaxation, dz, None)
    elif need_z:
        dz, _ = torch.ops.engine_fast.energy_backward(grad, z, s, stats, *options, *ctx.relaxation, True, False)
    return dz, (dh * grad[:, None]).to(dh.dtype) if need_h else None, *nothing


def _setup_embed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    h, w, b, table, noise, seed, ignore, *relaxation, keep = inputs
    ctx.save_for_backward(h, w, b, table, output[1] if keep else None, noise, seed, ignore)
    ctx.relaxation = relaxation
    ctx.set_materialize_grads(False)


def _backward_embed(ctx: Any, grad: Tensor | None, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    if grad is None and grad_z is None:
        return (None,) * 11
    gradients = torch.ops.engine_fast.linear_soft_embedding_backward(
        grad, grad_z, *ctx.saved_tensors, *ctx.relaxation, needs
    )
    return *_wanted(gradients, needs), *(None,) * 7


def _wanted(gradients: Any, needs: list[bool]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


_linear_energy = library.differentiable("linear_energy", _backward_energy, _setup_energy)
_linear_energy_sum = library.differentiable("linear_energy_sum", _backward_sum, _setup_sum)
_teacher_energy = library.differentiable("teacher_energy", _backward_teacher, _setup_teacher)
_linear_soft_embedding = library.differentiable("linear_soft_embedding", _backward_embed, _setup_embed)
