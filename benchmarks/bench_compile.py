"""Does torch.compile of the stacks help? The ENGINE step with the student's, the teacher's, both compiled, over eager.

    python -m benchmarks.bench_compile [--quick] [--device cpu|cuda] [--threads N] [--rounds N]

Settings `engine.compile` and `engine.teacher_compile`. Sizes, batches and step are bench_step's; the calls that compile
are not timed, but counted. Batches of three lengths share the compiled code, whose shapes are dynamic.
Writes benchmarks/results/compile.json, on a GPU results/gpu/compile.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch

from benchmarks import bench_step, harness

WAYS = ("ours", "compiled_student", "compiled_teacher", "compiled")


def measure(dtype: str, size: bench_step.Size, device: str) -> dict[str, dict[str, float]]:
    """way -> speed over eager (median over the batches' lengths), spread of its times, seconds of its first calls."""
    batches = bench_step.make_batches(size, device)
    steps = {way: bench_step.make_step("engine", f"{way}-{dtype}", size, device) for way in WAYS}
    rows: dict[str, dict[str, float]] = {}
    for way, step in steps.items():
        started = time.monotonic()
        for batch in batches:
            step.run(batch)
        rows[way] = {"first_calls_seconds": time.monotonic() - started, "spread": 0.0}
    ratios: dict[str, list[float]] = {way: [] for way in WAYS}
    for batch in batches:
        runs = {way: bench_step.bind(step, batch) for way, step in steps.items()}
        timed = harness.interleave(runs, rounds=size.rounds, device=device)
        for way, row in timed.items():
            ratios[way].append(timed["ours"]["seconds"] / row["seconds"])
            rows[way]["spread"] = max(rows[way]["spread"], row["spread"])
    return {way: row | {"speed_over_eager": statistics.median(ratios[way])} for way, row in rows.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="small models; nothing is written")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="timed runs of each way on each batch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = bench_step.size_of("engine", quick=options.quick, rounds=options.rounds)
    rows = {}
    for dtype in bench_step.DTYPES:
        rows[dtype] = measure(dtype, size, options.device)
        for way, row in rows[dtype].items():
            print(
                f"{dtype} {way:18} {row['speed_over_eager']:.2f} times eager  spread {row['spread']:4.0%}  "
                f"first calls {row['first_calls_seconds']:.0f} s",
                flush=True,
            )
        torch.compiler.reset()
    if not options.quick:
        path = harness.write_results("compile", {"size": vars(size), "steps": rows}, device=options.device)
        print(f"written: {path.relative_to(harness.RESULTS.parent.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
