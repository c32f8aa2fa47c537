"""What every case of the matrix starts from, made once: a run before ENGINE, one in the midst of it, a whole one."""

from __future__ import annotations

import fcntl
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import launches, recipe
from tests.cluster.nodes import Cluster


@dataclass(frozen=True, slots=True)
class Materials:
    """Directories of runs, all of one configuration."""

    config: Path
    fresh: Path
    """ENGINE is next."""
    half: Path
    """Died in update 5 of ENGINE; snapshots of updates 2 and 4."""
    whole: Path
    """Two ranks, never interrupted."""

    def copy(self, kind: str, out: Path) -> Path:
        shutil.copytree(getattr(self, kind), out, dirs_exist_ok=True)
        return out


def materials(directory: Path, cluster: Cluster) -> Materials:
    """Those under `directory`; whoever comes first makes them, others wait."""
    directory.mkdir(parents=True, exist_ok=True)
    made = Materials(*(directory / name for name in ("micro.yaml", "fresh", "half", "whole")))
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.config.exists():
            _make(made, cluster)
            recipe.write_config(made.config)
    return made


def _make(made: Materials, cluster: Cluster) -> None:
    directory = made.config.parent
    config = recipe.write_config(directory / "making.yaml")
    subprocess.run(
        [sys.executable, "-m", "tests.cluster.recipe", str(config), str(directory / "before")],
        cwd=launches.ROOT, env=launches.environment(directory), check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    recipe.copy_base(directory / "before", made.fresh)
    shutil.copytree(made.fresh, made.whole)
    with launches.Launch(cluster, config, made.whole, "--ranks", "2") as launch:
        if launch.wait():
            raise RuntimeError(f"the uninterrupted run failed\n{launch.said()}\n{launch.logs()}")
    shutil.copytree(made.fresh, made.half)
    plan = {"moment": "step", "number": 5, "rank": 1, "action": "pause"}
    with launches.Launch(cluster, config, made.half, "--ranks", "2", plan=plan) as launch:
        reached = launch.reached()
        latest = made.half / "engine" / "checkpoints" / "latest"
        launches.wait(lambda: latest.read_text() == "update-00000004\n", 60, lambda: "update 4 was not sealed")
        cluster.head.kill(reached["pid"], signal.SIGKILL)
        launch.release()
        if not launch.wait():
            raise RuntimeError(f"a rank that was killed was held for a success\n{launch.said()}")
