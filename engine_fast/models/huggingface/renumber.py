"""A network's tables in the order of our ids, once, at import: from then on it speaks them, and its search as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine_fast.data.symbols import BOS, EOS, MASK, PAD
from engine_fast.errors import CheckpointError, VocabularyError
from engine_fast.models.huggingface.network import head_bias

LACKING = -1
"""In an order of rows: the network has no such symbol."""
IMPOSSIBLE = -1e3
"""The logit of a symbol that the network lacks. Beside logits of up to hundreds its probability is 0 in every dtype,
exactly; float16 holds it; and it is finite, and no lower than it need be: a student that has given such a symbol the
share q pays 1000 q nats, and the 1e-6 that label smoothing leaves there must not outweigh what the teacher says."""

_SINGLE = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "sep_token_id")
_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_UNREADABLE = ("force_words_ids", "sequence_bias", "forced_decoder_ids")


def renumber(network: Any, source: Sequence[int], target: Sequence[int], *, prompt: Sequence[int]) -> None:
    """Reorder, in place, both input tables, the head and its bias, and every id in the two configurations.

    source, target: row i of a table becomes row source[i] (target[i]) of the present one; LACKING makes a row of
    zeros whose logit is IMPOSSIBLE. prompt: what the decoder reads before the first word, in our ids.
    Raises CheckpointError for settings of generation that hold ids in a form unknown here, VocabularyError for tables
    that are shared by sides which number their pieces differently.
    """
    output = network.get_output_embeddings()
    head_bias(network, output.weight.shape[0])
    orders: dict[int, tuple[nn.Parameter, Sequence[int]]] = {}
    for weight, order in (
        (network.get_encoder().get_input_embeddings().weight, source),
        (network.get_decoder().get_input_embeddings().weight, target),
        (output.weight, target),
    ):
        if list(orders.get(id(weight), (weight, order))[1]) != list(order):
            raise VocabularyError("both sides share one table of embeddings, but number their pieces differently.")
        orders[id(weight)] = weight, order
    fresh = {key: nn.Parameter(_rows(weight.detach(), order)) for key, (weight, order) in orders.items()}
    for module in network.modules():
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in fresh:
            module.weight = fresh[id(weight)]
            if isinstance(module, nn.Embedding):
                module.num_embeddings = len(module.weight)
                module.padding_idx = None if module.padding_idx is None else PAD
            elif isinstance(module, nn.Linear):
                module.out_features = len(module.weight)
    final = getattr(network, "final_logits_bias", None)
    if final is not None:
        network.register_buffer("final_logits_bias", _rows(final[0], target, IMPOSSIBLE)[None])
        if output.bias is not None:
            output.bias = nn.Parameter(_rows(output.bias.detach(), target))
    else:
        output.bias = nn.Parameter(_rows(output.bias.detach(), target, IMPOSSIBLE))
    network.config.vocab_size = len(source)
    if getattr(network.config, "decoder_vocab_size", None) is not None:
        network.config.decoder_vocab_size = len(target)
    ours = {row: number for number, row in enumerate(target) if row != LACKING}
    for settings in (network.config, network.generation_config):
        _renumber_settings(settings, ours)
        settings.decoder_start_token_id = prompt[0]
    generation = network.generation_config
    # What follows the start symbol is fed to the search, so that it need not be forced.
    generation.forced_bos_token_id = None
    generation.suppress_tokens = sorted({*(generation.suppress_tokens or ()), BOS, PAD, MASK})


def _rows(rows: Tensor, order: Sequence[int], lacking: float = 0.0) -> Tensor:
    index = torch.tensor(order)
    chosen = rows[index.clamp(min=0)]
    chosen[index == LACKING] = lacking
    return chosen


def _renumber_settings(settings: Any, ours: dict[int, int]) -> None:
    for name in _UNREADABLE:
        if getattr(settings, name, None):
            raise CheckpointError(
                f"its generation configuration sets {name}, expected it unused: its ids cannot be carried over."
            )

    def number(row: int) -> int:
        if row not in ours:
            raise VocabularyError(f"its configuration names id {row}, but its table has {len(ours)} rows.")
        return ours[row]

    for name in _SINGLE:
        row = getattr(settings, name, None)
        if row is not None:
            setattr(settings, name, number(row) if isinstance(row, int) else [number(one) for one in row])
    for name in _LISTS:
        rows = getattr(settings, name, None)
        if rows:
            setattr(settings, name, [number(row) for row in rows])
    if words := getattr(settings, "bad_words_ids", None):
        settings.bad_words_ids = [[number(row) for row in word] for word in words]
    settings.pad_token_id, settings.eos_token_id = PAD, EOS  # our sentences end in nothing else
