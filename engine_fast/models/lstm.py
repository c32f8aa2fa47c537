"""The recurrent teacher: a sequence-to-sequence LSTM with Luong's attention.

B sentences, S source positions, T target positions, V vocabulary, E embedding width, W encoder units of one direction,
D decoder width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine_fast.config import LSTMArchitecture
from engine_fast.data.symbols import PAD
from engine_fast.models.dropout import dropout
from engine_fast.models.protocols import Teacher, Through
from engine_fast.models.recurrent import BiLSTM, LSTMLayer, State, refuse_to_compile, reset_lstm, run
from engine_fast.models.stacks import Head, Table, require_positions


@dataclass(frozen=True)  # no slots: ZeRO stage 3 looks for the tensors in vars(output)
class LSTMMemory:
    """What the decoder starts from and attends to."""

    states: Tensor
    """(B, S, 2W) encoder outputs."""
    mask: Tensor
    """(B, S) bool, True at real tokens."""
    keys: Tensor
    """(B, S, D): states times the attention's matrix, made once for all positions of the decoder."""
    hidden: Tensor
    """(layers, B, D): where the decoder starts."""
    cell: Tensor
    """(layers, B, D)."""

    def select(self, indices_B: Tensor) -> LSTMMemory:
        """The rows `indices_B`, which may repeat or drop sentences."""
        return LSTMMemory(
            self.states.index_select(0, indices_B),
            self.mask.index_select(0, indices_B),
            self.keys.index_select(0, indices_B),
            self.hidden.index_select(1, indices_B),
            self.cell.index_select(1, indices_B),
        )


class LSTMCache:
    """The state of a decoder that grows one position at a time."""

    def __init__(self, memory: LSTMMemory) -> None:
        self.memory = memory
        self.hidden, self.cell = memory.hidden, memory.cell
        self.attentional = memory.hidden.new_zeros(memory.hidden.shape[1:])
        """(B, D): of the position before."""
        self.length = 0

    def reorder(self, indices_B: Tensor, *, same_sentences: bool = False) -> None:
        """Keep the rows `indices_B` (may repeat or drop rows); see protocols.Cache."""
        self.hidden, self.cell = self.hidden.index_select(1, indices_B), self.cell.index_select(1, indices_B)
        self.attentional = self.attentional.index_select(0, indices_B)
        if not same_sentences:
            self.memory = self.memory.select(indices_B)


class LSTMEncoder(nn.Module):
    """Embedding and BiLSTM; the states at its two ends, through a linear map each, are where the decoder starts."""

    def __init__(self, config: LSTMArchitecture, vocabulary_size: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = Table(vocabulary_size, config.embedding_width)
        self.layers = BiLSTM(
            config.embedding_width, config.encoder_width, config.encoder_layers, dropout=config.dropout
        )
        ends, starts = 2 * config.encoder_width, config.decoder_layers * config.decoder_width
        self.bridge_hidden = nn.Linear(ends, starts)
        self.bridge_cell = nn.Linear(ends, starts)

    def forward(self, source_BS: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States (B, S, 2W), mask (B, S), and the decoder's first hidden and cell states (layers, B, D):
        tanh(A [h_forward; h_backward] + a) and C [c_forward; c_backward] + c, of the last layer's ends."""
        require_positions(source_BS.shape[1], self.config.max_positions)
        mask_BS = source_BS != PAD
        x = dropout(self.embedding(source_BS), self.config.dropout, self.training)
        states_BSW, hidden, cell = self.layers(x, mask_BS)
        shape = (self.config.decoder_layers, self.config.decoder_width)
        hidden = self.bridge_hidden(hidden).tanh().unflatten(-1, shape).transpose(0, 1).contiguous()
        cell = self.bridge_cell(cell).unflatten(-1, shape).transpose(0, 1).contiguous()
        return states_BSW, mask_BS, hidden, cell


class LuongAttention(nn.Module):
    """The "general" attention of Luong et al. (2015), section 3.1.

    weights a_s ~ exp(h' M state_s), context c = sum_s a_s state_s, attentional vector tanh(C [c; h]).
    """

    def __init__(self, config: LSTMArchitecture) -> None:
        super().__init__()
        states, width = 2 * config.encoder_width, config.decoder_width
        self.keys = nn.Linear(states, width, bias=False)
        self.combine = nn.Linear(states + width, width, bias=False)

    def forward(self, h_BTD: Tensor, states_BSW: Tensor, mask_BS: Tensor, keys_BSD: Tensor) -> Tensor:
        """(B, T, D) attentional vectors of the decoder's outputs. keys_BSD: self.keys(states)."""
        scores_BTS = torch.bmm(h_BTD, keys_BSD.transpose(1, 2)).masked_fill(~mask_BS[:, None], float("-inf"))
        context_BTW = torch.bmm(scores_BTS.softmax(-1), states_BSW)
        return self.combine(torch.cat([context_BTW, h_BTD], dim=-1)).tanh()  # type: ignore[no-any-return]


class LSTMDecoder(nn.Module):
    """LSTM layers and the attention above them; with input feeding the first layer also reads the attentional vector
    of the position before (zeros at first)."""

    def __init__(self, config: LSTMArchitecture, vocabulary_size: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = Table(vocabulary_size, config.embedding_width)
        width = config.decoder_width
        inputs = config.embedding_width + (width if config.input_feeding else 0)
        self.layers = nn.ModuleList(LSTMLayer(width if i else inputs, width) for i in range(config.decoder_layers))
        self.attention = LuongAttention(config)
        self.activation_checkpointing = False

    def forward(self, memory: LSTMMemory, embedded_BTE: Tensor) -> Tensor:
        """(B, T, D) attentional vectors."""
        require_positions(embedded_BTE.shape[1], self.config.max_positions)
        x_BTE = dropout(embedded_BTE, self.config.dropout, self.training)
        state = memory.hidden, memory.cell
        if not self.config.input_feeding:
            return self.block(memory, x_BTE, state)[0]
        fed_B1D = memory.hidden.new_zeros(x_BTE.shape[0], 1, self.config.decoder_width)
        outputs = []
        for x_B1E in x_BTE.split(1, dim=1):
            fed_B1D, state = self.block(memory, torch.cat([x_B1E, fed_B1D], dim=-1), state)
            outputs.append(fed_B1D)
        return torch.cat(outputs, dim=1)

    def block(self, memory: LSTMMemory, x_BTE: Tensor, state: State) -> tuple[Tensor, State]:
        """Some positions at once: their attentional vectors, and the state behind the last one."""
        hidden, cell = [], []
        for i, layer in enumerate(self.layers):
            x_BTE = dropout(x_BTE, self.config.dropout if i else 0.0, self.training)
            own = state[0][i : i + 1], state[1][i : i + 1]
            x_BTE, h, c = run(layer, x_BTE, own, recompute=self.activation_checkpointing)
            hidden.append(h)
            cell.append(c)
        seen = memory.states, memory.mask, memory.keys
        x_BTD = run(self.attention, x_BTE, *seen, recompute=self.activation_checkpointing)
        return dropout(x_BTD, self.config.dropout, self.training), (torch.cat(hidden), torch.cat(cell))


class Seq2Seq(Teacher):
    """The seq2seq energy of the paper (section 4.2): BiLSTM encoder, LSTM decoder, attention (Luong et al. 2015).

    Sources and targets are ids that end in EOS, right padded with PAD. The decoder starts from the encoder's end
    states. Without input feeding all its positions are computed in parallel; with it, one after another.
    """

    kind = "lstm"
    architecture: LSTMArchitecture

    def __init__(self, architecture: LSTMArchitecture, source_size: int, target_size: int) -> None:
        super().__init__()
        self.architecture, self.source_size, self.target_size = architecture, source_size, target_size
        self.encoder = LSTMEncoder(architecture, source_size)
        self.decoder = LSTMDecoder(architecture, target_size)
        self.output = Head(architecture.decoder_width, target_size, bias=False)
        self.shardable = not architecture.input_feeding  # then the decoder's layers are called once a position
        self.reset_parameters()

    @property
    def activation_checkpointing(self) -> bool:
        """Whether every layer is recomputed in the backward pass."""
        return self.decoder.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        self.encoder.layers.activation_checkpointing = self.decoder.activation_checkpointing = on

    def encode(self, source_BS: Tensor) -> LSTMMemory:
        states, mask, hidden, cell = self.encoder(source_BS)
        return LSTMMemory(states, mask, self.decoder.attention.keys(states), hidden, cell)

    def decode(self, memory: LSTMMemory, decoder_input_BT: Tensor) -> Tensor:
        """(B, T, D) attentional vectors; position t has read decoder_input[0..t]."""
        return self.forward_embedded(memory, self.embed(decoder_input_BT))

    def forward_embedded(self, memory: LSTMMemory, embedded_BTE: Tensor) -> Tensor:
        """decode() of relaxed inputs: rows of the input table, or mixtures of them.

        Gradients reach embedded_BTE also when the weights are frozen and in eval mode.
        """
        return self.decoder(memory, embedded_BTE)  # type: ignore[no-any-return]

    def forward(self, source_BS: Tensor, decoder_input_BT: Tensor) -> Tensor:
        """(B, T, V) logits under teacher forcing."""
        return self.project(self.decode(self.encode(source_BS), decoder_input_BT))

    def embed(self, ids: Tensor) -> Tensor:
        """(...,) ids -> (..., E) rows of the input table."""
        return self.decoder.embedding(ids)  # type: ignore[no-any-return]

    def embed_through(self, x: Tensor, through: Callable[[Tensor, Tensor], Any]) -> Any:
        """through(x, the (V, E) input table), where it is whole."""
        return self.decoder.embedding(x, through)

    def project(self, hidden: Tensor) -> Tensor:
        """(..., D) attentional vectors -> (..., V) logits."""
        return self.output(hidden)  # type: ignore[no-any-return]

    def project_through(self, hidden: Tensor, through: Through) -> Any:
        """through(hidden, weight, bias) of the head, where it is whole."""
        return self.output(hidden, through)

    def start_cache(self, memory: LSTMMemory) -> LSTMCache:
        return LSTMCache(memory)

    def step(self, tokens_B: Tensor, cache: LSTMCache) -> Tensor:
        """(B, V) logits of the token after `tokens_B`; the cache grows by one."""
        require_positions(cache.length + 1, self.max_positions)
        x_B1E = self.embed(tokens_B[:, None])
        if self.architecture.input_feeding:
            x_B1E = torch.cat([x_B1E, cache.attentional[:, None]], dim=-1)
        x_B1D, (cache.hidden, cache.cell) = self.decoder.block(cache.memory, x_B1E, (cache.hidden, cache.cell))
        cache.attentional = x_B1D[:, 0]
        cache.length += 1
        return self.project(cache.attentional)

    def compile_stacks(self) -> None:
        refuse_to_compile(self.architecture.kind)

    def reset_parameters(self) -> None:
        """Layers as reset_lstm says; tables and head N(0, 1/width), PAD rows 0; other matrices Xavier, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.LSTM):
                reset_lstm(module)
            elif isinstance(module, (Table, Head)):
                nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.encoder.embedding, self.decoder.embedding):
            nn.init.zeros_(table.weight.data[PAD])
