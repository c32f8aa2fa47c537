"""LSTM layers for networks that are trained, frozen, sharded and padded.

B sentences, T positions, W units of one direction, D width of the input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from engine_fast.errors import ConfigError
from engine_fast.models.dropout import dropout

State = tuple[Tensor, Tensor]
"""(hidden, cell), (layers, B, W) each."""


class LSTMLayer(nn.LSTM):
    """One layer in one or two directions: torch's own kernels, cuDNN's and oneDNN's among them.

    It stays in training mode whatever it is told: cuDNN refuses the backward pass of an RNN in eval mode, and a frozen
    teacher in eval mode must pass gradients on to its input. Training mode changes nothing else here, because the layer
    has no dropout of its own; `drop` between the layers follows the network's mode.
    """

    def __init__(self, inputs: int, width: int, *, bidirectional: bool = False) -> None:
        super().__init__(inputs, width, batch_first=True, bidirectional=bidirectional)

    def train(self, mode: bool = True) -> LSTMLayer:
        return super().train(True)

    def forward(  # type: ignore[override]
        self, x_BTD: Tensor, state: State | None = None, lengths_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs (B, T, W or 2 W), and the last hidden and cell states, (1 or 2, B, W).

        lengths_B (on the CPU): the positions of each sentence; the backward direction starts at its last one, the last
        states are those of its ends, and outputs behind it are 0. None: all T, or for one direction whatever follows.
        """
        # Tensors in, tensors out: ZeRO stage 3 watches a module's outputs, and cannot look into a packed sequence.
        if lengths_B is None:
            y_BTW, (hidden, cell) = super().forward(x_BTD, state)
            return y_BTW, hidden, cell
        packed = pack_padded_sequence(x_BTD, lengths_B, batch_first=True, enforce_sorted=False)
        packed, (hidden, cell) = super().forward(packed, state)
        y_BTW, _ = pad_packed_sequence(packed, batch_first=True, total_length=x_BTD.shape[1])
        return y_BTW, hidden, cell


class BiLSTM(nn.Module):
    """Layers in both directions over right-padded sequences, with dropout between them. Padding changes nothing."""

    def __init__(self, inputs: int, width: int, layers: int, *, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            LSTMLayer(2 * width if i else inputs, width, bidirectional=True) for i in range(layers)
        )
        self.dropout = dropout
        self.activation_checkpointing = False

    def forward(self, x_BTD: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """mask_BT: True at each sentence's positions, at least one, all in front.

        Returns: (B, T, 2W) outputs of the last layer, 0 where masked; and its hidden and cell states at the two ends,
        forward's last and backward's first, (B, 2W) each.
        """
        lengths_B = mask_BT.sum(1).cpu()
        hidden = cell = x_BTD
        for i, layer in enumerate(self.layers):
            x_BTD = dropout(x_BTD, self.dropout if i else 0.0, self.training)
            x_BTD, hidden, cell = run(layer, x_BTD, None, lengths_B, recompute=self.activation_checkpointing)
        return x_BTD, hidden.transpose(0, 1).flatten(1), cell.transpose(0, 1).flatten(1)


def run(module: Callable[..., Any], *args: Any, recompute: bool) -> Any:
    """module(*args), computed again in the backward pass if asked for."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(module, *args, use_reentrant=False)
    return module(*args)


def reset_lstm(layer: nn.LSTM) -> None:
    """Matrices ~ U(-1/sqrt(W), 1/sqrt(W)), biases 0, but for the forget gate's, which is 1 (Jozefowicz et al. 2015)."""
    bound = layer.hidden_size**-0.5
    for name, parameter in layer.named_parameters():
        if parameter.ndim > 1:
            nn.init.uniform_(parameter, -bound, bound)
        else:  # input, forget, cell, output gate
            nn.init.zeros_(parameter)
            if "bias_ih" in name:
                nn.init.ones_(parameter.data[layer.hidden_size : 2 * layer.hidden_size])


def refuse_to_compile(kind: str) -> None:
    """LSTM layers are vendor kernels that torch.compile does not enter."""
    raise ConfigError(
        f"compile = true with architecture.kind = {kind!r}: expected false, because torch.compile leaves LSTM layers "
        "as they are. Set compile (of a teacher: engine.teacher_compile) to false."
    )
