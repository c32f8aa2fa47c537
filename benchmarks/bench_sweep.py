"""What a sweep costs besides its training steps: python -m benchmarks.bench_sweep [--pairs 25] [--updates 150]

The 25 pairs of operators of configs/tables/table2_transformer.yaml on the demo corpus, in one process. Teacher and
baseline get a few updates only, for nothing here depends on how good they are; what is timed begins when all that the
trials share is done, and ends with the table. `ratio` is that time over the seconds of the trials' updates, which each
trial's metrics.jsonl holds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import harness
from engine_fast.config import find_config, load_config
from engine_fast.evaluation.report import read_metrics
from engine_fast.recipes.graph import read_record
from engine_fast.recipes.run import run

OPERATORS = ("SX", "STL", "SG", "ST", "GX")


def measure(config: str, pairs: int, updates: int) -> dict[str, float]:
    """Run the sweep once, in this process."""
    chosen = [(o1, o2) for o1 in OPERATORS for o2 in OPERATORS][:pairs]
    trials = [{"name": f"{o1}-{o2}", "set": {"engine.o1": o1, "engine.o2": o2}} for o1, o2 in chosen]
    settings = load_config(
        find_config(Path(config)),
        [
            "teacher.max_updates=4", "cmlm.max_updates=4", "engine.data=references", "sweep.processes=1",
            "sweep.grid={}", f"sweep.trials={json.dumps(trials)}", f"engine.max_updates={updates}",
            f"engine.checkpoint_every={updates}", f"engine.validate_every={updates}",
        ],
    )  # fmt: skip
    started: list[float] = []

    def say(line: str) -> None:
        if line.startswith("sweep:"):
            started.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        run(settings, out, say=say)
        wall = time.perf_counter() - started[0]
        places = [out / "trials" / f"{o1}-{o2}" for o1, o2 in chosen]
        lines = [read_metrics(place / "engine" / "metrics.jsonl") for place in places]
        records = {name: [read_record(place / name) or {} for place in places] for name in ("engine", "evaluate")}
    steps = sum(max(line["seconds"] for line in trial if line["kind"] == "train") for trial in lines)
    validation = sum(line["seconds"] for trial in lines for line in trial if line["kind"] == "valid")
    training, evaluation = (sum(record["seconds"] for record in records[name]) for name in ("engine", "evaluate"))
    return {
        "ratio": wall / steps,
        "wall_seconds": wall,
        "step_seconds": steps,
        "validation_seconds": validation,
        "rest_of_training_seconds": training - steps - validation,
        "evaluation_seconds": evaluation,
        "rest_seconds": wall - training - evaluation,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_sweep", description=__doc__)
    parser.add_argument("--config", default="configs/tables/table2_transformer.yaml")
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--smoke", action="store_true", help="two pairs of ten updates; judge and write nothing")
    options = parser.parse_args()
    if options.smoke:
        print(json.dumps(measure(options.config, 2, 10), indent=2))
        return 0
    figures = measure(options.config, options.pairs, options.updates)
    content: dict[str, Any] = {"pairs": options.pairs, "updates": options.updates, **figures}
    print(json.dumps(content, indent=2))
    print(harness.write_results(f"sweep_{options.updates}", content))
    problems = harness.judge(figures, harness.floors("sweep"))
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
