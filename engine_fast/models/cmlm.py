"""The conditional masked language model: a decoder that sees both sides and fills masks in parallel.

B sentences, S source positions, T target positions, V vocabulary, D width, L length classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine_fast.config import Architecture
from engine_fast.data.symbols import PAD
from engine_fast.models.protocols import Student
from engine_fast.models.stacks import EncoderDecoder, Memory


class LengthTable(nn.Module):
    """(L, D) length classes; row 0 is the length token. Used through forward only, where a sharded weight is whole."""

    def __init__(self, num_classes: int, width: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, width).normal_(std=std))

    def forward(self, states_BD: Tensor | None = None) -> Tensor:
        """The token (D,); or, given the encoder's states at the token, the (B, L) length logits, class 0 = -inf."""
        if states_BD is None:
            return self.weight[0]
        logits_BL = states_BD @ self.weight.t()
        forbidden = torch.arange(logits_BL.shape[1], device=logits_BL.device) == 0
        return logits_BL.masked_fill(forbidden, float("-inf"))


class CMLM(EncoderDecoder, Student):
    """CMLM (Ghazvininejad et al. 2019): ENGINE's inference network.

    A learned length token stands in front of the source; its encoder output, times the table of length classes
    (whose row 0 is the token itself), scores the target length, end symbol included.
    """

    kind = "cmlm"
    refines = True

    def __init__(self, architecture: Architecture, source_size: int, target_size: int) -> None:
        super().__init__(architecture, source_size, target_size)
        self.length_embedding = LengthTable(architecture.max_positions, architecture.width, architecture.init_std)

    def encode(self, source_BS: Tensor) -> tuple[Memory, Tensor]:
        """Memory without the length token, and (B, L) length logits; class 0 is -inf."""
        memory = self.encoder(source_BS, prefix_D=self.length_embedding())
        logits_BL = self.length_embedding(memory.states[:, 0])
        # Adjacent rows: of a slice F.linear makes a batched product, with a copy of the weights for each sentence.
        return Memory(memory.states[:, 1:].contiguous(), memory.mask[:, 1:]), logits_BL

    def decode(self, memory: Memory, tokens_BT: Tensor) -> Tensor:
        """(B, T, D) hidden states; every position sees all positions that are not PAD. There may be several adjacent
        rows for each sentence of the memory."""
        return self.decoder(memory, self.decoder.embedding(tokens_BT), tokens_BT != PAD)  # type: ignore[no-any-return]
