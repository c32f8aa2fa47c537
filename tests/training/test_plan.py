"""The plan of a rank: who holds what at each ZeRO stage, how the ranks share it, what would make it fit."""

from __future__ import annotations

from typing import Any

import pytest

from engine_fast.config import RunConfig, parse_config
from engine_fast.errors import ConfigError
from engine_fast.training.plan import Shape, plan_memory
from engine_fast.training.plan.advice import applied, fitting_changes
from engine_fast.training.plan.memory import architecture_of, largest_shapes
from engine_fast.training.plan.sizes import sizes_of

SHAPE = Shape(4, 10, 10)
BUCKET = 100_000


def config(**changed: Any) -> RunConfig:
    """A small run; `stage__key=value` changes a setting."""
    tree: dict[str, Any] = {
        "data": {"synthetic": {}, "vocabulary": {"size": 1000}},
        "teacher": {"architecture": {"width": 64, "ffn_width": 256, "heads": 4, "max_positions": 50}},
        "cmlm": {"architecture": {"width": 64, "ffn_width": 256, "heads": 4, "max_positions": 50}},
        "engine": {},
        "deepspeed": {"zero_optimization": {"reduce_bucket_size": BUCKET}},
    }
    for key, value in changed.items():
        *parents, leaf = key.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return parse_config(tree)


def planned(stage: Any = "teacher", ranks: int = 4, device: Any = "cuda", **changed: Any) -> Any:
    return plan_memory(config(**changed), stage, ranks=ranks, device=device, shape=SHAPE)


P = sizes_of(config().teacher.architecture, 1000, cmlm=False).total


@pytest.mark.parametrize(
    ("stage", "precision", "weights", "optimizer"),
    [
        (0, "fp32", 4, 8), (1, "fp32", 4, 12 / 4), (2, "fp32", 4, 12 / 4), (3, "fp32", 4 / 4 + 4, 12 / 4),
        (1, "bf16", 2, 12 / 4), (2, "bf16", 2, 12 / 4), (3, "bf16", 2 / 4 + 2, 12 / 4),
    ],
)  # fmt: skip
def test_bytes_a_parameter(stage, precision, weights, optimizer):
    plan = planned(teacher__zero_stage=stage, teacher__precision=precision)
    tables = 4 * sizes_of(config().teacher.architecture, 1000, cmlm=False).buffers
    assert (plan.device["weights"] - tables) / P == pytest.approx(weights, rel=1e-3)
    assert plan.device["optimizer"] / P == pytest.approx(optimizer, rel=1e-3)
    copied = {"fp32": 4, "bf16": 2}[precision] if stage == 3 else 0
    assert plan.device["copies"] == copied * P


def test_offload_moves_the_optimizer_to_the_host():
    here, away = planned(teacher__zero_stage=2), planned(teacher__zero_stage=2, teacher__offload={"optimizer": True})
    assert away.device["optimizer"] == 0
    assert away.host["optimizer"] == here.device["optimizer"]
    assert away.total < here.total
    both = planned(teacher__zero_stage=3, teacher__offload={"optimizer": True, "parameters": True})
    assert both.host["weights"] == 4 * -(-P // 4)


def test_more_ranks_never_need_more():
    for stage in (1, 2, 3):
        totals = [planned(ranks=ranks, teacher__zero_stage=stage).total for ranks in (2, 8, 64, 512)]
        assert totals == sorted(totals, reverse=True)
        assert totals[0] > totals[-1]
    assert planned(ranks=2, teacher__zero_stage=0).device == planned(ranks=512, teacher__zero_stage=0).device


def test_the_bucket_is_counted_and_twice_with_overlap():
    def workspace(**changed: Any) -> int:
        moments = planned(device="cpu", teacher__zero_stage=2, **changed).moments
        return int(moments["backward"])

    overlapping = workspace(teacher__overlap_communication=True)
    assert overlapping - workspace() == 4 * BUCKET
    larger = {"zero_optimization": {"reduce_bucket_size": 10**8}}
    assert workspace(deepspeed=larger) > 4 * 10**8


def test_a_teacher_in_half_precision_is_half_and_a_sharded_one_less():
    whole, half = planned("engine"), planned("engine", engine__teacher_precision="bf16")
    assert half.device["teacher"] * 2 == whole.device["teacher"]
    live = {"zero_optimization": {"reduce_bucket_size": BUCKET, "stage3_max_live_parameters": P // 10}}
    shared = planned("engine", engine__teacher_placement="sharded", deepspeed=live)
    assert shared.device["teacher"] < 0.4 * whole.device["teacher"]
    assert "teacher" not in planned("cmlm").device


def test_recomputed_heads_and_checkpointed_layers_keep_less():
    def forward(stage: Any, **changed: Any) -> int:
        large = Shape(64, 30, 30)
        return plan_memory(config(**changed), stage, ranks=4, shape=large).moments["forward"]

    assert forward("engine", engine__head_memory="recompute") < forward("engine")
    for stage in ("teacher", "cmlm", "engine"):
        assert forward(stage, **{f"{stage}__activation_checkpointing": True}) < forward(stage)


def test_an_average_costs_its_shard_and_a_copy():
    plain, averaged = planned(teacher__zero_stage=2), planned(teacher__zero_stage=2, teacher__ema_decay=0.9)
    assert averaged.device["copies"] - plain.device["copies"] == 4 * -(-P // 4) + 4 * P


def test_the_largest_micro_batch_follows_filters_positions_and_budget():
    run = config(teacher__batch={"max_tokens": 1000}, data__filters={"max_tokens": 40})
    assert largest_shapes(run, "teacher")[-1] == Shape(25, 40, 40)
    assert largest_shapes(config(cmlm__batch={"max_tokens": 1000}), "cmlm")[-1] == Shape(20, 49, 49)
    capped = config(teacher__batch={"max_tokens": 1000, "max_sentences": 3})
    assert largest_shapes(capped, "teacher")[-1] == Shape(3, 50, 50)
    totals = [plan_memory(run, "teacher", ranks=1, shape=each).total for each in largest_shapes(run, "teacher")]
    assert plan_memory(run, "teacher", ranks=1).total == max(totals)


def test_the_students_architecture_is_the_cmlms_with_its_own_dropout():
    run = config(engine__architecture={"dropout": 0.3})
    assert architecture_of(run, "engine") == run.cmlm.architecture.model_copy(update={"dropout": 0.3})


def test_advice_is_what_fits_when_planned():
    run = config(engine__batch={"max_tokens": 4096})
    total = plan_memory(run, "engine", ranks=4).total
    found, suffices = fitting_changes(run, "engine", ranks=4, limit=round(0.9 * total))
    assert suffices
    assert len(found) > 1
    for change, plan in found:
        changed = applied(run, change)
        assert changed is not None
        assert plan_memory(changed, "engine", ranks=4).total == plan.total <= 0.9 * total


def test_advice_combines_where_nothing_alone_suffices_and_says_where_nothing_does():
    run = config(engine__batch={"max_tokens": 4096})
    total = plan_memory(run, "engine", ranks=4).total
    (all_together, least), suffices = fitting_changes(run, "engine", ranks=4, limit=1)[0][0], False
    assert fitting_changes(run, "engine", ranks=4, limit=1)[1] is suffices
    assert least.total < total / 3
    between = [
        limit for limit in range(least.total, total, (total - least.total) // 5)
        if len(fitting_changes(run, "engine", ranks=4, limit=limit)[0][0][0]) > 2
    ]  # fmt: skip
    assert between
    assert len(all_together) > 3


def test_a_refused_change_is_left_out_and_ranks_are_checked():
    assert applied(config(), (("teacher.zero_stage", 0), ("teacher.precision", "bf16"))) is None
    with pytest.raises(ConfigError, match="ranks = 0"):
        plan_memory(config(), "teacher", ranks=0)


@pytest.mark.parametrize(
    ("stage", "changed", "message"),
    [
        ("teacher", {"teacher__architecture": {"kind": "lstm"}}, r"teacher.architecture.kind = 'lstm': expected 'tra"),
        ("cmlm", {"cmlm__architecture": {"kind": "bilstm"}}, r"cmlm.architecture.kind = 'bilstm': expected 'transform"),
        ("engine", {"cmlm__architecture": {"kind": "bilstm"}}, r"engine.architecture.kind = 'bilstm': expected 'trans"),
        ("engine", {"teacher__architecture": {"kind": "lstm"}}, r"teacher.architecture.kind = 'lstm': expected 'tra"),
    ],
)
def test_only_transformers_are_planned(stage, changed, message):
    with pytest.raises(ConfigError, match=message):
        planned(stage, **changed)
