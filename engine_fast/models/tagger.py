"""The BiLSTM tagger: the paper's smaller inference network, and its baseline.

B sentences, S source positions, T target slots, V vocabulary, L length classes, E embedding width, W units of one
direction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from engine_fast.config import TaggerArchitecture
from engine_fast.data.symbols import PAD
from engine_fast.models.cmlm import LengthTable
from engine_fast.models.dropout import dropout
from engine_fast.models.protocols import Student, Through
from engine_fast.models.recurrent import BiLSTM, refuse_to_compile, reset_lstm
from engine_fast.models.stacks import Head, Memory, Table, require_positions


def stretch(source_lengths_B: Tensor, target_lengths_B: Tensor, num_slots: int) -> Tensor:
    """(B, T) source position that each slot reads: slot t of n, over s source tokens, reads round(t (s-1) / (n-1)).

    The uniform copy of Gu et al. (2018, section 3.2), end symbols counted: the first slot reads the first token, the
    last one the end symbol, also where it is the only one; halves are rounded up. Slots behind n read position 0.
    """
    last_B1, steps_B1 = (source_lengths_B - 1)[:, None], (target_lengths_B - 1)[:, None]
    slots_T = torch.arange(num_slots, device=source_lengths_B.device)
    divisor_B1 = (2 * steps_B1).clamp_min(1)
    position_BT = (2 * slots_T * last_B1 + steps_B1) // divisor_B1
    position_BT = torch.where(steps_B1 > 0, position_BT, last_B1)
    return position_BT.masked_fill(slots_T > steps_B1, 0)


class SourceLength(nn.Embedding):
    """(L + 1, E): one row per number of source tokens. Used through forward only, where a sharded weight is whole."""


class Tagger(Student):
    """The BiLSTM inference network of the paper (section 4.2): each target slot is a copy of a source word, a BiLSTM
    reads the slots, and a linear layer names the word of each.

    Slot t of a sentence with n slots reads the embedding of source position round(t (s-1) / (n-1)), see `stretch`;
    the BiLSTM runs over the n slots, so that slots which copy the same word can still differ. The length is classified
    by the mean source embedding plus a learned row for the number s of source tokens, against a length table like the
    CMLM's. Slots do not read the words of other slots: there is nothing to refine.
    """

    kind = "tagger"
    architecture: TaggerArchitecture
    refines = False

    def __init__(self, architecture: TaggerArchitecture, source_size: int, target_size: int) -> None:
        super().__init__()
        self.architecture, self.source_size, self.target_size = architecture, source_size, target_size
        width, positions = architecture.embedding_width, architecture.max_positions
        self.embedding = Table(source_size, width)
        self.layers = BiLSTM(width, architecture.width, architecture.layers, dropout=architecture.dropout)
        self.output = Head(2 * architecture.width, target_size)
        self.length_embedding = LengthTable(positions, width, width**-0.5)
        self.source_length = SourceLength(positions + 1, width)
        self.reset_parameters()

    @property
    def activation_checkpointing(self) -> bool:
        """Whether every layer is recomputed in the backward pass."""
        return self.layers.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        self.layers.activation_checkpointing = on

    def encode(self, source_BS: Tensor) -> tuple[Memory, Tensor]:
        """The source embeddings, (B, S, E), and (B, L) length logits; class 0 is -inf."""
        require_positions(source_BS.shape[1], self.max_positions)
        mask_BS = source_BS != PAD
        memory = Memory(self.embedding(source_BS), mask_BS)
        lengths_B = mask_BS.sum(1)
        total_BE = (memory.states * mask_BS[:, :, None]).sum(1)
        guess_BE = total_BE / lengths_B[:, None].to(total_BE.dtype) + self.source_length(lengths_B)
        return memory, self.length_embedding(guess_BE)

    def decode(self, memory: Memory, tokens_BT: Tensor) -> Tensor:
        """(B, T, 2W) hidden states of the slots, which are where tokens_BT is not PAD, in front; 0 at the others.

        Nothing else of tokens_BT is read.
        """
        require_positions(tokens_BT.shape[1], self.max_positions)
        slots_BT = tokens_BT != PAD
        position_BT = stretch(memory.mask.sum(1), slots_BT.sum(1), tokens_BT.shape[1])
        copied_BTE = memory.states.gather(1, position_BT[:, :, None].expand(-1, -1, memory.states.shape[2]))
        hidden_BTW, _, _ = self.layers(dropout(copied_BTE, self.architecture.dropout, self.training), slots_BT)
        return dropout(hidden_BTW, self.architecture.dropout, self.training)

    def project(self, hidden: Tensor) -> Tensor:
        """(..., 2W) hidden states -> (..., V) logits."""
        return self.output(hidden)  # type: ignore[no-any-return]

    def project_through(self, hidden: Tensor, through: Through) -> Any:
        """through(hidden, weight, bias) of the head, where it is whole."""
        return self.output(hidden, through)

    def compile_stacks(self) -> None:
        refuse_to_compile(self.architecture.kind)

    def reset_parameters(self) -> None:
        """Layers as reset_lstm says; tables and head N(0, 1/width), PAD's row and biases 0."""
        for layer in self.layers.layers:
            assert isinstance(layer, nn.LSTM)
            reset_lstm(layer)
        for table in (self.embedding, self.output, self.length_embedding, self.source_length):
            assert isinstance(table.weight, Tensor)
            nn.init.normal_(table.weight, std=table.weight.shape[1] ** -0.5)
        nn.init.zeros_(self.output.bias)
        nn.init.zeros_(self.embedding.weight.data[PAD])
