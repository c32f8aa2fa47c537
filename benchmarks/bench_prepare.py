"""Time and memory of engine-fast prepare on a real corpus: python -m benchmarks.bench_prepare [--corpus deen_mix]

Each vocabulary kind runs in a fresh process. `cpu_seconds` counts all threads, and unlike `seconds` depends little on
what else the machine was doing. The corpus is looked for under ENGINE_FAST_DATA.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import harness
from engine_fast.config import BatchConfig, DataConfig, VocabularyConfig
from engine_fast.data.batching import BatchPlan
from engine_fast.data.catalog import CATALOG, resolve
from engine_fast.data.prepare import Prepared, prepare
from engine_fast.errors import DataError

KINDS = ("bpe", "unigram")


def measure(corpus: str, kind: str, size: int, workers: int) -> dict[str, float]:
    """Prepare once, in this process. Peak memory includes the interpreter and its libraries."""
    entry = CATALOG[corpus]
    config = DataConfig(
        corpus=corpus,
        source_language=entry.languages[0],
        target_language=entry.languages[1],
        pretokenised=entry.pretokenised,
        vocabulary=VocabularyConfig(kind=kind, size=size),
        workers=workers,
    )
    with tempfile.TemporaryDirectory() as scratch:
        before = time.process_time()
        report = prepare(config, Path(scratch) / "prepared", seed=1)
        cpu_seconds = time.process_time() - before
        train = Prepared.open(Path(scratch) / "prepared").split("train")
        start = time.perf_counter()
        plan = BatchPlan(train, BatchConfig(), seed=1)
        plan.updates(0)
        epoch_seconds = time.perf_counter() - start
        padding = plan.padding_share(0)
    return {
        "pairs": report.splits["train"].read,
        "kept": report.splits["train"].kept,
        "seconds": report.seconds,
        "cpu_seconds": cpu_seconds,
        "pairs_per_second": report.pairs_per_second,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "epoch_order_seconds": epoch_seconds,
        "padding_share": padding,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_prepare", description=__doc__)
    parser.add_argument("--corpus", choices=sorted(CATALOG), default="deen_mix")
    parser.add_argument("--size", type=int, default=10000, help="pieces of the joint vocabulary")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.corpus, options.measure, options.size, options.workers)))
        return 0
    try:
        resolve(options.corpus)
    except DataError as error:
        print(f"not measured: {error}", file=sys.stderr)
        return 2
    arguments = [f"--{name}={getattr(options, name)}" for name in ("corpus", "size", "workers")]
    rows: dict[str, Any] = {}
    for kind in KINDS:
        row = harness.in_fresh_process("benchmarks.bench_prepare", *arguments, f"--measure={kind}")
        rows[kind] = row
        print(
            f"{options.corpus} {kind:8} {row['pairs']:8.0f} pairs  {row['seconds']:6.1f} s "
            f"({row['cpu_seconds']:.1f} s of CPU)  {row['pairs_per_second']:7.0f} pairs/s  "
            f"peak {row['peak_mib']:5.0f} MiB  padding {row['padding_share']:.1%}  "
            f"order of an epoch {row['epoch_order_seconds']:.2f} s",
            flush=True,
        )
    figures = {
        "seconds": rows["bpe"]["seconds"],
        "peak_mib": max(row["peak_mib"] for row in rows.values()),
        "padding_share": max(row["padding_share"] for row in rows.values()),
    }
    problems = harness.judge(figures, harness.floors("prepare"))
    settings = {"corpus": options.corpus, "vocabulary_size": options.size, "workers": options.workers}
    path = harness.write_results("prepare", {**settings, "kinds": rows, "figures": figures, "below_floor": problems})
    print(f"written: benchmarks/results/{path.name}")
    for problem in problems:
        print(f"below the floor: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
