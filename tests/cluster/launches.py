"""One start of `engine-fast launch` from the head, watched and struck from outside."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from engine_fast.distributed.manifest import verify
from engine_fast.errors import CheckpointError
from tests.cluster.nodes import Cluster, Node, Process

ROOT = Path(__file__).resolve().parents[2]
FAULTS = Path(__file__).with_name("faults")
HANG_SECONDS, GRACE_SECONDS = 45, 12
"""Given to the launcher. The first is more than the 30 s after which a guard's silence tells more than a hang does."""
LIMIT = 150.0
"""Seconds after which a launcher that should have ended is held to be lost."""


def environment(control: Path) -> dict[str, str]:
    """All that the head's shell has set."""
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": os.environ.get("HOME", "/root"),
        "LANG": "C.UTF-8",
        "PYTHONPATH": f"{ROOT}:{FAULTS}",
        "OMP_NUM_THREADS": "1",
        "ENGINE_FAST_TEST_FAULT": str(control),
    }


class Launch:
    """`engine-fast launch CONFIG --out OUT`, started; a context manager that leaves nothing running."""

    def __init__(
        self,
        cluster: Cluster,
        config: Path,
        out: Path,
        *options: str | Path,
        plan: dict[str, Any] | None = None,
        hang_seconds: int = HANG_SECONDS,
    ) -> None:
        self.cluster, self.out = cluster, out
        self._control = out.with_name(out.name + ".control")
        shutil.rmtree(self._control, ignore_errors=True)
        self._control.mkdir()
        if plan is not None:
            (self._control / "plan.json").write_text(json.dumps(plan))
        self.arguments = [
            "launch", str(config), "--out", str(out), "--hang-seconds", str(hang_seconds),
            "--grace-seconds", str(GRACE_SECONDS), "--backoff", "1", "--forward", "ENGINE_FAST_TEST_FAULT",
            *map(str, options),
        ]  # fmt: skip
        command = cluster.head.inside([sys.executable, "-m", "engine_fast.cli.main", *self.arguments], cwd=ROOT)
        self._log = self._control / "said"
        self._started = time.monotonic()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(self._control)
            )

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        for node in (self.cluster.head, *self.cluster.nodes):
            for process in node.processes():
                try:
                    os.kill(process.outside, signal.SIGKILL)
                except ProcessLookupError:
                    pass  # it ended meanwhile
        self._process.kill()
        self._process.wait()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def said(self) -> str:
        """What the launcher has printed."""
        return self._log.read_text(errors="replace")

    def ended(self) -> bool:
        return self._process.poll() is not None

    def reached(self, limit: float = 120) -> dict[str, Any]:
        """Wait until the planned rank has come to the planned moment. Raises TimeoutError, with what was said."""
        path = self._control / "reached.json"
        wait(lambda: path.exists() or self.ended(), limit, lambda: f"the moment did not come\n{self.said()}")
        if not path.exists():
            raise TimeoutError(f"the launcher ended before the moment came\n{self.said()}")
        return dict(json.loads(path.read_text()))

    def release(self) -> None:
        """The rank that pauses goes on."""
        (self._control / "go").touch()

    def wake(self) -> None:
        """SIGCONT to the launcher, and to nsenter, which stops with what it started."""
        os.kill(self.launcher().outside, signal.SIGCONT)
        self._process.send_signal(signal.SIGCONT)

    def launcher(self) -> Process:
        """The process that a person started."""
        return next(
            process for process in self.cluster.head.processes() if process.parent == 0 and "launch" in process.command
        )

    def child(self) -> Process:
        """The launcher's own child: torchrun, or DeepSpeed's runner."""
        launcher = self.launcher()
        return next(process for process in self.cluster.head.processes() if process.parent == launcher.pid)

    def wait(self, limit: float = LIMIT) -> int:
        """The launcher's exit code. Raises TimeoutError, with what was said."""
        wait(self.ended, limit, lambda: f"the launcher did not end within {limit:.0f} s\n{self.said()}")
        return int(self._process.returncode)

    def logs(self) -> str:
        """Logs and end markers of every rank of the last attempt."""
        attempts = sorted(self.cluster.head.path(self.out / "launch").glob("attempt-*"))
        parts = [*attempts[-1].glob("rank-*.log"), *attempts[-1].glob("rank-*.end.json")] if attempts else []
        return "\n".join(path.read_text(errors="replace") for path in sorted(parts))


def wait(done: Callable[[], bool], limit: float, complaint: Callable[[], str]) -> None:
    """Until `done`. Raises TimeoutError with the complaint after `limit` seconds."""
    end = time.monotonic() + limit
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(complaint())
        time.sleep(0.05)


def all_gone(cluster: Cluster, limit: float = 15.0) -> list[str]:
    """Problems: what still runs on any machine `limit` seconds after the launcher has ended.

    An sshd that holds a connection which nobody uses is the node's own, not the run's: without a network it keeps it.
    """

    def left() -> list[str]:
        return [
            f"still running on {name}: {process.command[:120]}"
            for name, processes in cluster.processes().items()
            for process in processes
            if not process.command.startswith("sshd: ")
        ]

    try:
        wait(lambda: not left(), limit, lambda: "")
    except TimeoutError:
        return left()
    return []


def not_whole(out: Path) -> list[str]:
    """Problems: something half-written in the place of something whole, in the ENGINE stage of a run."""
    problems = []
    checkpoints = out / "engine" / "checkpoints"
    for path in (*checkpoints.glob("update-*"), *checkpoints.glob("best-*")):
        try:
            verify(path)
        except CheckpointError as error:
            problems.append(str(error))
    latest = checkpoints / "latest"
    if latest.exists() and not (checkpoints / latest.read_text().strip() / "manifest.json").is_file():
        problems.append(f"latest names {latest.read_text().strip()!r}, which is not there")
    for path in (out / "engine").glob("*.json"):
        json.loads(path.read_text())
    return problems


def weights(out: Path) -> dict[str, bytes]:
    """The tensors of the trained model, as bytes."""
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(_model(out)).items()}


def distance(out: Path, other: Path) -> float:
    """The largest difference between two trained models' weights."""
    own, others = load_file(_model(out)), load_file(_model(other))
    assert own.keys() == others.keys()
    return max(float((own[name] - others[name]).abs().max()) for name in own)


def _model(out: Path) -> Path:
    return out / "engine" / "model" / "model.safetensors"


def mount_small_disk(node: Node, path: Path, megabytes: int) -> None:
    """A file system of its own at `path`, in the eyes of the node alone."""
    path.mkdir(parents=True, exist_ok=True)
    node.run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", path)


def fill_disk(directory: Path) -> Path:
    """Write a file until nothing more fits."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                continue  # full for this size
    return filler


def damage(path: Path, how: str) -> None:
    """Cut a file in half, or turn one bit of it over."""
    data = bytearray(path.read_bytes())
    if how == "truncated":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
