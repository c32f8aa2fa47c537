"""The energy of a student's relaxed output (paper, equations 1 to 3).

B sentences, T target positions, M rows that the student fills (all real positions but each sentence's last,
which is the end symbol), V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine_fast import ops
from engine_fast.data.symbols import EOS, PAD
from engine_fast.models import Memory, Transformer


@dataclass(frozen=True, slots=True)
class Relaxation:
    """How student logits become what the teacher reads (o1) and what it is asked for (o2)."""

    o1: str = "SX"
    o2: str = "ST"
    temperature: float = 1.0
    stl_logits: Literal["logits", "log_probabilities"] = "logits"
    """What STL's identity Jacobian refers to; no other operator can tell the two apart."""


def inner_positions(target_BT: Tensor) -> Tensor:
    """(B, T) bool: real positions but each sentence's last; the M rows are its True entries in row-major order."""
    return F.pad(target_BT[:, 1:] != PAD, (0, 1), value=False)


def relaxed_energy(
    teacher: Transformer,
    memory: Memory,
    z_MV: Tensor,
    target_BT: Tensor,
    relaxation: Relaxation,
    *,
    noise: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """E[b] = sum_t -O2(z_t)' log p(. | O1(z_0) .. O1(z_{t-1}), x) - log p(end | O1(z_0) ..), in nats.

    The teacher's decoder reads the end symbol's embedding, then O1(z_t) times its table; the last slot of each
    sentence is scored against the end symbol itself.

    Args:
        memory: the teacher's encoder states.
        z_MV: student logits of the rows inner_positions(target_BT).
        target_BT: only its padding is read: it says how long each sentence is.
        noise: (M, V) Gumbel noise of o1 and of o2; drawn independently when needed and not given.
    Returns: (B,) float32 (float64 for float64 logits).
    Gradients: to z_MV through both operators; to the teacher's weights only if they require one.
    """
    real_BT, inner_BT = target_BT != PAD, inner_positions(target_BT)
    end_BT = real_BT & ~inner_BT
    if relaxation.stl_logits == "log_probabilities" and "STL" in (relaxation.o1, relaxation.o2):
        z_MV = z_MV.log_softmax(-1) if z_MV.dtype == torch.float64 else z_MV.float().log_softmax(-1)

    table_VD = teacher.embedding_table
    x_MD = ops.soft_embedding(z_MV, table_VD, relaxation.o1, noise=noise[0], temperature=relaxation.temperature)
    start_B1D = table_VD[EOS].expand(target_BT.shape[0], 1, -1)
    rest_BTD = x_MD.new_zeros(target_BT.shape[0], target_BT.shape[1] - 1, table_VD.shape[1])
    rest_BTD = rest_BTD.masked_scatter(inner_BT[:, :-1, None], x_MD)
    hidden_BTD = teacher.forward_embedded(memory, torch.cat([start_B1D, rest_BTD], dim=1))

    s_MV = teacher.project(hidden_BTD[inner_BT])
    s_BV = teacher.project(hidden_BTD[end_BT])
    e_M = ops.energy(z_MV.to(s_MV.dtype), s_MV, relaxation.o2, noise=noise[1], temperature=relaxation.temperature)
    s_BV = s_BV if s_BV.dtype == torch.float64 else s_BV.float()
    end_B = F.cross_entropy(s_BV, target_BT.new_full((len(s_BV),), EOS), reduction="none")
    energy_BT = e_M.new_zeros(target_BT.shape).masked_scatter(inner_BT, e_M).masked_scatter(end_BT, end_B)
    return energy_BT.sum(-1)
