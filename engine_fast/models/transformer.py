"""The autoregressive teacher.

B sentences, S source positions, T target positions, V vocabulary, D width.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from engine_fast.models.layers import DecoderLayer
from engine_fast.models.protocols import Teacher
from engine_fast.models.stacks import EncoderDecoder, Memory

KeysValues = tuple[Tensor, Tensor]
AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module)


class Cache:
    """Keys and values of a decoder that grows one position at a time."""

    def __init__(self, memory: Memory, cross: list[KeysValues]) -> None:
        self.mask = memory.mask
        self.cross = cross
        self.past: list[KeysValues | None] = [None] * len(cross)
        self.length = 0

    def reorder(self, indices_B: Tensor, *, same_sentences: bool = False) -> None:
        """Keep the rows `indices_B` (may repeat or drop rows).

        same_sentences: every new row continues a hypothesis of the sentence that stood in that row, so what
        depends on the source alone stays as it is.
        """
        self.past = [
            None if p is None else (p[0].index_select(0, indices_B), p[1].index_select(0, indices_B)) for p in self.past
        ]
        if not same_sentences:
            self.mask = self.mask.index_select(0, indices_B)
            self.cross = [(k.index_select(0, indices_B), v.index_select(0, indices_B)) for k, v in self.cross]


class Transformer(EncoderDecoder, Teacher):
    """Autoregressive encoder-decoder (Vaswani et al. 2017); ENGINE's teacher, or any baseline.

    Sources and targets are ids that end in EOS, right padded with PAD. Right padding needs no target mask: a
    causal position sees only what stands before it.
    """

    kind = "transformer"

    def encode(self, source_BS: Tensor) -> Memory:
        return self.encoder(source_BS)  # type: ignore[no-any-return]

    def decode(self, memory: Memory, decoder_input_BT: Tensor) -> Tensor:
        """(B, T, D) hidden states; position t has read decoder_input[0..t]."""
        return self.forward_embedded(memory, self.embed(decoder_input_BT))

    def forward_embedded(self, memory: Memory, embedded_BTD: Tensor) -> Tensor:
        """decode() of relaxed inputs: rows of `embedding_table`, or mixtures of them; scaled and positioned here.

        Gradients reach embedded_BTD also when the weights are frozen.
        """
        return self.decoder(memory, embedded_BTD)  # type: ignore[no-any-return]

    def forward(self, source_BS: Tensor, decoder_input_BT: Tensor) -> Tensor:
        """(B, T, V) logits under teacher forcing."""
        return self.project(self.decode(self.encode(source_BS), decoder_input_BT))

    def start_cache(self, memory: Memory) -> Cache:
        return Cache(memory, [self._layer(i).cross_attention.keys_values(memory.states) for i in range(self._depth)])

    def step(self, tokens_B: Tensor, cache: Cache) -> Tensor:
        """(B, V) logits of the next token after `tokens_B` at position cache.length; the cache grows by one."""
        x = self.decoder.place(self.embed(tokens_B[:, None]), start=cache.length)
        for i in range(self._depth):
            x, cache.past[i] = self._layer(i).step(x, cache.past[i], cache.cross[i], cache.mask)
        cache.length += 1
        return self.project(self.decoder.final_norm(x[:, 0]))

    @property
    def _depth(self) -> int:
        return len(self.decoder.layers)

    def _layer(self, i: int) -> DecoderLayer:
        layer = self.decoder.layers[i]
        assert isinstance(layer, DecoderLayer)
        return layer


def freeze(model: AnyNetwork, *, dtype: torch.dtype | None = None, dropout: bool = False) -> AnyNetwork:
    """The model with no weight gradients, in `dtype`, in eval mode unless dropout is asked for. In place."""
    model.requires_grad_(False)
    model.train(dropout)
    return model if dtype is None else model.to(dtype)
