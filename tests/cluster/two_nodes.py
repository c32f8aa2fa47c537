"""The demo's ENGINE stage over two nodes, killed in the middle, against the same stage in one process.

    python -m tests.cluster.two_nodes --out benchmarks/results [--work DIR]

Two network namespaces with an sshd each; ZeRO-3, a bf16 teacher, one kill -9 of the second node's rank, and a launcher
that is told --max-restarts 1. The one process has the same configuration: batch.micro_batches counts micro-batches over
all ranks, so both make the same updates but for rounding. With --work, what is finished is kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engine_fast.config import dump_config, load_config
from tests.cluster import launches, recipe
from tests.cluster.launches import Launch
from tests.cluster.nodes import Cluster, obstacle

SETTINGS = (
    "engine.zero_stage=3",
    "engine.teacher_precision=bf16",
    "engine.batch.max_tokens=2048",
    "engine.batch.max_sentences=64",
    "engine.batch.micro_batches=2",
    "engine.checkpoint_every=50",
)
"""Over configs/demo.yaml; two micro-batches of half the demo's size are its update."""
KILLED_IN = 160
"""Update in which the rank is killed."""
TOLERANCE = 0.5
"""BLEU. Rounding alone differs, and it moves single words of 500 sentences."""


def compare(work: Path) -> dict[str, Any]:
    """Train whatever is not there yet under `work`; the figures of both runs."""
    work.mkdir(parents=True, exist_ok=True)
    config = work / "demo.yaml"
    config.write_text(dump_config(load_config(launches.ROOT / "configs" / "demo.yaml", list(SETTINGS))))
    _run("-m", "tests.cluster.recipe", str(config), str(work / "before"))
    single, nodes = work / "single", work / "nodes"
    if not single.exists():
        recipe.copy_base(work / "before", single)
    started = time.monotonic()
    _run("-m", "engine_fast.cli.main", "run", str(config), "--out", str(single))
    seconds = {"single process": round(time.monotonic() - started, 1)}
    shutil.rmtree(nodes, ignore_errors=True)
    recipe.copy_base(work / "before", nodes)
    with tempfile.TemporaryDirectory() as keys, Cluster(Path(keys) / "cluster") as cluster:
        hostfile = cluster.hostfile(work / "hostfile")
        plan = {"moment": "step", "number": KILLED_IN, "rank": 1, "action": "pause"}
        options = ("--hostfile", hostfile, "--max-restarts", "1")
        with Launch(cluster, config, nodes, *options, plan=plan, hang_seconds=120) as launch:
            reached = launch.reached(limit=900)
            cluster.nodes[1].kill(reached["pid"], signal.SIGKILL)
            launch.release()
            code = launch.wait(limit=1800)
            seconds["two nodes, killed once"] = round(launch.seconds, 1)
            said = launch.said()
            left = launches.all_gone(cluster)
    if code:
        raise RuntimeError(f"the launcher ended with {code}\n{said}")
    figures = {"single process": _figures(single), "two nodes, killed once": _figures(nodes)}
    difference = abs(figures["single process"]["bleu"] - figures["two nodes, killed once"]["bleu"])
    attempts = sorted(path.name for path in (nodes / "launch").glob("attempt-*"))
    return {
        "runs": figures,
        "bleu_difference": difference,
        "bleu_tolerance": TOLERANCE,
        "weights_largest_difference": launches.distance(single, nodes),
        "killed": {"signal": "SIGKILL", "rank": 1, "host": reached["host"], "in_update": KILLED_IN},
        "attempts": len(attempts),
        "left_running": left,
        "agrees": difference <= TOLERANCE and len(attempts) == 2 and not left,
        "seconds": seconds,
        "settings": list(SETTINGS),
        "launch": "engine-fast launch demo.yaml --out OUT --hostfile HOSTFILE --max-restarts 1",
        "hostfile": hostfile.read_text().splitlines(),
    }


def _run(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, *arguments], cwd=launches.ROOT, env=launches.environment(Path("unused")), check=True
    )


def _figures(out: Path) -> dict[str, float]:
    """Of ENGINE in one pass."""
    results = json.loads((out / "results.json").read_text())
    row = next(row for row in results["systems"] if row["system"] == "engine" and row["iterations"] == 1)
    return {name: row[name] for name in ("bleu", "chrf", "energy", "valid")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for two_nodes.json")
    parser.add_argument("--work", type=Path, help="directory kept between calls; default: a temporary one")
    arguments = parser.parse_args()
    if reason := obstacle():
        sys.exit(f"two nodes: {reason}")
    with tempfile.TemporaryDirectory() as temporary:
        result = compare(arguments.work or Path(temporary))
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = {"command": "python -m tests.cluster.two_nodes --out benchmarks/results", **result}
    (arguments.out / "two_nodes.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    sys.exit(not result["agrees"])


if __name__ == "__main__":
    main()
