"""What bench_translate races: models of the paper's size with random weights, or those of a finished run, in the form
that each engine reads.

Everybody writes the same number of tokens with random weights: the end symbol's row is zero, so no teacher chooses it
before its limit, and the student's lengths are TARGET, TARGET + 1, TARGET - 1 whatever it reads.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine_fast.config import Architecture
from engine_fast.data.prepared import Prepared
from engine_fast.data.symbols import EOS
from engine_fast.data.vocabulary import DictionaryVocabulary, Vocabulary
from engine_fast.inference.ctranslate2 import export_ctranslate2
from engine_fast.inference.onnx import export_onnx, trace_programs
from engine_fast.models import CMLM, LoadedModel, Student, Teacher, Transformer, load_model, save_model
from engine_fast.models.store import stage_model

SOURCE, TARGET = 26, 27
"""Tokens a sentence, end symbol included."""


@dataclass(frozen=True)
class Size:
    width: int = 512
    ffn_width: int = 1024
    heads: int = 8
    layers: int = 6
    deep: int = 12
    """Encoder layers of the teacher with one decoder layer."""
    vocabulary: int = 10000
    max_positions: int = 256

    def architecture(self, encoder_layers: int | None = None, decoder_layers: int | None = None) -> Architecture:
        return Architecture(
            width=self.width, ffn_width=self.ffn_width, heads=self.heads, max_positions=self.max_positions,
            encoder_layers=encoder_layers or self.layers, decoder_layers=decoder_layers or self.layers,
        )  # fmt: skip


SMOKE = Size(width=32, ffn_width=64, heads=4, layers=1, deep=2, vocabulary=100, max_positions=64)


@dataclass(frozen=True)
class System:
    """One line of the table."""

    name: str
    engine: str
    """A key of translate_worker.ENGINES."""
    model: str
    """A key of Materials.models."""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Materials:
    """Files for the workers."""

    models: dict[str, Path]
    texts: Path
    forced: int | None
    """Target tokens that everybody writes."""
    references: list[list[str]] | None = None
    tokenize: str = "13a"


def paper(scratch: Path, size: Size, needed: Collection[str], *, num_lines: int) -> Materials:
    """Random weights; sentences of SOURCE tokens, every word one token. needed: keys of Materials.models."""
    torch.manual_seed(1)
    words = DictionaryVocabulary([f"w{number}" for number in range(size.vocabulary - 5)])
    v = len(words)
    networks: dict[str, Teacher | Student] = {
        "teacher": _never_ends(Transformer(size.architecture(), v, v)),
        "deep": _never_ends(Transformer(size.architecture(size.deep, 1), v, v)),
        "student": _fixed_lengths(CMLM(size.architecture(), v, v)),
    }
    models = {}
    for name, network in networks.items():
        loaded = LoadedModel(network.eval(), words, words, {"length_beam": 3})
        models[name] = scratch / name
        save_model(models[name], network, words, words, card=loaded.card)
        models |= _forms(scratch, name, loaded, needed)
    draw = random.Random(1)
    lines = [" ".join(words.pieces(draw.choices(range(5, v), k=SOURCE - 1))) for _ in range(num_lines)]
    (scratch / "texts.txt").write_text("".join(f"{line}\n" for line in lines))
    if "marian" in needed:
        models["marian"] = _marian(scratch / "marian", size, words)
    return Materials(models, scratch / "texts.txt", TARGET)


def trained(scratch: Path, run: Path, needed: Collection[str]) -> Materials:
    """The teacher and the ENGINE student of a run directory, and the text it is evaluated on."""
    prepared = Prepared.open(run / "prepare" / "data")
    models = {}
    for name, stage in (("teacher", "teacher"), ("student", "engine")):
        models[name] = stage_model(run / stage)
        models |= _forms(scratch, name, load_model(models[name]), needed)
    (scratch / "texts.txt").write_text("".join(f"{line}\n" for line in prepared.sources("test")), encoding="utf-8")
    tokenize = "none" if prepared.report["pretokenised"] else "13a"
    return Materials(models, scratch / "texts.txt", None, prepared.references("test"), tokenize)


def _forms(scratch: Path, name: str, loaded: LoadedModel, needed: Collection[str]) -> dict[str, Path]:
    """Those needed of: a teacher for CTranslate2, a student as ONNX, each in float32 and in int8."""
    found: dict[str, Path] = {}
    programs: dict[str, Any] | None = None
    for quantization in ("float32", "int8"):
        key = f"{name}-{quantization}"
        if key not in needed:
            continue
        found[key] = scratch / key
        if isinstance(loaded.model, CMLM):
            programs = programs or trace_programs(loaded.model)
            export_onnx(found[key], loaded, readme="", quantization=quantization, programs=programs)
        else:
            export_ctranslate2(found[key], loaded, readme="", quantization=quantization)
    return found


def _never_ends(teacher: Transformer) -> Transformer:
    with torch.no_grad():
        teacher.output.weight[EOS] = 0.0
    return teacher.eval()


def _fixed_lengths(student: CMLM) -> CMLM:
    """A layer norm's output sums to 0, and to 4 with a bias of 4 / D; then a class whose row is all c has the logit
    4 c. Rounding moves the sum a little, and no length comes near another."""
    width = student.architecture.width
    with torch.no_grad():
        norm = student.encoder.layers[-1].ffn_norm
        assert isinstance(norm, torch.nn.LayerNorm)
        norm.bias.fill_(4.0 / width)
        student.length_embedding.weight[1:] = 0.0
        for length, logit in ((TARGET, 9.0), (TARGET + 1, 6.0), (TARGET - 1, 3.0)):
            student.length_embedding.weight[length] = logit
    return student.eval()


def _marian(directory: Path, size: Size, words: Vocabulary) -> Path:
    """A Marian of the same shape."""
    from transformers import MarianConfig, MarianMTModel

    config = MarianConfig(
        vocab_size=len(words), d_model=size.width, encoder_layers=size.layers, decoder_layers=size.layers,
        encoder_ffn_dim=size.ffn_width, decoder_ffn_dim=size.ffn_width, encoder_attention_heads=size.heads,
        decoder_attention_heads=size.heads, max_position_embeddings=size.max_positions, scale_embedding=True,
        activation_function="relu", pad_token_id=1, eos_token_id=EOS, decoder_start_token_id=EOS,
        forced_eos_token_id=None,
    )  # fmt: skip
    MarianMTModel(config).save_pretrained(directory)
    (directory / "words.json").write_text(json.dumps(words.pieces(range(len(words)))))
    return directory
