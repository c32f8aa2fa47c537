"""The parts of the scaling benchmark that need no second machine: counting, the cost model, the figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import bench_scaling, bench_zero, harness
from benchmarks.collectives import KINDS, Recorder, size_of
from benchmarks.projection import Assumptions, Traffic, project
from benchmarks.updates import Work, build, micro_batch, update
from engine_fast.config import RuntimeConfig
from engine_fast.distributed import start


def test_a_micro_batch_is_the_same_whoever_computes_it():
    work = Work("teacher", 50, 3, 5, 7)
    assert torch.equal(micro_batch(work, 3).target, micro_batch(work, 3).target)
    assert not torch.equal(micro_batch(work, 3).target, micro_batch(work, 4).target)
    assert micro_batch(work, 3).target.shape == (3, 7)
    assert micro_batch(work, 3).num_target_tokens == 21


@pytest.mark.parametrize("stage", ["teacher", "cmlm", "engine"])
def test_updates_train(stage):
    config = bench_scaling.make_config("quick", stage, "fp32", 1)
    training = build(config, Work(stage, 50, 3, 5, 6, accumulate=2), start(config.runtime))
    work = Work(stage, 50, 3, 5, 6, accumulate=2)
    losses = [update(training.engine, work, 0, lr=3e-3) for _ in range(6)]
    assert losses[-1] < losses[0]
    training.validate(micro_batch(work, 0))
    assert sum(weight.numel() for weight in training.weights().values()) == training.engine.num_parameters


def test_the_recorder_counts_only_while_it_records(monkeypatch):
    for module in (dist, dist.distributed_c10d):
        for name in KINDS:
            monkeypatch.setattr(module, name, getattr(module, name))  # put back afterwards
    start(RuntimeConfig(device="cpu", threads=1))
    recorder = Recorder()
    recorder.install()
    x = torch.ones(10)
    dist.all_reduce(x)
    assert not recorder.calls
    with recorder.recording():
        dist.all_reduce(x)
        dist.all_gather_into_tensor(torch.empty(10), x)
    dist.broadcast(x, 0)
    assert dict(recorder.calls) == {"all_reduce": 1, "all_gather": 1}
    assert dict(recorder.bytes) == {"all_reduce": 40, "all_gather": 40}
    assert recorder.seconds > 0 < recorder.waiting
    assert size_of("all_gather", ([x, x], x), {"group": None}) == 80


def test_the_cost_model_is_its_formula():
    assumed = Assumptions(teraflops=1, node_gb_per_second=100, network_gb_per_second=10, latency_us=0, ranks_per_node=8)
    micro, rest = Traffic({"reduce_scatter": 1e9}, {"reduce_scatter": 3}), Traffic({"all_reduce": 1e9}, {})
    one = project(1, flop=1e12, micro=micro, update=rest, accumulate=2, assumptions=assumed)
    assert (one.compute, one.communication, one.efficiency) == (2.0, 0.0, (1.0, 1.0))
    eight = project(8, flop=1e12, micro=micro, update=rest, accumulate=2, assumptions=assumed)
    assert eight.communication == pytest.approx((2 * 1 + 2) * 7 / 8 / 100)
    many = project(16, flop=1e12, micro=micro, update=rest, accumulate=2, assumptions=assumed)
    assert many.communication == pytest.approx((2 * 1 + 2) * 15 / 16 / 10)
    slow = Assumptions(teraflops=1, network_gb_per_second=10, node_gb_per_second=100, latency_us=1e6)
    late = project(16, flop=1e12, micro=micro, update=rest, accumulate=1, assumptions=slow)
    assert late.communication == pytest.approx(3 * 4 + 3 * 15 / 16 / 10)
    assert late.efficiency[0] < late.efficiency[1] < 1


def test_figures_are_what_floors_judge():
    row: dict[str, Any] = {
        "loss_difference": 1e-7,
        "speedup": 1.5,
        "cpu_speedup": 1.6,
        "peak_mib": {"1": 2.0, "2": 1.0},
    }
    figures = bench_scaling.figures_of({0: row, 3: row | {"loss_difference": 1e-3}})
    assert harness.floors("scaling").keys() <= figures.keys()
    problems = harness.judge(figures, harness.floors("scaling"))
    assert [problem.split()[0] for problem in problems] == ["loss_difference"]
    assert not harness.judge(figures | {"loss_difference": 1e-7}, harness.floors("scaling"))


def test_the_projection_takes_any_run_and_says_what_it_is(capsys):
    parser_defaults = {"stage": "engine", "precision": "fp32", **vars(Assumptions())}
    options = type("Options", (), parser_defaults)()
    traffic = {
        "micro_bytes": {"all_reduce": 4e6}, "micro_calls": {"all_reduce": 1.0},
        "update_bytes": {"all_gather": 4e6}, "update_calls": {"all_gather": 1.0},
    }  # fmt: skip
    run = bench_scaling.make_config("quick", "engine", "fp32", 1)
    found = bench_scaling.projections({2: {"traffic": traffic}}, 10**6, run, options)
    assert {row["gpus"] for row in found["rows"]} == set(bench_scaling.PROJECTED)
    assert found["mflop_a_token"] > 0
    bench_scaling.print_projection(found, "this")
    assert "PROJECTION, not measured" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_gpu_cases_fit_the_configuration(device):
    for case in bench_zero.CASES:
        for size in bench_zero.SIZES:
            assert bench_zero.make_config(case, size, device).runtime.device == device


@pytest.mark.slow
def test_losses_agree_on_one_two_and_four_ranks():
    task = {
        "size": "quick",
        "stage": "engine",
        "precision": "fp32",
        "zero_stages": [0, 3],
        "what": "speed",
        "repeats": 0,
    }
    alone, *others = [bench_scaling.launch(ranks, task)["losses"] for ranks in (1, 2, 4)]
    for losses in others:
        for zero_stage in ("0", "3"):
            assert losses[zero_stage] == pytest.approx(alone["0"], rel=1e-5)
