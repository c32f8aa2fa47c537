"""Training on 1 and 2 ranks under ZeRO 0 to 3: speed, what communication costs, memory, and whether losses agree.

    python -m benchmarks.bench_scaling [--quick] [--stages 0 1 2 3] [--rounds 3] [--stage engine] [--precision fp32]

An update is four micro-batches whatever the number of ranks, so all compute the same. Every rank has one thread: on two
cores two ranks are twice the machine of one. Processes with 1 and with 2 ranks are started in turn, and time their
stages in turn; gated are ratios. On 4 ranks, more than there are cores, only the losses count.

speedup         median time of an update on 1 rank over that on 2; 2 is ideal
cpu_speedup     the same of CPU seconds a rank, less disturbed where others compute, blind to waiting
communication   share of an update on 2 ranks in which tensors are sent, each collective finished before the next
                operation, of a pass of its own; waiting: for the other rank to come to the collective
bytes           a parameter and update, of the tensors that are reduced, gathered, scattered (on 2 ranks)
peak_mib        of an update, as torch's allocator counts it (memory.py), and as planned

Then, marked as a projection, what the counted bytes and the model's FLOP would mean on 8 to 512 GPUs; see projection.py
for the formula. Its assumptions are flags. --quick shrinks all, judges no floor and writes nothing.
Writes benchmarks/results/scaling.json; exits with 1 below a floor of benchmarks/floors.toml.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from benchmarks.projection import Assumptions, Traffic, project
from benchmarks.updates import Work, build, micro_batch, update
from engine_fast import ops
from engine_fast.config import RunConfig, load_config, parse_config
from engine_fast.training.plan import Shape, plan_memory

MICRO_BATCHES = 4
PROJECTED = (8, 16, 32, 64, 128, 256, 512)
LOSSES = 4
SIZES = {
    "full": ({"width": 256, "ffn_width": 1024, "heads": 4, "encoder_layers": 3, "decoder_layers": 3}, 4000, 24, 24),
    "quick": ({"width": 64, "ffn_width": 128, "heads": 2, "encoder_layers": 1, "decoder_layers": 1}, 500, 6, 10),
}
"""Architecture, vocabulary, sentences and tokens of a micro-batch."""
_BUCKET = 1_000_000


def make_config(size: str, stage: str, precision: str, zero_stage: int) -> RunConfig:
    architecture = {**SIZES[size][0], "max_positions": 64, "dropout": 0.1}
    tree: dict[str, Any] = {
        "data": {"synthetic": {}},
        "runtime": {"device": "cpu", "threads": 1},
        "teacher": {"architecture": architecture},
        "cmlm": {"architecture": architecture},
        "engine": {},
        "deepspeed": {"zero_optimization": {"reduce_bucket_size": _BUCKET}},
    }
    tree[stage] |= {"zero_stage": zero_stage, "precision": precision}
    return parse_config(tree)


def make_work(size: str, stage: str, ranks: int) -> Work:
    _, vocabulary, sentences, tokens = SIZES[size]
    return Work(stage, vocabulary, sentences, tokens, tokens, accumulate=max(1, MICRO_BATCHES // ranks))


def launch(ranks: int, task: dict[str, Any]) -> dict[str, Any]:
    """What rank 0 of `ranks` new processes found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += ["-m", "benchmarks.bench_scaling", "--worker", json.dumps(task)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        command, cwd=harness.HERE.parent, env=environment, capture_output=True, text=True, timeout=580, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{ranks} ranks, {task}: {done.stderr[-3000:]}")
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return result


def work(task: dict[str, Any]) -> None:
    """In each rank: time updates, stages in turn; then losses, traffic, or memory, as the task asks."""
    from benchmarks import memory
    from benchmarks.collectives import Recorder
    from engine_fast.distributed import start
    from engine_fast.distributed.runtime import leave

    recorder = Recorder()
    recorder.install()
    size, stage = task["size"], task["stage"]
    configs = {z: make_config(size, stage, task["precision"], z) for z in task["zero_stages"]}
    world = start(next(iter(configs.values())).runtime)
    job = make_work(size, stage, world.size)
    result: dict[str, Any] = {}
    if task["what"] == "memory":
        (config,) = configs.values()
        peaks = memory.peaks_on_cpu(lambda: build(config, job, world), job, updates=3)
        result = {"peak": max(peaks[name] for name in ("forward", "backward", "step"))}
    else:
        engines = {z: build(config, job, world).engine for z, config in configs.items()}
        numbers = dict.fromkeys(engines, 0)

        def advance(z: int) -> float:
            numbers[z] += 1
            return update(engines[z], job, numbers[z])

        losses = {z: [advance(z) for _ in range(LOSSES)] for z in engines}
        seconds: dict[int, list[float]] = {z: [] for z in engines}
        cpu_seconds: dict[int, list[float]] = {z: [] for z in engines}
        for round_number in range(task["repeats"]):
            order = list(engines) if round_number % 2 == 0 else list(reversed(list(engines)))
            for z in order:
                world.barrier()
                began, cpu = time.perf_counter(), time.process_time()
                advance(z)
                world.barrier()
                seconds[z].append(time.perf_counter() - began)
                cpu_seconds[z].append(time.process_time() - cpu)
        traffic = (
            {z: _traffic(recorder, engines[z], job, lambda z=z: advance(z)) for z in engines} if world.size == 2 else {}
        )
        result = {"losses": losses, "seconds": seconds, "cpu_seconds": cpu_seconds, "traffic": traffic}
        result["parameters"] = next(iter(engines.values())).num_parameters
    if world.is_main:
        print("RESULT " + json.dumps(result), flush=True)
    leave(0)


def _traffic(recorder: Any, engine: Any, job: Work, run: Any) -> dict[str, Any]:
    """Bytes and calls of a micro-batch and of the rest of an update; seconds of sending and waiting of an update."""
    began = time.perf_counter()
    with recorder.recording():
        run()
    total, calls, sent = time.perf_counter() - began, recorder.calls, recorder.bytes
    found = {"seconds": total, "sending": recorder.seconds, "waiting": recorder.waiting}
    one = replace(job, accumulate=1)
    with recorder.recording():
        update(engine, one, 1)
    extra = job.accumulate - 1
    for name, many, few in (("bytes", sent, recorder.bytes), ("calls", calls, recorder.calls)):
        micro = {kind: (many[kind] - few[kind]) / extra for kind in many}
        found |= {f"micro_{name}": micro, f"update_{name}": {k: few[k] - micro.get(k, 0.0) for k in many}}
    return found


def flop_per_token(run: RunConfig, stage: str) -> float:
    """Of forward and backward, a target token, by torch's own products: the plain definitions of the fused heads."""
    from engine_fast.distributed import start

    tree = run.model_dump(mode="json", exclude_unset=True)
    tree[stage] |= {"zero_stage": 0, "precision": "fp32"}
    tree["runtime"] = {"device": "cpu", "threads": 1}
    config = parse_config(tree)
    job = Work(stage, run.data.vocabulary.size, 8, 25, 25)
    objective = build(config, job, start(config.runtime)).engine._objective
    with ops.using("reference"), FlopCounterMode(display=False) as counter:
        objective(micro_batch(job, 0)).total.backward()
    return float(counter.get_total_flops()) / (job.sentences * job.target)


def figures_of(rows: dict[int, dict[str, Any]]) -> dict[str, float]:
    """What floors judge."""
    figures: dict[str, float] = {"loss_difference": max(row["loss_difference"] for row in rows.values())}
    for z, row in rows.items():
        figures[f"speedup_{z}"] = row["speedup"]
        figures[f"cpu_speedup_{z}"] = row["cpu_speedup"]
        if z:
            figures[f"memory_{z}_over_0"] = row["peak_mib"]["2"] / rows[0]["peak_mib"]["2"] if 0 in rows else 1.0
    return figures


def measure(size: str, options: argparse.Namespace) -> tuple[dict[int, dict[str, Any]], int]:
    """ZeRO stage -> its row; the number of parameters."""
    task = {"size": size, "stage": options.stage, "precision": options.precision, "zero_stages": options.stages}
    task |= {"what": "speed", "repeats": options.repeats}
    found: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for round_number in range(options.rounds):
        for ranks in (1, 2) if round_number % 2 == 0 else (2, 1):
            found[ranks].append(launch(ranks, task))
    oversubscribed = launch(4, task | {"repeats": 0})
    rows = {}
    for z in options.stages:
        key = str(z)
        row: dict[str, Any] = {}
        for name, figure in (("seconds", "speedup"), ("cpu_seconds", "cpu_speedup")):
            times = {ranks: [t for each in found[ranks] for t in each[name][key]] for ranks in (1, 2)}
            medians = {ranks: statistics.median(values) for ranks, values in times.items()}
            row[figure] = medians[1] / medians[2]
            row[f"{figure}_spread"] = {
                str(ranks): (max(values) - min(values)) / medians[ranks] for ranks, values in times.items()
            }
            row[f"{name}_an_update"] = {str(ranks): value for ranks, value in medians.items()}
        losses = [each["losses"][key] for each in (*found[1], *found[2], oversubscribed)]
        row["losses"] = {"1": losses[0], "2": found[2][0]["losses"][key], "4": oversubscribed["losses"][key]}
        row["loss_difference"] = max(abs(a / b - 1) for each in losses for a, b in zip(each, losses[0], strict=True))
        parts = [each["traffic"][key] for each in found[2]]
        row["communication"] = statistics.median(part["sending"] / part["seconds"] for part in parts)
        row["waiting"] = statistics.median(part["waiting"] / part["seconds"] for part in parts)
        row["traffic"] = {name: value for name, value in parts[0].items() if "_" in name}
        row["peak_mib"], row["planned_mib"] = {}, {}
        for ranks in (1, 2):
            peak = launch(ranks, task | {"what": "memory", "zero_stages": [z]})["peak"]
            row["peak_mib"][str(ranks)] = peak / harness.MiB
            row["planned_mib"][str(ranks)] = _planned(size, options, z, ranks) / harness.MiB
        rows[z] = row
    return rows, found[1][0]["parameters"]


def _planned(size: str, options: argparse.Namespace, zero_stage: int, ranks: int) -> int:
    job = make_work(size, options.stage, ranks)
    config = make_config(size, options.stage, options.precision, zero_stage)
    tree = config.model_dump(mode="json", exclude_unset=True)
    tree[options.stage]["batch"] = {"accumulate": job.accumulate}
    shape = Shape(job.sentences, job.source, job.target)
    plan = plan_memory(
        parse_config(tree), options.stage, ranks=ranks, device="cpu", shape=shape, vocabulary=job.vocabulary
    )
    return max(plan.moments[name] for name in ("forward", "backward", "step")) + plan.host_total


def projections(
    rows: dict[int, dict[str, Any]], parameters: int, run: RunConfig, options: argparse.Namespace
) -> dict[str, Any]:
    """For every ZeRO stage and number of GPUs: `run`'s model and micro-batch on each, bytes a parameter as counted."""
    assumptions = Assumptions(**{field.name: getattr(options, field.name) for field in fields(Assumptions)})
    settings = getattr(run, options.stage)
    size = plan_memory(run, options.stage, ranks=1).parameters
    tokens, flop = settings.batch.max_tokens, flop_per_token(run, options.stage)
    table = []
    for z, row in rows.items():
        micro, rest = (
            Traffic(
                {kind: value * size / parameters for kind, value in row["traffic"][f"{part}_bytes"].items()},
                row["traffic"][f"{part}_calls"],
            )
            for part in ("micro", "update")
        )
        for ranks in PROJECTED:
            each = project(
                ranks, flop=tokens * flop, micro=micro, update=rest,
                accumulate=settings.batch.accumulate, assumptions=assumptions,
            )  # fmt: skip
            exposed, hidden = each.efficiency
            times = {"compute_ms": each.compute * 1e3, "communication_ms": each.communication * 1e3}
            shares = {"efficiency": exposed, "efficiency_overlapped": hidden}
            table.append({"zero_stage": z, "gpus": ranks, **times, **shares})
    return {
        "note": "Not measured: a cost model, see benchmarks/projection.py.",
        "assumptions": asdict(assumptions),
        "parameters": size,
        "tokens": tokens,
        "accumulate": settings.batch.accumulate,
        "mflop_a_token": flop / 1e6,
        "bytes_counted_in": options.precision,
        "rows": table,
    }


def print_projection(found: dict[str, Any], config: str) -> None:
    assumed = ", ".join(f"{name} {value:g}" for name, value in found["assumptions"].items())
    print(f"\nPROJECTION, not measured. Assumed: {assumed}.")
    print(
        f"{config}: {found['parameters'] / 1e6:.1f} M parameters, {found['tokens']} positions a micro-batch, "
        f"{found['accumulate']} of them an update and GPU, {found['mflop_a_token']:.0f} MFLOP a position; "
        f"bytes a parameter as counted in {found['bytes_counted_in']}."
    )
    print("share of the time that is computation, nothing hidden / all hidden that can be; GPUs:")
    print("ZeRO " + "".join(f"{ranks:>13}" for ranks in PROJECTED))
    for z in sorted({row["zero_stage"] for row in found["rows"]}):
        cells = [
            f"{row['efficiency']:.2f} / {row['efficiency_overlapped']:.2f}"
            for row in found["rows"]
            if row["zero_stage"] == z
        ]
        print(f"{z:4} " + "".join(f"{cell:>13}" for cell in cells))


def describe(zero_stage: int, row: dict[str, Any], parameters: int) -> str:
    traffic, peak, planned = row["traffic"], row["peak_mib"], row["planned_mib"]
    sent = sum(traffic["micro_bytes"].values()) * MICRO_BATCHES / 2 + sum(traffic["update_bytes"].values())
    return (
        f"ZeRO {zero_stage}: 2 ranks {row['speedup']:.2f} times 1 (CPU seconds {row['cpu_speedup']:.2f}), sending "
        f"{row['communication']:.0%}, waiting {row['waiting']:.0%}, {sent / parameters:.1f} bytes a parameter, "
        f"peak {peak['1']:.0f} and {peak['2']:.0f} MiB (planned {planned['1']:.0f} and {planned['2']:.0f}), "
        f"losses of 1, 2 and 4 ranks within {row['loss_difference']:.0e}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_scaling", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="small models; no floor is judged, nothing is written")
    parser.add_argument("--stages", nargs="+", type=int, choices=range(4), default=[0, 1, 2, 3], help="of ZeRO")
    parser.add_argument("--stage", choices=("teacher", "cmlm", "engine"), default="engine", help="what is trained")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=3, help="starts of each number of ranks")
    parser.add_argument("--repeats", type=int, default=4, help="timed updates of each ZeRO stage in each start")
    parser.add_argument("--config", default="configs/wmt16_ro_en.yaml", help="projection: whose model and batches")
    for field in fields(Assumptions):
        kind = int if isinstance(field.default, int) else float
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(
            flag, type=kind, default=field.default, help="projection, an assumption; default %(default)s"
        )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(json.loads(options.worker))
        return 0
    size = "quick" if options.quick else "full"
    torch.set_num_threads(1)
    rows, parameters = measure(size, options)
    for z, row in rows.items():
        print(describe(z, row, parameters), flush=True)
    projected = projections(rows, parameters, load_config(options.config), options)
    print_projection(projected, options.config)
    if options.quick:
        return 0
    figures = figures_of(rows)
    problems = harness.judge(figures, harness.floors("scaling"))
    content = {
        "size": dict(zip(("architecture", "vocabulary", "sentences", "tokens"), SIZES[size], strict=True)),
        "stage": options.stage, "precision": options.precision, "parameters": parameters,
        "micro_batches": MICRO_BATCHES, "figures": figures, "below_floor": problems,
        "zero_stages": {str(z): row for z, row in rows.items()},
        "projection": projected,
    }  # fmt: skip
    path = harness.write_results("scaling", content)
    print(f"written: {path.relative_to(harness.RESULTS.parent.parent)}")
    for problem in problems:
        print(f"below the floor: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
