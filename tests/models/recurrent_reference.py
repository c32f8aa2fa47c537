"""Recurrent networks one sentence, one position and one formula at a time, without nn.LSTM."""

from __future__ import annotations

import torch
from torch import Tensor

from engine_fast.models import Seq2Seq
from engine_fast.models.recurrent import BiLSTM


def cell(layer, x_D: Tensor, h_W: Tensor, c_W: Tensor, suffix: str = "") -> tuple[Tensor, Tensor]:
    """One step: i, f, o = sigmoid, g = tanh of W x + U h + b; c = f c + i g, h = o tanh(c)."""
    w, u, b, d = (getattr(layer, f"{name}_l0{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    i, f, g, o = (w @ x_D + b + u @ h_W + d).chunk(4)
    c_W = f.sigmoid() * c_W + i.sigmoid() * g.tanh()
    return o.sigmoid() * c_W.tanh(), c_W


def bilstm(network: BiLSTM, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (T, 2W) of one sentence, and hidden and cell at the two ends, (2W,) each."""
    hidden = cell_state = x_TD
    for layer in network.layers:
        directions = []
        for suffix, order in (("", range(len(x_TD))), ("_reverse", reversed(range(len(x_TD))))):
            h = c = x_TD.new_zeros(layer.hidden_size)
            outputs: dict[int, Tensor] = {}
            for t in order:
                outputs[t] = h = (new := cell(layer, x_TD[t], h, c, suffix))[0]
                c = new[1]
            directions.append((torch.stack([outputs[t] for t in range(len(x_TD))]), h, c))
        x_TD, hidden, cell_state = (torch.cat(parts, dim=-1) for parts in zip(*directions, strict=True))
    return x_TD, hidden, cell_state


def luong(model: Seq2Seq, source_S: Tensor, inputs_T: Tensor) -> Tensor:
    """(T, V) logits of one sentence without padding (Luong et al. 2015: general attention, input feeding)."""
    config, decoder = model.architecture, model.decoder
    states_SW, hidden, cell_state = bilstm(model.encoder.layers, model.encoder.embedding.weight[source_S])
    shape = config.decoder_layers, config.decoder_width
    h = list(model.encoder.bridge_hidden(hidden).tanh().view(shape))
    c = list(model.encoder.bridge_cell(cell_state).view(shape))
    attentional = torch.zeros(config.decoder_width, dtype=states_SW.dtype)
    logits = []
    for word in inputs_T.tolist():
        x = decoder.embedding.weight[word]
        if config.input_feeding:
            x = torch.cat([x, attentional])
        for i, layer in enumerate(decoder.layers):
            h[i], c[i] = cell(layer, x, h[i], c[i])
            x = h[i]
        scores = torch.stack([x @ decoder.attention.keys.weight @ state for state in states_SW])
        weights = scores.exp() / scores.exp().sum()
        context = sum(weight * state for weight, state in zip(weights, states_SW, strict=True))
        attentional = (decoder.attention.combine.weight @ torch.cat([context, x])).tanh()
        logits.append(model.output.weight @ attentional)
    return torch.stack(logits)
