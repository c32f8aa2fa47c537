"""Plain torch definitions of the operators' two uses; what every fused op is compared with.

N rows (target positions), V vocabulary, D width. Clarity first: (N, V) tensors are materialised. Also what runs where
nothing is compiled, and with ENGINE_FAST_OPS=reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine_fast.operators import Operator, get_operator, gumbel_noise
from engine_fast.ops import checks, library

Seed = int | Tensor | None


def relax(
    z: Tensor,
    operator: str | Operator,
    *,
    noise: Tensor | None = None,
    seed: Seed = None,
    temperature: float = 1.0,
) -> Tensor:
    """q = O(z) with the straight-through Jacobian of O (paper, Table 1).

    Args:
        z: (N, V) logits, any floating dtype; -inf forbids a word.
        noise: (N, V) Gumbel noise; drawn here, from `seed` if given, when the operator needs it and none is given.
        temperature: divides z + noise under the softmax; STL ignores it.
    Returns: (N, V) distribution or one-hot rows, dtype of z.
    Gradients: to z, along `operator.jacobian`.
    """
    op = get_operator(operator)
    perturbed, carrier = _carrier(z, op, noise, seed, temperature)
    if not op.hard:
        return carrier
    hard = F.one_hot(perturbed.argmax(-1), z.shape[-1]).to(z.dtype)
    return hard + _through(carrier)


def energy(
    z: Tensor,
    s: Tensor,
    operator: str | Operator = "ST",
    *,
    noise: Tensor | None = None,
    seed: Seed = None,
    weight: Tensor | None = None,
    ignore: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """e[n] = weight[n] * (logsumexp(s[n]) - <q[n], s[n]>), with q = O(z) (paper, eq. 3).

    Args:
        z, s: (N, V) student and teacher logits. Rows are independent. Words with q = 0 are left out of the product,
            so both may forbid a word with -inf.
        weight: (N,) factors, no gradient; ignore: (N,) bool, rows whose energy is 0 whatever they hold.
    Returns: (N,) energies in nats, float32 (float64 for float64 input).
    Gradients: ds = softmax(s) - q, exact; dz follows the operator's Jacobian.
    """
    op = get_operator(operator)
    checks.energy(z, s, noise, seed, weight, ignore, temperature)
    z, s = _accumulate(z), _accumulate(s)
    if ignore is not None:
        z, s = z.masked_fill(ignore[:, None], 0.0), s.masked_fill(ignore[:, None], 0.0)
    log_p = s.log_softmax(-1)
    perturbed, carrier = _carrier(z, op, noise, seed, temperature)
    forbidden = carrier == (0.0 if op.jacobian == "softmax" else -torch.inf)
    # What only the teacher forbids: a product with the zero that carries the gradient must stay zero.
    allowed_log_p = log_p.masked_fill(forbidden, 0.0)
    bounded_log_p = allowed_log_p.detach().clamp_min(torch.finfo(log_p.dtype).min)
    if op.hard:
        value = -log_p.gather(-1, perturbed.argmax(-1, keepdim=True)).squeeze(-1)
        # Its value cancels (but for NaN), its gradient is the straight-through one.
        e = value - (_through(carrier).masked_fill(forbidden, 0.0) * bounded_log_p).sum(-1)
    else:
        e = -(carrier * allowed_log_p).sum(-1)
    e = e * (1 + _nothing(perturbed))  # the gradients of a row that means nothing are NaN too
    if weight is not None:
        e = e * weight.to(e.dtype)
    return e if ignore is None else e.masked_fill(ignore, 0.0)


def soft_embedding(
    z: Tensor,
    table: Tensor,
    operator: str | Operator = "SX",
    *,
    noise: Tensor | None = None,
    seed: Seed = None,
    ignore: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """x[n] = O(z[n]) @ table: the embedding the teacher's decoder is fed.

    Args: z: (N, V) logits; table: (V, D) embedding rows, unscaled; ignore: (N,) bool, rows that become 0.
    Returns: (N, D), dtype of table.
    Gradients: to z along the operator's Jacobian; to table only if it requires one.
    """
    op = get_operator(operator)
    checks.soft_embedding(z, table, noise, seed, ignore, temperature)
    z, table = _accumulate(z), library.autocast(table)[0]
    if ignore is not None:
        z = z.masked_fill(ignore[:, None], 0.0)
    perturbed, carrier = _carrier(z, op, noise, seed, temperature)
    if op.hard:
        # A plain look-up keeps infinite logits out of the product; the product has no value, only a gradient.
        x = F.embedding(perturbed.argmax(-1), table) + _nothing(perturbed)[:, None].to(table.dtype)
        through = _through(carrier).masked_fill(carrier == -torch.inf, 0.0)
        x = x + through.to(table.dtype) @ table.detach()
    else:
        x = carrier.to(table.dtype) @ table
    return x if ignore is None else x.masked_fill(ignore[:, None], 0.0)


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
    seed: Seed = None,
    weight: Tensor | None = None,
    ignore: Tensor | None = None,
    temperature: float = 1.0,
    reduction: checks.Reduction = "none",
) -> Tensor:
    """energy(h_student w_student' + b, h_teacher w_teacher' + b): (N, D) hidden states, (V, D) heads -> (N,) nats.

    reduction: "sum" returns the sum over rows, ().
    Gradients: to everything that requires one.
    """
    checks.linear_energy(h_student, w_student, bias_student, h_teacher, w_teacher, bias_teacher, reduction)
    z = F.linear(h_student, w_student, bias_student)
    s = F.linear(h_teacher, w_teacher, bias_teacher)
    e = energy(z, s, operator, noise=noise, seed=seed, weight=weight, ignore=ignore, temperature=temperature)
    return e.sum() if reduction == "sum" else e


def teacher_energy(
    z: Tensor,
    h_teacher: Tensor,
    w_teacher: Tensor,
    operator: str | Operator = "ST",
    *,
    bias_teacher: Tensor | None = None,
    noise: Tensor | None = None,
    seed: Seed = None,
    weight: Tensor | None = None,
    ignore: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """energy(z, h_teacher w_teacher' + b): the student's (N, V) logits exist already; (N,) nats."""
    checks.head("teacher_energy", "h_teacher", h_teacher, "w_teacher", w_teacher, "bias_teacher", bias_teacher)
    s = F.linear(h_teacher, w_teacher, bias_teacher)
    return energy(z, s, operator, noise=noise, seed=seed, weight=weight, ignore=ignore, temperature=temperature)


def linear_soft_embedding(
    h: Tensor,
    w_student: Tensor,
    table: Tensor,
    operator: str | Operator = "SX",
    *,
    bias_student: Tensor | None = None,
    noise: Tensor | None = None,
    seed: Seed = None,
    ignore: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """soft_embedding(h w_student' + b, table): (N, D) hidden states -> (N, D) embeddings."""
    return linear_soft_embedding_and_logits(
        h, w_student, table, operator,
        bias_student=bias_student, noise=noise, seed=seed, ignore=ignore, temperature=temperature,
    )[0]  # fmt: skip


def linear_soft_embedding_and_logits(
    h: Tensor,
    w_student: Tensor,
    table: Tensor,
    operator: str | Operator = "SX",
    *,
    bias_student: Tensor | None = None,
    noise: Tensor | None = None,
    seed: Seed = None,
    ignore: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(linear_soft_embedding(..), z): the logits too, (N, V), for whatever else needs them."""
    checks.head("linear_soft_embedding", "h", h, "w_student", w_student, "bias_student", bias_student)
    z = F.linear(h, w_student, bias_student)
    return soft_embedding(z, table, operator, noise=noise, seed=seed, ignore=ignore, temperature=temperature), z


@torch.no_grad()
def linear_argmax(
    h: Tensor, weight: Tensor, bias: Tensor | None = None, *, forbidden: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """The most probable word of each row that is not forbidden, and log softmax(h weight' + bias) of it.

    The probabilities are the model's own: forbidding a word does not raise the others.

    Args: h: (N, D) hidden states; weight: (V, D) head; bias: (V,); forbidden: ids that are never chosen.
    Returns: (N,) log-probabilities in nats, float32 (float64 for float64); (N,) int64 ids, the lowest among equals.
        A row with NaN or +inf has a NaN value, one without an allowed word -inf; both have any id of the vocabulary.
    Gradients: none; what decodes needs none.
    """
    checks.head("linear_argmax", "h", h, "weight", weight, "bias", bias)
    checks.forbidden("linear_argmax", forbidden, weight.shape[0])
    z = _accumulate(F.linear(h, weight, bias))
    allowed = z.clone()
    allowed[:, list(forbidden)] = -torch.inf
    word = allowed.argmax(-1)
    return allowed.gather(-1, word[:, None]).squeeze(-1) - z.logsumexp(-1), word


def _carrier(z: Tensor, op: Operator, noise: Tensor | None, seed: Seed, temperature: float) -> tuple[Tensor, Tensor]:
    """(z + noise, what the backward pass differentiates), both (N, V)."""
    if op.gumbel:
        noise = gumbel_noise(z.shape, seed=seed, device=z.device) if noise is None else noise
        z = z + noise.to(z.dtype)
    return z, (z / temperature if temperature != 1.0 else z).softmax(-1) if op.jacobian == "softmax" else z


def _through(carrier: Tensor) -> Tensor:
    """Zero, with the gradient of `carrier`."""
    return carrier - carrier.detach()


def _nothing(logits: Tensor) -> Tensor:
    """(N,) zeros; NaN for a row that holds NaN or +inf, or forbids every word."""
    largest = logits.detach().amax(-1)
    return largest - largest


def _accumulate(x: Tensor) -> Tensor:
    """float64 stays; everything narrower is computed in float32."""
    return x if x.dtype == torch.float64 else x.float()
