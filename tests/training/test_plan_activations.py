"""The formulas of activations are what autograd keeps; those of parameters what the models have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from engine_fast import ops
from engine_fast.config import Architecture, CMLMConfig, EngineConfig, TeacherConfig
from engine_fast.data.batching import Batch
from engine_fast.data.symbols import EOS, NUM_SPECIAL, PAD
from engine_fast.energies import TeacherEnergy
from engine_fast.models import CMLM, Transformer, freeze
from engine_fast.training.objectives import CMLMObjective, EngineObjective, TeacherObjective, draw_masks
from engine_fast.training.plan.activations import Block, Shape, masked_rows
from engine_fast.training.plan.sizes import sizes_of
from engine_fast.training.plan.tape import cmlm_tape, engine_tape, teacher_tape

VOCABULARY, SHAPE = 1000, Shape(8, 17, 21)
BASE = {
    "width": 64, "ffn_width": 256, "heads": 4, "encoder_layers": 2, "decoder_layers": 3, "max_positions": 64,
    "dropout": 0.1,
}  # fmt: skip
TEACHER = {"width": 48, "ffn_width": 128, "heads": 4, "encoder_layers": 1, "decoder_layers": 2, "max_positions": 64}
ARCHITECTURES: list[dict[str, Any]] = [
    {},
    {"norm": "pre"},
    {"dropout": 0.0},
    {"activation": "gelu"},
    {"activation": "gelu", "activation_dropout": 0.1},
    {"activation": "relu", "activation_dropout": 0.1},
    {"attention_dropout": 0.1},
    {"positions": "learned"},
    {"tie": "all"},
    {"tie": "none"},
    {"width": 128, "heads": 2, "encoder_layers": 1, "decoder_layers": 1},
]


def a_batch() -> Batch:
    torch.manual_seed(0)
    sides = [torch.randint(NUM_SPECIAL, VOCABULARY, (SHAPE.sentences, n)) for n in (SHAPE.source, SHAPE.target)]
    for side in sides:
        side[:, -1] = EOS
    return Batch(*sides, torch.arange(SHAPE.sentences))


@contextmanager
def counting(*modules: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes by storage of what autograd keeps, weights and buffers apart."""
    given = {t.untyped_storage().data_ptr() for m in modules for t in (*m.parameters(), *m.buffers())}
    kept: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # or its address would serve another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def assert_agrees(kept: dict[int, int], tape: list[Block], *, besides: int = 0) -> None:
    assert sum(block.saved for block in tape) == pytest.approx(sum(kept.values()) + besides, rel=0.02)


def dtype(precision: str) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("changed", ARCHITECTURES, ids=str)
def test_the_teacher_keeps_what_is_planned(changed, precision, checkpointing):
    config = TeacherConfig(
        architecture={**BASE, **changed}, precision=precision, activation_checkpointing=checkpointing
    )
    model = Transformer(config.architecture, VOCABULARY, VOCABULARY).to(dtype(precision)).train()
    model.activation_checkpointing = checkpointing
    with counting(model) as kept:
        TeacherObjective(model, config)(a_batch())
    assert_agrees(kept, teacher_tape(config, VOCABULARY, SHAPE, "cpu"))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("changed", ARCHITECTURES, ids=str)
def test_the_cmlm_keeps_what_is_planned(changed, precision, checkpointing):
    config = CMLMConfig(architecture={**BASE, **changed}, precision=precision, activation_checkpointing=checkpointing)
    model = CMLM(config.architecture, VOCABULARY, VOCABULARY).to(dtype(precision)).train()
    model.activation_checkpointing = checkpointing
    batch = a_batch()
    masks = draw_masks(batch.target != PAD)
    with counting(model) as kept:
        CMLMObjective(model, config).loss_of(batch, masks)
    shape = Shape(SHAPE.sentences, SHAPE.source, SHAPE.target, int(masks.sum()))
    assert_agrees(kept, cmlm_tape(config, VOCABULARY, shape, "cpu"))


@pytest.mark.skipif(bool(ops.implementation() == "reference"), reason="the plain definitions keep whole tables")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings",
    [
        {"head_memory": "keep"},
        {"head_memory": "recompute"},
        {"activation_checkpointing": True},
        {"teacher_checkpointing": True},
        {"teacher_dropout": True},
        {"teacher_precision": "fp32"},
        {"teacher_precision": "bf16", "head_memory": "recompute"},
        {"cross_entropy_weight": 0.5},
        {"repetition_weight": 0.5, "head_memory": "recompute"},
        {"o2": "STL", "stl_logits": "log_probabilities"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:engine.head_memory")
def test_engine_keeps_what_is_planned(settings, precision):
    config = EngineConfig(**settings, precision=precision)
    architecture, of_teacher = Architecture(**BASE), Architecture(**TEACHER)
    student = CMLM(architecture, VOCABULARY, VOCABULARY).to(dtype(precision)).train()
    student.activation_checkpointing = config.activation_checkpointing
    teacher = Transformer(of_teacher, VOCABULARY, VOCABULARY)
    freeze(teacher, dtype=dtype(config.teacher_precision or precision), dropout=config.teacher_dropout)
    teacher.activation_checkpointing = config.teacher_checkpointing
    objective, batch = EngineObjective(student, TeacherEnergy(teacher), config), a_batch()
    with counting(student, teacher) as kept:
        objective(batch)
    tape = engine_tape(config, architecture, of_teacher, VOCABULARY, SHAPE, "cpu")
    states = SHAPE.sentences * SHAPE.source * of_teacher.width * next(teacher.parameters()).element_size()
    assert_agrees(kept, tape, besides=-states if config.teacher_checkpointing else 0)


@pytest.mark.parametrize("cmlm", [False, True])
@pytest.mark.parametrize("changed", ARCHITECTURES, ids=str)
def test_parameters_are_counted(changed, cmlm):
    architecture = Architecture(**{**BASE, **changed})
    model = (CMLM if cmlm else Transformer)(architecture, VOCABULARY, VOCABULARY)
    sizes = sizes_of(architecture, VOCABULARY, cmlm=cmlm)
    assert sorted(sizes.tensors) == sorted(parameter.numel() for parameter in model.parameters())
    assert sizes.buffers == sum(buffer.numel() for buffer in model.buffers())
    tape = (cmlm_tape(CMLMConfig(architecture=architecture), VOCABULARY, SHAPE, "cpu") if cmlm
            else teacher_tape(TeacherConfig(architecture=architecture), VOCABULARY, SHAPE, "cpu"))  # fmt: skip
    assert sum(block.parameters for block in tape) == sizes.total


def test_masked_rows_are_rarely_more():
    torch.manual_seed(1)
    real = torch.ones(SHAPE.sentences, SHAPE.target, dtype=torch.bool)
    drawn = [int(draw_masks(real).sum()) for _ in range(500)]
    assert sum(each > masked_rows(SHAPE) for each in drawn) <= 5
    assert masked_rows(SHAPE) < 1.6 * sum(drawn) / len(drawn)
    assert masked_rows(Shape(1, 5, 5)) == 5
