"""Tiny random models whose outputs vary: wide initial weights, double precision where order matters."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engine_fast.config import Architecture
from engine_fast.data.symbols import PAD
from engine_fast.data.vocabulary import DictionaryVocabulary
from engine_fast.models import CMLM, LoadedModel, Transformer, save_model

SHAPE = {"width": 16, "ffn_width": 32, "heads": 2, "encoder_layers": 2, "decoder_layers": 2, "max_positions": 24}


def widen(model: torch.nn.Module, seed: int, scale: float = 0.5) -> None:
    """Draw every matrix anew, large enough that the words differ from position to position."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def make_teacher(size: int = 12, seed: int = 0, scale: float = 0.5) -> Transformer:
    model = Transformer(Architecture(**SHAPE), size, size)
    widen(model, seed, scale)
    return model.double().eval()


def make_student(size: int = 12, seed: int = 0) -> CMLM:
    model = CMLM(Architecture(**SHAPE, positions="learned", activation="gelu"), size, size)
    widen(model, seed)
    return model.double().eval()


def pad(sentences: list[list[int]]) -> Tensor:
    width = max(map(len, sentences))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in sentences])


WORDS = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]


def make_vocabulary() -> DictionaryVocabulary:
    return DictionaryVocabulary(WORDS)


def load_tiny(model: Transformer | CMLM) -> LoadedModel:
    vocabulary = make_vocabulary()
    return LoadedModel(model, vocabulary, vocabulary, {})


def save_tiny(directory: Path, model: Transformer | CMLM) -> Path:
    vocabulary = make_vocabulary()
    save_model(directory, model.float(), vocabulary, vocabulary)
    return directory
