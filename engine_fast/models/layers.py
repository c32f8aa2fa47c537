"""Building blocks of both transformers.

B sentences, T query positions, S key positions, H heads, D width.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine_fast.config import Architecture
from engine_fast.models.dropout import dropout

FIRST_POSITION = 2
"""Angle index of the first sinusoidal position: imported teachers count from the padding id plus one."""


def sinusoidal_table(num_positions: int, width: int) -> Tensor:
    """(num_positions, width) float32: sin in the first half, cos in the second; frequencies 10000^(-i/(width/2-1)).

    Position p has angle (p + FIRST_POSITION) * frequency.
    """
    half = width // 2
    rate = torch.log(torch.tensor(10000.0)).item() / max(half - 1, 1)
    frequency = torch.exp(torch.arange(half, dtype=torch.float32) * -rate)
    angle = torch.arange(FIRST_POSITION, FIRST_POSITION + num_positions, dtype=torch.float32)[:, None] * frequency
    table = torch.cat([angle.sin(), angle.cos()], dim=1)
    return F.pad(table, (0, width - table.shape[1]))


class SinusoidalPositions(nn.Module):
    """Adds nothing to the state dict: the table is a function of its size."""

    table: Tensor

    def __init__(self, num_positions: int, width: int) -> None:
        super().__init__()
        self.register_buffer("table", sinusoidal_table(num_positions, width), persistent=False)

    def forward(self, start: int, length: int) -> Tensor:
        return self.table[start : start + length]


class LearnedPositions(nn.Module):
    def __init__(self, num_positions: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_positions, width))

    def forward(self, start: int, length: int) -> Tensor:
        return self.weight[start : start + length]


class SelfAttention(nn.Module):
    """Multi-head attention of a stack to itself; in_proj holds the rows of q, k and v in this order."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.attention_dropout
        self.in_proj = nn.Linear(config.width, 3 * config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x_BTD: Tensor, *, mask_BS: Tensor | None = None, causal: bool = False) -> Tensor:
        """mask_BS: True where a key may be seen; causal: position t sees 0..t."""
        q, k, v = (_split(part, self.heads) for part in self.in_proj(x_BTD).chunk(3, dim=-1))
        mask = None if mask_BS is None else mask_BS[:, None, None, :]
        dropout_p = self.dropout if self.training else 0.0
        return self.out_proj(attend(q, k, v, mask=mask, dropout_p=dropout_p, causal=causal))  # type: ignore[no-any-return]

    def step(self, x_B1D: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One new position; past holds the (B, H, t, D/H) keys and values before it."""
        q, k, v = (_split(part, self.heads) for part in self.in_proj(x_B1D).chunk(3, dim=-1))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        return self.out_proj(attend(q, k, v)), (k, v)


class CrossAttention(nn.Module):
    """Multi-head attention of the decoder to the encoder's states; kv_proj holds the rows of k and v."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.attention_dropout
        self.q_proj = nn.Linear(config.width, config.width)
        self.kv_proj = nn.Linear(config.width, 2 * config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def keys_values(self, states_BSD: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (_split(part, self.heads) for part in self.kv_proj(states_BSD).chunk(2, dim=-1))
        return k, v

    def forward(self, x_NTD: Tensor, keys_values: tuple[Tensor, Tensor], mask_BS: Tensor) -> Tensor:
        """N = B, or K adjacent rows of each sentence: its K * T queries then meet its keys in one product."""
        q_NTD = self.q_proj(x_NTD)
        q = _split(q_NTD.reshape(mask_BS.shape[0], -1, q_NTD.shape[2]), self.heads)
        dropout_p = self.dropout if self.training else 0.0
        found = attend(q, *keys_values, mask=mask_BS[:, None, None, :], dropout_p=dropout_p)
        return self.out_proj(found.view_as(q_NTD))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.expand = nn.Linear(config.width, config.ffn_width)
        self.contract = nn.Linear(config.ffn_width, config.width)
        self.activation = F.relu if config.activation == "relu" else F.gelu
        self.dropout = config.activation_dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(dropout(self.activation(self.expand(x)), self.dropout, self.training))  # type: ignore[no-any-return]


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each in a residual sum with a layer norm after (post) or before (pre)."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.pre, self.dropout = config.norm == "pre", config.dropout
        self.self_attention = SelfAttention(config)
        self.self_attention_norm = nn.LayerNorm(config.width, eps=config.norm_epsilon)
        self.ffn = FeedForward(config)
        self.ffn_norm = nn.LayerNorm(config.width, eps=config.norm_epsilon)

    def forward(self, x: Tensor, mask_BS: Tensor) -> Tensor:
        h = self.self_attention(self.self_attention_norm(x) if self.pre else x, mask_BS=mask_BS)
        x = self._add(x, h, self.self_attention_norm)
        h = self.ffn(self.ffn_norm(x) if self.pre else x)
        return self._add(x, h, self.ffn_norm)

    def _add(self, x: Tensor, h: Tensor, norm: nn.LayerNorm) -> Tensor:
        x = x + dropout(h, self.dropout, self.training)
        return x if self.pre else norm(x)


class DecoderLayer(EncoderLayer):
    """An encoder layer with attention to the encoder's states between its two halves."""

    def __init__(self, config: Architecture) -> None:
        super().__init__(config)
        self.cross_attention = CrossAttention(config)
        self.cross_attention_norm = nn.LayerNorm(config.width, eps=config.norm_epsilon)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        states_BSD: Tensor,
        source_mask_BS: Tensor,
        target_mask_BT: Tensor | None,
        keys_values: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """target_mask_BT: keys a bidirectional decoder may see; None = causal. keys_values: of states_BSD, if made
        ahead."""
        h = self.self_attention_norm(x) if self.pre else x
        h = self.self_attention(h, mask_BS=target_mask_BT, causal=target_mask_BT is None)
        x = self._add(x, h, self.self_attention_norm)
        keys_values = self.cross_attention.keys_values(states_BSD) if keys_values is None else keys_values
        return self._rest(x, keys_values, source_mask_BS)

    def step(
        self,
        x_B1D: Tensor,
        past: tuple[Tensor, Tensor] | None,
        keys_values: tuple[Tensor, Tensor],
        source_mask_BS: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One new position of a causal decoder; returns its output and the grown (keys, values)."""
        h, past = self.self_attention.step(self.self_attention_norm(x_B1D) if self.pre else x_B1D, past)
        x = self._add(x_B1D, h, self.self_attention_norm)
        return self._rest(x, keys_values, source_mask_BS), past

    def _rest(self, x: Tensor, keys_values: tuple[Tensor, Tensor], source_mask_BS: Tensor) -> Tensor:
        h = self.cross_attention(self.cross_attention_norm(x) if self.pre else x, keys_values, source_mask_BS)
        x = self._add(x, h, self.cross_attention_norm)
        h = self.ffn(self.ffn_norm(x) if self.pre else x)
        return self._add(x, h, self.ffn_norm)


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, dropout_p: float = 0.0, causal: bool = False
) -> Tensor:
    """Scaled dot-product attention of (B, H, T, D/H) heads, merged to (B, T, D).

    The CPU's fused bf16 backward takes three to five times as long as the plain products at these lengths
    (benchmarks/NOTES.md), so a bf16 CPU call that needs a gradient goes to the plain ones.
    """
    plain = q.dtype == torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled()
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        out: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=causal)
    return _merge(out)


def _merge(x_BHTd: Tensor) -> Tensor:
    return x_BHTd.transpose(1, 2).flatten(2)


def _split(x_BTD: Tensor, heads: int) -> Tensor:
    heads_BTHd: Tensor = x_BTD.unflatten(-1, (heads, -1))
    return heads_BTHd.transpose(1, 2)
