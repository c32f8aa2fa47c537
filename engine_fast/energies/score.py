"""Energies of discrete translations under an autoregressive teacher (paper, section 3.1).

B sentences, S source positions, N targets, T target positions, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine_fast.data.symbols import PAD
from engine_fast.models import Teacher, reverse_words, shift_right

_BLOCK_ELEMENTS = 1 << 22
"""Logits at once where no gradient keeps them all."""


def token_energies(teacher: Teacher, memory: Any, target_BT: Tensor, *, real_BT: Tensor | None = None) -> Tensor:
    """e[b, t] = -log p(y_t | y_0 .. y_{t-1}, x) in nats, 0 at padding; y_{t+1} .. for a right-to-left teacher.

    Args:
        target_BT: ids that end in EOS, right padded with PAD.
        real_BT: which positions count; default: all that are not PAD. A student may choose PAD as a word.
    Returns: (B, T) float32 (float64 for a float64 teacher). Only real tokens reach the vocabulary product, a block of
        them at a time.
    """
    real_BT = target_BT != PAD if real_BT is None else real_BT
    target_BT = reverse_words(target_BT, real_BT) if teacher.right_to_left else target_BT
    hidden_ND = teacher.decode(memory, shift_right(target_BT, teacher.start))[real_BT]
    words_N = target_BT[real_BT]
    energies_N: Tensor = teacher.project_through(hidden_ND, partial(_cross_entropy, words_N))
    energies_BT = energies_N.new_zeros(target_BT.shape).masked_scatter(real_BT, energies_N)
    return reverse_words(energies_BT, real_BT) if teacher.right_to_left else energies_BT


def discrete_energy(teacher: Teacher, source_BS: Tensor, target_NT: Tensor) -> Tensor:
    """E(x, y) = -log p(y | x) in nats a sentence, float32; the end symbol is scored too.

    target_NT: one target for each source, or as many adjacent ones for each; a source is encoded once.
    Returns: (N,).
    """
    memory = teacher.encode(source_BS)
    shared = teacher.share(memory, target_NT.shape[0] // max(1, source_BS.shape[0]))
    return token_energies(teacher, shared, target_NT).sum(-1)


def _cross_entropy(words_N: Tensor, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """(N,) nats of words_N; one call of the head, whatever the blocks, for under ZeRO-3 ranks call it together."""
    energies = []
    num_rows = max(1, _BLOCK_ELEMENTS // weight_VD.shape[0])
    for hidden, words in zip(hidden_ND.split(num_rows), words_N.split(num_rows), strict=True):
        logits = F.linear(hidden, weight_VD, bias_V)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        energies.append(F.cross_entropy(logits, words, reduction="none"))
    return torch.cat(energies)
