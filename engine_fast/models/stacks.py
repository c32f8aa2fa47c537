"""The encoder and decoder stacks, and what they share: embedding, positions, checkpointing.

B sentences, S source positions, T target positions, V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine_fast.config import Architecture
from engine_fast.data.symbols import PAD
from engine_fast.errors import DataError
from engine_fast.models.dropout import dropout
from engine_fast.models.layers import DecoderLayer, EncoderLayer, LearnedPositions, SinusoidalPositions
from engine_fast.models.protocols import Network, Through


@dataclass(frozen=True)  # no slots: ZeRO stage 3 looks for the tensors in vars(output)
class Memory:
    """What a decoder attends to."""

    states: Tensor
    """(B, S, D) encoder outputs."""
    mask: Tensor
    """(B, S) bool, True at real tokens."""
    keys_values: tuple[tuple[Tensor, Tensor], ...] = ()
    """Each decoder layer's (B, H, S, D/H) keys and values of the states, where they were made ahead; else nothing."""

    def select(self, indices_B: Tensor) -> Memory:
        """The rows `indices_B`, which may repeat or drop sentences."""
        return Memory(
            self.states.index_select(0, indices_B),
            self.mask.index_select(0, indices_B),
            tuple((k.index_select(0, indices_B), v.index_select(0, indices_B)) for k, v in self.keys_values),
        )


class Table(nn.Embedding):
    """Token embeddings, (V, D). A fused operator is called through it, as through Head."""

    def forward(self, ids: Tensor, through: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        """(...,) ids -> (..., D); or, given through, whatever through(ids, weight) makes of them."""
        return super().forward(ids) if through is None else through(ids, self.weight)


def require_positions(length: int, max_positions: int) -> None:
    """Raises DataError for a side longer than the network's positions."""
    if length > max_positions:
        raise DataError(
            f"a sentence of {length} tokens, end symbol included, exceeds the model's max_positions = {max_positions}. "
            "Filter or truncate it, or train with more positions."
        )


class Stack(nn.Module):
    """Token embedding, positions, layers, and the final norm that pre-norm needs."""

    layers: nn.ModuleList

    def __init__(self, config: Architecture, vocabulary_size: int, embedding: Table | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = Table(vocabulary_size, config.width) if embedding is None else embedding
        make = SinusoidalPositions if config.positions == "sinusoidal" else LearnedPositions
        self.positions = make(config.max_positions, config.width)
        self.scale = math.sqrt(config.width) if config.scale_embedding else 1.0
        self.final_norm = nn.LayerNorm(config.width, eps=config.norm_epsilon) if config.norm == "pre" else nn.Identity()
        self.activation_checkpointing = False

    def place(self, embedded_BTD: Tensor, start: int = 0) -> Tensor:
        """Scale unscaled embeddings and add positions start, start+1, ..."""
        length = embedded_BTD.shape[1]
        require_positions(start + length, self.config.max_positions)
        positions_TD: Tensor = self.positions(start, length)
        return embedded_BTD * self.scale + positions_TD.to(embedded_BTD.dtype)  # DeepSpeed casts no buffers

    def drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.config.dropout, self.training)

    def run(self, layer: Callable[..., Tensor], *args: Any) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False)  # type: ignore[no-any-return]
        return layer(*args)


class Encoder(Stack):
    def __init__(self, config: Architecture, vocabulary_size: int) -> None:
        super().__init__(config, vocabulary_size)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(self, source_BS: Tensor, prefix_D: Tensor | None = None) -> Memory:
        """source_BS: ids, right padded. prefix_D: a vector put in front of every sentence, without a position."""
        mask = source_BS != PAD
        x = self.place(self.embedding(source_BS))
        if prefix_D is not None:
            x = torch.cat([prefix_D.expand(x.shape[0], 1, -1), x], dim=1)
            mask = F.pad(mask, (1, 0), value=True)
        x = self.drop(x)
        for layer in self.layers:
            x = self.run(layer, x, mask)
        return Memory(self.final_norm(x), mask)


class Decoder(Stack):
    def __init__(self, config: Architecture, vocabulary_size: int, embedding: Table | None = None) -> None:
        super().__init__(config, vocabulary_size, embedding)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))

    def forward(self, memory: Memory, embedded_BTD: Tensor, target_mask_BT: Tensor | None = None) -> Tensor:
        """embedded_BTD: unscaled rows or mixtures of rows of the table; target_mask_BT None = causal.

        There may be several adjacent rows for each sentence of the memory.
        """
        x = self.drop(self.place(embedded_BTD))
        for i, layer in enumerate(self.layers):
            ahead = memory.keys_values[i] if memory.keys_values else None
            x = self.run(layer, x, memory.states, memory.mask, target_mask_BT, ahead)
        return self.final_norm(x)  # type: ignore[no-any-return]


class Head(nn.Linear):
    """The vocabulary's matrix, (V, D). A fused operator is called through it: under ZeRO-3 it is whole only in here."""

    def forward(self, hidden: Tensor, through: Through | None = None) -> Any:
        """(..., D) -> (..., V) logits; or whatever through(hidden, weight, bias) makes of them."""
        return super().forward(hidden) if through is None else through(hidden, self.weight, self.bias)


class EncoderDecoder(Network):
    """What both transformers share: two stacks, one output table, tying and initialisation."""

    architecture: Architecture

    def __init__(self, architecture: Architecture, source_size: int, target_size: int) -> None:
        super().__init__()
        self.architecture, self.source_size, self.target_size = architecture, source_size, target_size
        if architecture.tie == "all" and source_size != target_size:
            raise DataError(
                f"architecture.tie = 'all' needs one joint vocabulary, got {source_size} source and {target_size} "
                "target pieces. Set data.vocabulary.joint: true, or tie: decoder."
            )
        self.encoder = Encoder(architecture, source_size)
        self.decoder = Decoder(architecture, target_size, self.encoder.embedding if architecture.tie == "all" else None)
        self.output = Head(architecture.width, target_size, bias=False)
        if architecture.tie != "none":
            self.output.weight = self.decoder.embedding.weight
        self.reset_parameters()

    @property
    def activation_checkpointing(self) -> bool:
        """Whether every block is recomputed in the backward pass."""
        return self.decoder.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        self.encoder.activation_checkpointing = self.decoder.activation_checkpointing = on

    @property
    def embedding_table(self) -> Tensor:
        """(V, D): the decoder's input embeddings, unscaled."""
        return self.decoder.embedding.weight

    def share(self, memory: Memory, count: int) -> Memory:
        """The memory itself: rows of one sentence meet its keys and values together, see CrossAttention."""
        return memory

    def prepare(self, memory: Memory) -> Memory:
        """The memory with every decoder layer's keys and values."""
        layers = [layer for layer in self.decoder.layers if isinstance(layer, DecoderLayer)]
        made = tuple(layer.cross_attention.keys_values(memory.states) for layer in layers)
        return Memory(memory.states, memory.mask, made)

    def project(self, hidden: Tensor) -> Tensor:
        """(..., D) decoder outputs -> (..., V) logits."""
        return self.output(hidden)  # type: ignore[no-any-return]

    def project_through(self, hidden: Tensor, through: Through) -> Any:
        """through(hidden, the head's (V, D) weight, its bias), where they are whole."""
        return self.output(hidden, through)

    def embed(self, ids: Tensor) -> Tensor:
        """(...,) target ids -> (..., D) unscaled rows of the decoder's table."""
        return self.decoder.embedding(ids)  # type: ignore[no-any-return]

    def embed_through(self, x: Tensor, through: Callable[[Tensor, Tensor], Any]) -> Any:
        """through(x, the decoder's (V, D) input embeddings), where these are whole."""
        return self.decoder.embedding(x, through)

    def compile_stacks(self) -> None:
        """torch.compile encoder and decoder, for shapes that change; their calls alone, so that names stay."""
        for stack in (self.encoder, self.decoder):
            stack.compile(dynamic=True)

    def reset_parameters(self) -> None:
        """Xavier: linear weights Xavier uniform, embeddings N(0, 1/D). Normal: everything N(0, init_std). Biases 0."""
        config = self.architecture
        for name, parameter in self.named_parameters():
            if "norm" in name:
                continue
            if parameter.ndim < 2:
                nn.init.zeros_(parameter)
            elif config.init == "normal":
                nn.init.normal_(parameter, std=config.init_std)
            elif "embedding" in name or "positions" in name or name == "output.weight":
                nn.init.normal_(parameter, std=config.width**-0.5)
            elif "in_proj" in name or "kv_proj" in name:
                for block in parameter.data.chunk(3 if "in_proj" in name else 2):
                    nn.init.xavier_uniform_(block)
            else:
                nn.init.xavier_uniform_(parameter)
        for embedding in (self.encoder.embedding, self.decoder.embedding):
            nn.init.zeros_(embedding.weight.data[PAD])
