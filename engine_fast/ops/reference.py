"""Plain torch definitions of the operators' two uses; what every fused op is compared with.

N rows (target positions), V vocabulary, D width. Clarity first: (N, V) tensors are materialised.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine_fast.errors import ConfigError
from engine_fast.operators import Operator, get_operator, gumbel_noise


def relax(z: Tensor, operator: str | Operator, *, noise: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """q = O(z) with the straight-through Jacobian of O (paper, Table 1).

    Args:
        z: (N, V) logits, any floating dtype.
        noise: (N, V) Gumbel noise; drawn here when the operator needs it and none is given.
        temperature: divides z + noise under the softmax; STL ignores it.
    Returns: (N, V) distribution or one-hot rows, dtype of z.
    Gradients: to z, along `operator.jacobian`.
    """
    op = get_operator(operator)
    perturbed, carrier = _carrier(z, op, noise, temperature)
    if not op.hard:
        return carrier
    hard = F.one_hot(perturbed.argmax(-1), z.shape[-1]).to(z.dtype)
    return hard + (carrier - carrier.detach())


def energy(
    z: Tensor, s: Tensor, operator: str | Operator = "ST", *, noise: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """e[n] = logsumexp(s[n]) - <q[n], s[n]>, with q = O(z) (paper, eq. 3).

    Args: z, s: (N, V) student and teacher logits. Rows are independent.
    Returns: (N,) energies in nats, float32 (float64 for float64 input).
    Gradients: ds = softmax(s) - q, exact; dz follows the operator's Jacobian.
    """
    if z.ndim != 2 or z.shape != s.shape:
        raise ConfigError(f"energy: z {tuple(z.shape)}, s {tuple(s.shape)}, expected two equal (N, V) shapes.")
    op = get_operator(operator)
    log_p = _accumulate(s).log_softmax(-1)
    if not op.hard:
        return -(relax(_accumulate(z), op, noise=noise, temperature=temperature) * log_p).sum(-1)
    perturbed, carrier = _carrier(_accumulate(z), op, noise, temperature)
    value = -log_p.gather(-1, perturbed.argmax(-1, keepdim=True)).squeeze(-1)
    through = -(carrier * log_p.detach()).sum(-1)  # its value cancels; its gradient is the straight-through one
    return value + (through - through.detach())


def soft_embedding(
    z: Tensor, table: Tensor, operator: str | Operator = "SX", *, noise: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """x[n] = O(z[n]) @ table: the embedding the teacher's decoder is fed.

    Args: z: (N, V) logits; table: (V, D) embedding rows, unscaled.
    Returns: (N, D), dtype of table.
    Gradients: to z along the operator's Jacobian; to table only if it requires one.
    """
    if z.ndim != 2 or table.ndim != 2 or z.shape[1] != table.shape[0]:
        raise ConfigError(
            f"soft_embedding: z {tuple(z.shape)}, table {tuple(table.shape)}, expected (N, V) and (V, D)."
        )
    q = relax(_accumulate(z), operator, noise=noise, temperature=temperature)
    return q.to(table.dtype) @ table


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
    temperature: float = 1.0,
) -> Tensor:
    """energy(h_student w_student' + b, h_teacher w_teacher' + b): (N, D) hidden states, (V, D) heads -> (N,) nats."""
    z = F.linear(h_student, w_student, bias_student)
    s = F.linear(h_teacher, w_teacher, bias_teacher)
    return energy(z, s, operator, noise=noise, temperature=temperature)


def linear_soft_embedding(
    h: Tensor,
    w_student: Tensor,
    table: Tensor,
    operator: str | Operator = "SX",
    *,
    bias_student: Tensor | None = None,
    noise: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """soft_embedding(h w_student' + b, table): (N, D) hidden states -> (N, D) embeddings."""
    return soft_embedding(F.linear(h, w_student, bias_student), table, operator, noise=noise, temperature=temperature)


def _carrier(z: Tensor, op: Operator, noise: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """(z + noise, what the backward pass differentiates), both (N, V)."""
    if op.gumbel:
        noise = gumbel_noise(z.shape, device=z.device) if noise is None else noise
        if noise.shape != z.shape:
            raise ConfigError(f"{op.name}: noise {tuple(noise.shape)}, expected the shape of z {tuple(z.shape)}.")
        z = z + noise.to(z.dtype)
    return z, (z / temperature if temperature != 1.0 else z).softmax(-1) if op.jacobian == "softmax" else z


def _accumulate(x: Tensor) -> Tensor:
    """float64 stays; everything narrower is computed in float32."""
    return x if x.dtype == torch.float64 else x.float()
