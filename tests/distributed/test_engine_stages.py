"""Every stage, placement and number of ranks gives the losses of plain torch in one process, over twenty updates."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from engine_fast import ops

from . import engine_worker
from .test_ranks import launch

FP32 = [
    {"zero_stage": 0},
    {"zero_stage": 1},
    {"zero_stage": 2, "overlap_communication": True},
    {"zero_stage": 3},
    {"zero_stage": 3, "head_memory": "recompute", "teacher_checkpointing": True, "overlap_communication": True},
    {"zero_stage": 0, "head_memory": "recompute", "activation_checkpointing": True},
    {"zero_stage": 1, "offload": {"optimizer": True}},
    {"zero_stage": 2, "offload": {"optimizer": True}},
    {"zero_stage": 3, "offload": {"optimizer": True, "parameters": True}},
    {"zero_stage": 0, "teacher_placement": "sharded"},
    {"zero_stage": 3, "teacher_placement": "sharded"},
    {"zero_stage": 3, "teacher_placement": "sharded", "head_memory": "recompute", "teacher_checkpointing": True},
]
BF16 = [
    {"zero_stage": 1, "precision": "bf16"},
    {"zero_stage": 2, "precision": "bf16"},
    {"zero_stage": 3, "precision": "bf16"},
    {"zero_stage": 1, "precision": "bf16", "offload": {"optimizer": True}},
    {"zero_stage": 3, "precision": "bf16", "offload": {"optimizer": True, "parameters": True}},
    {"zero_stage": 3, "precision": "bf16", "teacher_placement": "sharded"},
]
MIXED = [
    {"zero_stage": 0, "teacher_precision": "bf16"},
    {"zero_stage": 3, "teacher_precision": "bf16"},
    {"zero_stage": 3, "teacher_precision": "bf16", "teacher_placement": "sharded"},
    {"zero_stage": 2, "teacher_precision": "fp32", "precision": "bf16"},
]


RECURRENT = [
    {"networks": networks, **settings}
    for networks in ("recurrent", "feeding")
    for settings in (
        {"zero_stage": 0},
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"zero_stage": 3, "head_memory": "recompute", "activation_checkpointing": True, "teacher_checkpointing": True},
        {"zero_stage": 3, "teacher_placement": "sharded"},
        {"zero_stage": 3, "offload": {"optimizer": True, "parameters": True}},
        {"zero_stage": 3, "precision": "bf16", "teacher_placement": "sharded"},
        {"zero_stage": 0, "teacher_precision": "bf16"},
    )
    if networks == "recurrent" or "teacher_placement" not in settings  # input feeding is not sharded, see stages.py
]


@cache
def plain(networks: str):
    return engine_worker.plain(networks)


def agree(one, other, rel):
    """Not of the weights themselves: Adam makes a step of the rounding in gradients that are 0, the keys' biases."""
    for name in ("losses", "norms"):
        assert one[name] == pytest.approx(other[name], rel=rel), name


def check(result, settings):
    networks = settings.get("networks", "transformers")
    expected = plain(networks)
    if settings.get("precision") == "bf16" or settings.get("teacher_precision") == "bf16":
        agree({"losses": result["losses"], "norms": []}, {"losses": expected["losses"], "norms": []}, 5e-3)
    else:
        agree(result, expected, 1e-5)
    assert (result["whole"] == 0) == (settings["zero_stage"] == 3), "only stage 3 shards the student's weights"
    _, teacher = engine_worker.models(networks)
    whole, again = result["teacher_whole"], teacher.output.weight.numel()  # called twice in a step, see shard_frozen
    assert whole <= again if settings.get("teacher_placement") == "sharded" else whole > 2 * again


ALL = FP32 + BF16 + MIXED + RECURRENT
QUICK = [FP32[0], FP32[2], FP32[3], FP32[8], FP32[11], BF16[0], BF16[5], MIXED[1], RECURRENT[4]]


@pytest.mark.parametrize(
    "settings",
    [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in ALL],
    ids=str,
)
def test_one_process_trains_as_plain_torch_does(settings):
    with ops.using("fused"):
        check(engine_worker.on_engine(**settings), settings)


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        pytest.param(2, [FP32[1], FP32[3], FP32[8], BF16[1], MIXED[2], RECURRENT[4]], id="two"),
        pytest.param(2, ALL, id="two-all", marks=pytest.mark.slow),
        pytest.param(4, ALL, id="four-all", marks=pytest.mark.slow),
    ],
)
def test_ranks_train_as_plain_torch_does(ranks, cases):
    results = launch(ranks, json.dumps(cases), worker=Path(engine_worker.__file__))
    assert len(results) == len(cases)
    for result, settings in zip(results, cases, strict=True):
        check(result, settings)
