"""Small random models with a SentencePiece vocabulary, and what they are asked to translate."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch
from torch import Tensor

from engine_fast.config import Architecture
from engine_fast.data.subwords import train_sentencepiece
from engine_fast.data.symbols import BOS, EOS, MASK, PAD
from engine_fast.data.vocabulary import SentencePieceVocabulary
from engine_fast.models import CMLM, LoadedModel, Transformer
from tests.decoding.tiny import SHAPE, widen

_SYLLABLES = ["ka", "lo", "mi", "nu", "re", "so", "ti", "\u00fc", "va", "zet"]


def sentences(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    words = ["".join(draw.choices(_SYLLABLES, k=draw.randint(1, 3))) for _ in range(60)]
    return [" ".join(draw.choices(words, k=draw.randint(1, 7))) for _ in range(count)]


@cache
def vocabulary() -> SentencePieceVocabulary:
    return train_sentencepiece(sentences(200), kind="bpe", size=60)


def teacher(seed: int = 0, size: int | None = None, **architecture: Any) -> Transformer:
    size = len(vocabulary()) if size is None else size
    model = Transformer(Architecture(**(SHAPE | architecture)), size, size)
    widen(model, seed)
    model.eval().requires_grad_(False)
    model.output.weight[[BOS, PAD, MASK]] = 0  # nothing silent is the best word
    model.output.weight[EOS] = _ending(model)
    return model


def _ending(model: Transformer) -> Tensor:
    """(D,) A row for EOS with which most sentences end in the second half of the model's positions."""
    length = model.max_positions
    tokens_BT = torch.randint(5, model.target_size, (32, length), generator=torch.Generator().manual_seed(0))
    hidden_BTD = model.decode(model.encode(tokens_BT[:, :8] % model.source_size), tokens_BT)
    highest = model.project(hidden_BTD).amax(-1).median()
    row_D = hidden_BTD[:, length // 2 :].mean((0, 1)) - hidden_BTD[:, : length // 3].mean((0, 1))
    return row_D * highest / (hidden_BTD[:, length // 2 :] @ row_D).median()


def student(seed: int = 0, size: int | None = None, **architecture: Any) -> CMLM:
    size = len(vocabulary()) if size is None else size
    model = CMLM(Architecture(**(SHAPE | {"positions": "learned", "activation": "gelu"} | architecture)), size, size)
    widen(model, seed)
    return model.eval().requires_grad_(False)


def loaded(model: Transformer | CMLM, **card: Any) -> LoadedModel:
    return LoadedModel(model, vocabulary(), vocabulary(), card)
