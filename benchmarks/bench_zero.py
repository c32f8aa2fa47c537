"""One GPU under every ZeRO stage: speed, and the memory that torch hands out against what was planned.

    python -m benchmarks.bench_zero [--quick] [--device cpu|cuda] [--seconds 200] [--only TEXT]

A case is the ENGINE stage at the paper's size (6+6 layers, 512, 2048, V = 32000 and micro-batches of 4096 target
positions) under some settings, in a process of its own: some updates are run in, the rest timed. Speed is compared with
the case `plain`; memory is torch.cuda.max_memory_allocated above what stood before, over the plan. Cases that the time
does not reach are left out, and named.

--quick: small models, few updates. On a CPU the memory is counted as in memory.py, and cases that need a GPU are left
out. Writes benchmarks/results/gpu/zero.json on "cuda" (of a --quick run: build/gpu/zero-quick.json, not to be kept).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.updates import Work
from engine_fast.config import RunConfig, parse_config
from engine_fast.training.plan import Shape, plan_memory

CASES: dict[str, dict[str, Any]] = {
    "plain": {"zero_stage": 1},
    "zero 2": {"zero_stage": 2},
    "zero 3": {"zero_stage": 3},
    "fp32, zero 0": {"zero_stage": 0, "precision": "fp32"},
    "fp32, fp16 teacher": {"zero_stage": 0, "precision": "fp32", "teacher_precision": "fp16"},
    "fp32, bf16 teacher": {"zero_stage": 0, "precision": "fp32", "teacher_precision": "bf16"},
    "recompute": {"zero_stage": 1, "head_memory": "recompute"},
    "offload optimizer": {"zero_stage": 2, "offload": {"optimizer": True}},
    "offload both": {"zero_stage": 3, "offload": {"optimizer": True, "parameters": True}},
    "fp16": {"zero_stage": 2, "precision": "fp16"},
    "checkpointing": {"zero_stage": 1, "activation_checkpointing": True, "teacher_checkpointing": True},
    "no overlap": {"zero_stage": 2, "overlap_communication": False},
    "bucket of 5e8": {"zero_stage": 2, "bucket": 500_000_000},
    "teacher compiled": {"zero_stage": 1, "teacher_compile": True},
    "compile": {"zero_stage": 1, "compile": True, "teacher_compile": True},
}
"""In the order of their worth, compilers last, for they may take all that is left. bf16 unless said otherwise,
a bucket of 5e7."""
_CASE_SECONDS = 90
"""A case that takes longer is cut off, for the sake of the others."""
GPU_ONLY = {"fp32, fp16 teacher", "fp16"}
SIZES = {
    "full": ({"width": 512, "ffn_width": 2048, "heads": 8}, 32000, 128, 32),
    "quick": ({"width": 64, "ffn_width": 128, "heads": 2, "encoder_layers": 1, "decoder_layers": 1}, 500, 8, 10),
}
"""Architecture, vocabulary, sentences and tokens."""


def make_config(case: str, size: str, device: str) -> RunConfig:
    settings = {"precision": "bf16", **CASES[case]}
    bucket = settings.pop("bucket", 50_000_000 if size == "full" else 20_000)
    architecture = {**SIZES[size][0], "max_positions": 64, "dropout": 0.1}
    return parse_config(
        {
            "data": {"synthetic": {}},
            "runtime": {"device": device},
            "teacher": {"architecture": architecture},
            "cmlm": {"architecture": architecture},
            "engine": settings,
            "deepspeed": {"zero_optimization": {"reduce_bucket_size": bucket}},
        }
    )


def make_work(size: str) -> Work:
    _, vocabulary, sentences, tokens = SIZES[size]
    return Work("engine", vocabulary, sentences, tokens, tokens)


def measure_here(case: str, size: str, device: str) -> dict[str, float]:
    """Seconds of an update and peak bytes, in this process."""
    from benchmarks import memory, updates
    from engine_fast.distributed import start

    config, work = make_config(case, size, device), make_work(size)
    world = start(config.runtime)
    run_in, timed = (4, 12) if size == "full" else (2, 3)
    if device == "cuda":
        built: list[updates.Training] = []

        def build() -> updates.Training:
            built.append(updates.build(config, work, world))
            return built[0]

        peak = memory.peak_on_cuda(build, work, updates=run_in)["update"]
        engine = built[0].engine
        torch.cuda.synchronize()
    else:
        peaks = memory.peaks_on_cpu(lambda: updates.build(config, work, world), work, updates=run_in + 1)
        peak = max(peaks[name] for name in ("forward", "backward", "step"))
        engine = updates.build(config, work, world).engine
        updates.update(engine, work, 0)
    began = time.perf_counter()
    for number in range(timed):  # each ends with its loss on the host
        updates.update(engine, work, 100 + number)
    return {"seconds": (time.perf_counter() - began) / timed, "peak_bytes": peak}


def measure(case: str, size: str, device: str, limit: float) -> dict[str, Any]:
    """The same in a new process, beside the plan; or the reason why there is nothing."""
    command = [sys.executable, "-m", "benchmarks.bench_zero", "--measure", case, "--device", device]
    command += ["--quick"] * (size == "quick")
    try:
        done = subprocess.run(
            command, cwd=harness.HERE.parent, capture_output=True, text=True, timeout=limit, check=False,
            env=os.environ | ({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} if device == "cpu" else {}),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"cut off after {limit:.0f} s"}
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if done.returncode or line is None:
        return {"failed": " ".join(done.stderr.split())[-600:] or f"exit code {done.returncode}"}
    found = json.loads(line.removeprefix("RESULT "))
    work = make_work(size)
    shape = Shape(work.sentences, work.source, work.target)
    plan = plan_memory(
        make_config(case, size, device), "engine", ranks=1,
        device="cuda" if device == "cuda" else "cpu", shape=shape, vocabulary=work.vocabulary,
    )  # fmt: skip
    planned = max(plan.moments[name] for name in ("forward", "backward", "step"))
    planned += plan.host_total if device == "cpu" else 0
    tokens = work.sentences * work.target
    return {
        "tokens_per_second": tokens / found["seconds"],
        "peak_gib": found["peak_bytes"] / 2**30,
        "planned_gib": planned / 2**30,
        "planned_over_peak": planned / found["peak_bytes"],
    }


def _write(options: argparse.Namespace, size: str, rows: dict[str, Any], left_out: list[str]) -> Path:
    content = {"size": SIZES[size], "cases": rows, "left_out": left_out}
    if not options.quick and options.device == "cuda":
        return harness.write_results("zero", content, device="cuda")
    path = Path("build/gpu/zero-quick.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": harness.machine(options.device), **content}, indent=2) + "\n")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_zero",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="small models, for a try of the script itself")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda, and nothing where there is none")
    parser.add_argument("--seconds", type=float, default=200, help="no case is started after these")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device is None:
        if not torch.cuda.is_available():
            print("left out: it needs a GPU. --quick --device cpu tries the script itself.")
            return 0
        options.device = "cuda"
    size = "quick" if options.quick else "full"
    if options.measure:
        print("RESULT " + json.dumps(measure_here(options.measure, size, options.device)), flush=True)
        return 0
    began, rows, left_out = time.monotonic(), {}, []
    for case in (case for case in CASES if options.only in case):
        left = options.seconds - (time.monotonic() - began)
        if left < 5 or (options.device == "cpu" and case in GPU_ONLY):
            left_out.append(case)
            continue
        rows[case] = row = measure(case, size, options.device, left if "compile" in case else min(left, _CASE_SECONDS))
        _write(options, size, rows, left_out)  # who cuts this off keeps what there is
        if "failed" in row:
            print(f"{case:22} FAILED: {row['failed']}", flush=True)
            continue
        base = rows.get("plain", {}).get("tokens_per_second")
        if base:
            row["speed_over_plain"] = row["tokens_per_second"] / base
        beside = f" ({row['speed_over_plain']:.2f} of plain)" if base else ""
        print(
            f"{case:22} {row['tokens_per_second']:9.0f} tokens/s{beside}  peak {row['peak_gib']:.3f} GiB, planned "
            f"{row['planned_gib']:.3f} ({row['planned_over_peak']:.2f})",
            flush=True,
        )
    if left_out:
        print(f"left out: {', '.join(left_out)}")
    print(f"written: {_write(options, size, rows, left_out)}")
    return 1 if not rows or any("failed" in row for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
