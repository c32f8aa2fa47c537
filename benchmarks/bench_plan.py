"""The memory that `engine-fast doctor --plan` foresees, against the peaks of real training updates.

    python -m benchmarks.bench_plan [--quick] [--only TEXT]

Every case runs in processes of its own (1 or 2 ranks): three updates, a validation and a checkpoint, on models large
enough that nothing but their tensors counts. Measured is what torch's allocator hands out, see memory.py; the update's
ratio, planned over measured, is what the floors judge, phase by phase what the results file shows. `states` has
more weights than activations, `activations` the reverse. Reduction buckets are small here, or they would be most of
the memory and any plan right; `bucket` has a large one.
--quick runs two cases and writes nothing. Writes benchmarks/results/plan.json; exits with 1 beyond a floor.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks import harness
from benchmarks.updates import Work
from engine_fast.config import RunConfig, parse_config
from engine_fast.training.plan import Shape, Stage, plan_memory

ARCHITECTURES = {
    "activations": {"width": 128, "ffn_width": 512, "heads": 4, "encoder_layers": 2, "decoder_layers": 2},
    "states": {"width": 256, "ffn_width": 1024, "heads": 4, "encoder_layers": 2, "decoder_layers": 2},
}
WORKS = {"activations": (4000, 24, 24, 24), "states": (1000, 4, 12, 12)}
"""Load -> vocabulary, sentences, source and target positions."""
_UPDATE = ("forward", "backward", "step")


@dataclass(frozen=True)
class Case:
    """One stage under some settings."""

    stage: Stage
    load: str
    ranks: int
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        settings = " ".join(f"{key.removeprefix(self.stage + '.')}={value}" for key, value in self.settings)
        return f"{self.stage} {self.load} {self.ranks} {settings}".strip()

    def config(self) -> RunConfig:
        architecture = {**ARCHITECTURES[self.load], "max_positions": 64, "dropout": 0.1}
        zero = {"reduce_bucket_size": 200_000}
        tree: dict[str, Any] = {
            "data": {"synthetic": {}},
            "runtime": {"device": "cpu", "threads": 1},
            "teacher": {"architecture": dict(architecture)},
            "cmlm": {"architecture": dict(architecture)},
            "engine": {},
            "deepspeed": {"zero_optimization": zero},
        }
        for key, value in self.settings:
            *parents, leaf = key.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
        return parse_config(tree)

    def work(self) -> Work:
        accumulate = getattr(self.config(), self.stage).batch.accumulate
        return Work(self.stage, *WORKS[self.load], accumulate=accumulate)


def cases() -> Iterator[Case]:
    """Stages by precision by load; heads and checkpointing; then one setting at a time. On 1 rank and on 2."""
    for ranks in (1, 2):
        for load in ("activations", "states"):
            for zero_stage, precision in ((0, "fp32"), *((s, p) for p in ("fp32", "bf16") for s in (1, 2, 3))):
                yield _case("teacher", load, ranks, zero_stage=zero_stage, precision=precision)
        for zero_stage, precision in ((0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")):
            for head_memory in ("keep", "recompute"):
                # On one rank every combination; on two, where only the sharing of states is new, half of them.
                for checkpointing in (False, True) if ranks == 1 else (head_memory == "recompute",):
                    yield _case(
                        "engine", "activations", ranks, zero_stage=zero_stage, precision=precision,
                        head_memory=head_memory, activation_checkpointing=checkpointing,
                    )  # fmt: skip
        for zero_stage, precision in ((0, "fp32"), (1, "bf16"), (3, "fp32")):
            yield _case("cmlm", "activations", ranks, zero_stage=zero_stage, precision=precision)
        yield _case("engine", "states", ranks, zero_stage=3, precision="bf16")
        yield _case("engine", "states", ranks, zero_stage=3, precision="bf16", teacher_placement="sharded")
        yield _case("engine", "activations", ranks, teacher_precision="bf16", teacher_checkpointing=True)
        yield _case("teacher", "states", ranks, zero_stage=2, **{"batch.accumulate": 2})
        yield _case("teacher", "states", ranks, zero_stage=2, overlap_communication=True)
        yield _case("teacher", "states", ranks, zero_stage=2, precision="bf16", ema_decay=0.99)
        bucket = ("deepspeed.zero_optimization.reduce_bucket_size", 10_000_000)
        for zero_stage in (1, 2, 3):
            offload = {"offload.optimizer": True} | ({"offload.parameters": True} if zero_stage == 3 else {})
            yield _case("teacher", "states", ranks, zero_stage=zero_stage, **offload)
            with_bucket = _case("teacher", "states", ranks, zero_stage=zero_stage)
            yield Case("teacher", "states", ranks, (*with_bucket.settings, bucket))


def quick_cases() -> list[Case]:
    return [
        _case("engine", "activations", 1, zero_stage=2, precision="bf16"),
        _case("teacher", "states", 1, zero_stage=3, precision="fp32"),
    ]


def _case(stage: Stage, load: str, ranks: int, **settings: Any) -> Case:
    return Case(stage, load, ranks, tuple((f"{stage}.{key}", value) for key, value in settings.items()))


def measure(case: Case) -> dict[str, int]:
    """Peak bytes of each phase on rank 0, of a fresh process for each rank."""
    command = [sys.executable, "-m", "benchmarks.bench_plan", "--measure", json.dumps(_plain(case))]
    if case.ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(case.ranks)]
        launcher += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        command = [*launcher, *command[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        command, cwd=harness.HERE.parent, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{case.name}: {done.stderr[-2000:]}")
    line = next(line for line in done.stdout.splitlines() if line.startswith("PEAKS "))
    peaks: dict[str, int] = json.loads(line.removeprefix("PEAKS "))
    return peaks


def compare(case: Case) -> dict[str, Any]:
    """Planned and measured MiB of each phase, and planned over measured of the update's largest."""
    measured, work = measure(case), case.work()
    shape = Shape(work.sentences, work.source, work.target)
    plan = plan_memory(
        case.config(), case.stage, ranks=case.ranks, device="cpu", shape=shape, vocabulary=work.vocabulary
    )
    planned = {name: bytes_ + plan.host_total for name, bytes_ in plan.moments.items()}
    return {
        "ratio": max(planned[name] for name in _UPDATE) / max(measured[name] for name in _UPDATE),
        "planned_mib": {name: round(planned[name] / harness.MiB, 2) for name in measured},
        "measured_mib": {name: round(measured[name] / harness.MiB, 2) for name in measured},
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="two cases; no floor is judged, nothing is written")
    parser.add_argument("--only", default="", help="cases whose name has this in it; nothing is written")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return _measure_here(options.measure)
    rows: dict[str, dict[str, Any]] = {}
    chosen = quick_cases() if options.quick else [case for case in cases() if options.only in case.name]
    for case in chosen:
        rows[case.name] = row = compare(case)
        phases = "  ".join(
            f"{name} {row['planned_mib'][name]:.0f}/{value:.0f}" for name, value in row["measured_mib"].items()
        )
        print(f"{row['ratio']:.3f}  {case.name:95}  {phases}", flush=True)
    ratios = [row["ratio"] for row in rows.values()]
    figures = {"most_over": max(ratios), "most_under": min(ratios)}
    print("  ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    if options.quick or options.only:
        return 0
    problems = harness.judge(figures, harness.floors("plan"))
    path = harness.write_results("plan", {"figures": figures, "cases": rows, "below_floor": problems})
    print(f"written: {path.relative_to(harness.RESULTS.parent.parent)}")
    for problem in problems:
        print(f"beyond the floor: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _plain(case: Case) -> dict[str, Any]:
    return {"stage": case.stage, "load": case.load, "ranks": case.ranks, "settings": case.settings}


def _measure_here(text: str) -> int:
    from benchmarks import memory, updates
    from engine_fast.distributed import start
    from engine_fast.distributed.runtime import leave

    plain = json.loads(text)
    settings = tuple((key, value) for key, value in plain["settings"])
    case = Case(plain["stage"], plain["load"], plain["ranks"], settings)
    config, work = case.config(), case.work()
    world = start(config.runtime)
    peaks = memory.peaks_on_cpu(lambda: updates.build(config, work, world), work, updates=3)
    if world.is_main:
        print("PEAKS " + json.dumps(peaks), flush=True)
    leave(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
