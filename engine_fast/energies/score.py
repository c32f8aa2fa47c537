"""Energies of discrete translations under an autoregressive teacher (paper, section 3.1).

B sentences, S source positions, T target positions, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine_fast.data.symbols import PAD
from engine_fast.models import Memory, Transformer, shift_right


def token_energies(teacher: Transformer, memory: Memory, target_BT: Tensor, *, real_BT: Tensor | None = None) -> Tensor:
    """e[b, t] = -log p(y_t | y_0 .. y_{t-1}, x) in nats, 0 at padding.

    Args:
        target_BT: ids that end in EOS, right padded with PAD.
        real_BT: which positions count; default: all that are not PAD. A student may choose PAD as a word.
    Returns: (B, T) float32 (float64 for a float64 teacher). Only real tokens reach the vocabulary product.
    """
    real_BT = target_BT != PAD if real_BT is None else real_BT
    hidden_ND = teacher.decode(memory, shift_right(target_BT))[real_BT]
    logits_NV = teacher.project(hidden_ND)
    if logits_NV.dtype != torch.float64:
        logits_NV = logits_NV.float()
    energies_N = F.cross_entropy(logits_NV, target_BT[real_BT], reduction="none")
    return energies_N.new_zeros(target_BT.shape).masked_scatter(real_BT, energies_N)


def discrete_energy(teacher: Transformer, source_BS: Tensor, target_BT: Tensor) -> Tensor:
    """E(x, y) = -log p(y | x) in nats a sentence, (B,) float32; the end symbol is scored too."""
    return token_energies(teacher, teacher.encode(source_BS), target_BT).sum(-1)
