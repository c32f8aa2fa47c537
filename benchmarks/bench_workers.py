"""Threads against worker processes on one text: wall clock and CPU seconds, interleaved, models loaded beforehand.

    python -m benchmarks.bench_workers --model DIR --text FILE [--lines 4000] [--processes 2] [--rounds 5]

CPU seconds tell on a busy machine what the clock cannot: threads that wait for each other spin. Writes
benchmarks/results/workers.json; judges nothing, for what is better depends on the model and on the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from itertools import islice
from pathlib import Path

import torch

from benchmarks import harness
from engine_fast.data.text import iter_lines
from engine_fast.inference.load import load
from engine_fast.inference.workers import Workers


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of these processes, all threads together (proc(5), fields 14 and 15)."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--lines", type=int, default=4000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    lines = list(islice(iter_lines(args.text), args.lines))
    window = max(1, len(lines) // (4 * args.processes))
    one = load(args.model, window=window)
    found: dict[str, list[tuple[float, float]]] = {}
    with Workers(args.model, num_workers=args.processes, threads=1, window=window) as pool:
        pids = [os.getpid(), *pool.pids]
        for _ in range(args.rounds):
            for name in ("1 thread", f"{args.processes} threads", f"{args.processes} workers"):
                cpu, clock = cpu_seconds(pids), time.perf_counter()
                if name.endswith("workers"):
                    count = sum(1 for _ in pool.stream(lines))
                else:
                    torch.set_num_threads(int(name.split()[0]))
                    count = sum(1 for _ in one.stream(lines))
                assert count == len(lines)
                found.setdefault(name, []).append((time.perf_counter() - clock, cpu_seconds(pids) - cpu))
    rows = {}
    for name, measured in found.items():
        speeds, per_cpu = ([len(lines) / seconds for seconds in column] for column in zip(*measured, strict=True))
        middle = statistics.median(speeds)
        rows[name] = {
            "lines_per_second": middle,
            "spread": (max(speeds) - min(speeds)) / middle,
            "lines_per_cpu_second": statistics.median(per_cpu),
        }
    print(json.dumps(rows, indent=2))
    print(harness.write_results("workers", {"lines": len(lines), "rounds": args.rounds, "rows": rows}))


if __name__ == "__main__":
    main()
