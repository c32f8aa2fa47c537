"""Energies of discrete translations under an autoregressive teacher (paper, section 3.1).

B sentences, S source positions, T target positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine_fast.data.symbols import PAD
from engine_fast.models import Teacher, reverse_words, shift_right


def token_energies(teacher: Teacher, memory: Any, target_BT: Tensor, *, real_BT: Tensor | None = None) -> Tensor:
    """e[b, t] = -log p(y_t | y_0 .. y_{t-1}, x) in nats, 0 at padding; y_{t+1} .. for a right-to-left teacher.

    Args:
        target_BT: ids that end in EOS, right padded with PAD.
        real_BT: which positions count; default: all that are not PAD. A student may choose PAD as a word.
    Returns: (B, T) float32 (float64 for a float64 teacher). Only real tokens reach the vocabulary product.
    """
    real_BT = target_BT != PAD if real_BT is None else real_BT
    target_BT = reverse_words(target_BT, real_BT) if teacher.right_to_left else target_BT
    hidden_ND = teacher.decode(memory, shift_right(target_BT, teacher.start))[real_BT]
    logits_NV = teacher.project(hidden_ND)
    if logits_NV.dtype != torch.float64:
        logits_NV = logits_NV.float()
    energies_N = F.cross_entropy(logits_NV, target_BT[real_BT], reduction="none")
    energies_BT = energies_N.new_zeros(target_BT.shape).masked_scatter(real_BT, energies_N)
    return reverse_words(energies_BT, real_BT) if teacher.right_to_left else energies_BT


def discrete_energy(teacher: Teacher, source_BS: Tensor, target_BT: Tensor) -> Tensor:
    """E(x, y) = -log p(y | x) in nats a sentence, (B,) float32; the end symbol is scored too."""
    return token_energies(teacher, teacher.encode(source_BS), target_BT).sum(-1)
