"""The benchmark's peers compute the losses that ours compute, and its judge can fail."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest
import torch

from benchmarks import bench_step, harness

SMALL = bench_step.Size(width=16, ffn_width=24, heads=2, layers=2, vocabulary=60, tokens=64, lengths=(5, 9))


@pytest.mark.parametrize(("subject", "provider"), [(s, p) for s, ps in bench_step.PROVIDERS.items() for p in ps])
def test_every_provider_computes_one_loss_and_gradient(subject, provider):
    steps = [bench_step.make_step(subject, name, SMALL) for name in ("ours-fp32", provider)]
    relative = 2e-2 if "bf16" in provider else 1e-4
    for batch in bench_step.make_batches(SMALL):
        losses = []
        for step in steps:
            for module in step.modules:
                module.eval()  # dropout draws other masks in each
            step.run(batch)
            losses.append(step.loss(batch).item())
        assert losses[1] == pytest.approx(losses[0], rel=relative)
        ours, theirs = (dict(step.modules[0].named_parameters()) for step in steps)
        for name in ours:
            gradients = [p[name].grad.float() for p in (ours, theirs)]
            allowed = 5 * relative * gradients[0].norm() + 1e-3
            assert (gradients[1] - gradients[0]).norm() <= allowed, name


def test_only_the_peers_teacher_gets_weight_gradients():
    (batch, *_) = bench_step.make_batches(SMALL)
    peer = bench_step.make_step("engine", "peer-fp32", SMALL)
    peer.run(batch)
    assert all(p.grad is not None for p in peer.modules[1].parameters())
    peer.release()
    assert all(p.grad is None for module in peer.modules for p in module.parameters())


def test_batches_are_nearly_full():
    for batch in bench_step.make_batches(bench_step.Size()):
        assert 0.93 < batch.num_target_tokens / batch.target.numel() <= 1
        assert 960 < batch.target.numel() <= 1024


def test_judge_names_what_fell_short():
    limits = {"speed": {"at_least": 1.25}, "memory": {"at_most": 0.6}, "other": {"at_least": 1.0}}
    assert harness.judge({"speed": 1.25, "memory": 0.6, "other": 2.0}, limits) == []
    problems = harness.judge({"speed": 1.2, "memory": 0.7}, limits)
    assert [problem.split()[0] for problem in problems] == ["speed", "memory", "other"]


def test_floors_are_figures_that_the_benchmark_reports():
    row = {"tokens_per_second": 1.0, "peak_mib_above_inputs": 1.0, "cpu_seconds_per_step": 1.0}
    figures = bench_step._ratios({s: dict.fromkeys(ps, row) for s, ps in bench_step.PROVIDERS.items()})
    for table in ("step", "step_gpu"):
        assert harness.floors(table).keys() <= figures.keys()
    assert all(name.startswith("head_") for name in bench_step._limits(["head"], "cpu"))


def test_interleaving_runs_every_provider_equally_often():
    calls: list[str] = []
    rows = harness.interleave({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3, warmup=1)
    assert calls == list("abbaabba")
    assert set(rows) == {"a", "b"}


def test_peak_memory_sees_what_a_step_allocates():
    program = (
        "import json, torch\n"
        "from benchmarks.harness import peak_memory\n"
        "print(json.dumps(peak_memory(lambda: torch.ones(64 * 2**18).add_(1).sum().item())))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 60 < json.loads(done.stdout)["above"] < 90


def test_machine_names_no_host():
    description = str(harness.machine())
    assert socket.gethostname() not in description
    assert str(harness.HERE) not in description
    assert torch.__version__ in description
