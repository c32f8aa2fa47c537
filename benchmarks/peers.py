"""The three training steps written the way the authors' released code computes them.

Written anew from the facts of that code: attention as explicit products, torch's dropout, the teacher's weights
not frozen, padded rows kept through every vocabulary product, log-softmax and full distributions of every position
held as tensors, hard choices as one-hot matrices, the CMLM's layer norm and GELU spelled out term by term. They read
the weights of our models, so both ways compute one loss.

`layers=OURS` takes our attention, dropout and stacks instead, so that what the vocabulary and the frozen teacher give
is seen by itself.

B sentences, S source positions, T target positions, V vocabulary, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_fast.data.batching import Batch
from engine_fast.data.symbols import EOS, MASK, PAD
from engine_fast.models import CMLM, Memory, Transformer, shift_right
from engine_fast.models.layers import CrossAttention, SelfAttention
from engine_fast.models.stacks import Stack

SMOOTHING = 0.1


@dataclass(frozen=True, slots=True)
class Layers:
    """How the two stacks are computed."""

    encode: Callable[..., tuple[Tensor, Tensor]]
    """(model, source (B, S), prefix (D,) or None) -> states (B, S, D), mask (B, S)."""
    decode: Callable[..., Tensor]
    """(model, states, mask, unscaled embeddings (B, T, D), target mask or None = causal) -> (B, T, D)."""


def teacher_step(teacher: Transformer, batch: Batch, *, layers: Layers) -> Tensor:
    """Label-smoothed cross-entropy, summed over real targets."""
    memory_BSD, mask_BS = layers.encode(teacher, batch.source)
    hidden_BTD = layers.decode(teacher, memory_BSD, mask_BS, embed(teacher.decoder, shift_right(batch.target)))
    log_p_BTV = teacher.project(hidden_BTD).float().log_softmax(-1)
    return smoothed(log_p_BTV, batch.target, batch.target != PAD)


def cmlm_step(student: CMLM, batch: Batch, masked_BT: Tensor, *, layers: Layers) -> Tensor:
    """Label-smoothed cross-entropy of the masked targets plus the length loss."""
    memory_BSD, mask_BS, length_loss = encode_with_length(student, batch, layers)
    tokens_BT = batch.target.masked_fill(masked_BT, MASK)
    embedded_BTD = embed(student.decoder, tokens_BT)
    hidden_BTD = layers.decode(student, memory_BSD, mask_BS, embedded_BTD, tokens_BT != PAD)
    log_p_BTV = student.project(hidden_BTD).float().log_softmax(-1)
    return smoothed(log_p_BTV, batch.target, masked_BT) + length_loss


def engine_step(student: CMLM, teacher: Transformer, batch: Batch, *, layers: Layers) -> Tensor:
    """Relaxed energy with O1 = SX and O2 = ST plus the length loss."""
    real_BT = batch.target != PAD
    memory_BSD, mask_BS, length_loss = encode_with_length(student, batch, layers)
    embedded_BTD = embed(student.decoder, torch.where(real_BT, MASK, PAD))
    hidden_BTD = layers.decode(student, memory_BSD, mask_BS, embedded_BTD, real_BT)
    log_q_BTV = student.project(hidden_BTD).float().log_softmax(-1)

    read_BTV = log_q_BTV.softmax(-1)
    soft_BTV = log_q_BTV.softmax(-1)
    hard_BTV = F.one_hot(log_q_BTV.argmax(-1), log_q_BTV.shape[-1]).to(log_q_BTV.dtype)
    ask_BTV = hard_BTV - soft_BTV.detach() + soft_BTV
    gold_BTV = F.one_hot(batch.target, log_q_BTV.shape[-1]).to(log_q_BTV.dtype)
    inner_BT = real_BT & (batch.target != EOS)
    ask_BTV = torch.where(inner_BT[..., None], ask_BTV, gold_BTV)

    table_VD = teacher.embedding_table
    mixed_BTD = read_BTV.to(table_VD.dtype) @ table_VD
    start_B1D = table_VD[EOS].expand(len(mixed_BTD), 1, -1)
    fed_BTD = torch.cat([start_B1D, mixed_BTD[:, :-1]], dim=1)
    teacher_memory_BSD, teacher_mask_BS = layers.encode(teacher, batch.source)
    asked_BTD = layers.decode(teacher, teacher_memory_BSD, teacher_mask_BS, fed_BTD)
    log_p_BTV = teacher.project(asked_BTD).float().log_softmax(-1)
    energy_BT = -(ask_BTV * log_p_BTV).sum(-1)
    return energy_BT.masked_fill(~real_BT, 0.0).sum() + length_loss


def smoothed(log_p_BTV: Tensor, target_BT: Tensor, scored_BT: Tensor) -> Tensor:
    nll_BT = -log_p_BTV.gather(-1, target_BT[..., None]).squeeze(-1)
    smooth_BT = -log_p_BTV.sum(-1)
    nll = nll_BT.masked_fill(~scored_BT, 0.0).sum()
    smooth = smooth_BT.masked_fill(~scored_BT, 0.0).sum()
    return (1 - SMOOTHING) * nll + SMOOTHING / log_p_BTV.shape[-1] * smooth


# ---------------------------------------------------------------- the networks


def encode_with_length(student: CMLM, batch: Batch, layers: Layers) -> tuple[Tensor, Tensor, Tensor]:
    """Memory (B, S, D), its mask, and the summed cross-entropy of the target lengths."""
    states, mask = layers.encode(student, batch.source, student.length_embedding.weight[0])
    logits_BL = (states[:, 0] @ student.length_embedding.weight.t()).float()
    logits_BL[:, 0] += float("-inf")
    length_loss = F.nll_loss(logits_BL.log_softmax(-1), (batch.target != PAD).sum(-1), reduction="sum")
    return states[:, 1:], mask[:, 1:], length_loss


def encode(model: Any, source_BS: Tensor, prefix_D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    mask = source_BS != PAD
    x = place(model.encoder, embed(model.encoder, source_BS))
    if prefix_D is not None:
        x = torch.cat([prefix_D.expand(len(x), 1, -1), x], dim=1)
        mask = F.pad(mask, (1, 0), value=True)
    x = drop(model.encoder, x)
    for layer in model.encoder.layers:
        h = self_attention(layer.self_attention, x, mask)
        x = normalise(model, layer.self_attention_norm, x + drop(model.encoder, h))
        x = normalise(model, layer.ffn_norm, x + drop(model.encoder, feed_forward(model, layer.ffn, x)))
    return x, mask


def decode(
    model: Any, memory_BSD: Tensor, mask_BS: Tensor, embedded_BTD: Tensor, target_mask_BT: Tensor | None = None
) -> Tensor:
    x = drop(model.decoder, place(model.decoder, embedded_BTD))
    for layer in model.decoder.layers:
        h = self_attention(layer.self_attention, x, target_mask_BT, causal=target_mask_BT is None)
        x = normalise(model, layer.self_attention_norm, x + drop(model.decoder, h))
        h = cross_attention(layer.cross_attention, x, memory_BSD, mask_BS)
        x = normalise(model, layer.cross_attention_norm, x + drop(model.decoder, h))
        x = normalise(model, layer.ffn_norm, x + drop(model.decoder, feed_forward(model, layer.ffn, x)))
    return x


def embed(stack: Stack, ids_BT: Tensor) -> Tensor:
    return F.embedding(ids_BT, stack.embedding.weight)


def place(stack: Stack, embedded_BTD: Tensor) -> Tensor:
    placed: Tensor = embedded_BTD * stack.scale + stack.positions(0, embedded_BTD.shape[1])
    return placed


def drop(stack: Stack, x: Tensor) -> Tensor:
    return F.dropout(x, stack.config.dropout, stack.training)


def normalise(model: Any, norm: nn.LayerNorm, x: Tensor) -> Tensor:
    if model.kind == "transformer":
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return norm.weight * ((x - mean) / torch.sqrt(variance + norm.eps)) + norm.bias


def feed_forward(model: Any, ffn: Any, x: Tensor) -> Tensor:
    expanded = F.linear(x, ffn.expand.weight, ffn.expand.bias)
    if model.kind == "transformer":
        expanded = F.relu(expanded)
    else:
        expanded = expanded * 0.5 * (1.0 + torch.erf(expanded / math.sqrt(2.0)))
    return F.linear(expanded, ffn.contract.weight, ffn.contract.bias)


def self_attention(part: SelfAttention, x: Tensor, mask_BS: Tensor | None, *, causal: bool = False) -> Tensor:
    q, k, v = F.linear(x, part.in_proj.weight, part.in_proj.bias).chunk(3, dim=-1)
    return attend(part, q, k, v, mask_BS, causal=causal)


def cross_attention(part: CrossAttention, x: Tensor, memory_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    k, v = F.linear(memory_BSD, part.kv_proj.weight, part.kv_proj.bias).chunk(2, dim=-1)
    return attend(part, F.linear(x, part.q_proj.weight, part.q_proj.bias), k, v, mask_BS)


def attend(part: Any, q: Tensor, k: Tensor, v: Tensor, mask_BS: Tensor | None, *, causal: bool = False) -> Tensor:
    q, k, v = (x.unflatten(-1, (part.heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores_BHTS = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if causal:
        future = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores_BHTS = scores_BHTS.masked_fill(future, float("-inf"))
    if mask_BS is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask_BS[:, None, None, :], float("-inf"))
    weights_BHTS = scores_BHTS.float().softmax(-1).to(q.dtype)
    out_BTD = (weights_BHTS @ v).transpose(1, 2).flatten(2)
    return F.linear(out_BTD, part.out_proj.weight, part.out_proj.bias)


def our_encode(model: Any, source_BS: Tensor, prefix_D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    memory = model.encoder(source_BS, prefix_D)
    return memory.states, memory.mask


def our_decode(
    model: Any, memory_BSD: Tensor, mask_BS: Tensor, embedded_BTD: Tensor, target_mask_BT: Tensor | None = None
) -> Tensor:
    hidden: Tensor = model.decoder(Memory(memory_BSD, mask_BS), embedded_BTD, target_mask_BT)
    return hidden


PLAIN = Layers(encode, decode)
OURS = Layers(our_encode, our_decode)
