"""Targets as a decoder reads them: behind its start symbol, and for some decoders from the last word to the first.

B sentences, T target positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine_fast.data.symbols import EOS


def shift_right(target_BT: Tensor, start: int = EOS) -> Tensor:
    """The decoder's input for a target: the start symbol (of all our own networks EOS), then all but the last slot."""
    return F.pad(target_BT[:, :-1], (1, 0), value=start)


def reverse_words(x_BT: Tensor, real_BT: Tensor) -> Tensor:
    """The real positions of each row but its last one, which is the end symbol, in the opposite order.

    real_BT: (B, T) bool, True for the first positions of each row. Applied twice it is the identity.
    """
    last_B1 = real_BT.sum(1, keepdim=True) - 1
    places_T = torch.arange(x_BT.shape[1], device=x_BT.device)
    return x_BT.gather(1, torch.where(places_T < last_B1, last_B1 - 1 - places_T, places_T))
