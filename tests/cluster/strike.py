"""Try one case of the matrix on one host: strike a launch, look at what is left, give the same command again."""

from __future__ import annotations

import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from engine_fast.distributed.launch.plan import LOST_SECONDS
from tests.cluster import launches
from tests.cluster.cases import DAMAGES, SIGNALS, Case, Result, causes
from tests.cluster.launches import Launch
from tests.cluster.materials import Materials
from tests.cluster.nodes import Cluster

_METHOD = {"in step": "step", "in save": "save", "in load": "load"}
_NUMBER = {"in step": 2, "in save": 1, "in load": 1}
"""From the half-done run: the second update, the first save, the only load."""
_DISK_MB = 128
"""More than the 100 MB without which the launcher does not start."""
_LEAVING = 60.0
"""Seconds that ranks may take to notice that there is no launcher any more, to save and to end."""


_PASSED_ON = 3.0
"""Seconds until the ranks have heard of what happened to another process; meanwhile they stay at the moment."""


def try_case(case: Case, cluster: Cluster, made: Materials, directory: Path) -> Result:
    """The case's outcome; whatever goes wrong on the way is a problem of the result."""
    started = time.monotonic()
    result = Result(case.name)
    out = directory / re.sub(r"\W+", "-", case.name)
    shutil.rmtree(out, ignore_errors=True)
    try:
        attempt = _on_full_disk if case.fault == "full disk" else _damaged if case.fault in DAMAGES else _struck
        attempt(case, cluster, made, out, result)
    except (TimeoutError, OSError, RuntimeError, StopIteration) as error:
        result.problems.append(f"{type(error).__name__}: {error}")
    result.seconds = round(time.monotonic() - started, 1)
    return result


def _struck(case: Case, cluster: Cluster, made: Materials, out: Path, result: Result) -> None:
    made.copy("half", out)
    with Launch(cluster, made.config, out, "--ranks", "2", plan=_plan(case)) as launch:
        reached = launch.reached()
        if case.fault in SIGNALS:
            _send(case, cluster, launch, reached)
        if not _is_silent(case):
            if not case.victim.startswith("rank"):
                time.sleep(_PASSED_ON)
            launch.release()
        elif case.moment == "in step":  # asked to save by their guards, the ranks can; elsewhere they are too busy
            time.sleep(LOST_SECONDS + _PASSED_ON)
            launch.release()
        _judge(case, cluster, launch, out, result)
        logs = launch.logs()
    said = _continue(cluster, made, out, result)
    if _is_silent(case):
        _hear(case, logs + said, result)


def _on_full_disk(case: Case, cluster: Cluster, made: Materials, out: Path, result: Result) -> None:
    launches.mount_small_disk(cluster.head, out, _DISK_MB)
    try:
        seen = cluster.head.path(out)
        made.copy("half", seen)
        with Launch(cluster, made.config, out, "--ranks", "2", plan=_plan(case)) as launch:
            launch.reached()
            filler = launches.fill_disk(seen)
            launch.release()
            _judge(case, cluster, launch, seen, result)
            filler.unlink()
        _continue(cluster, made, out, result)
    finally:
        cluster.head.run("umount", "-l", out)


def _damaged(case: Case, cluster: Cluster, made: Materials, out: Path, result: Result) -> None:
    """In load: damaged while nothing runs. In step: while training goes on, and then the rank is killed."""
    made.copy("half", out)
    how = case.fault.split()[0]
    if case.moment == "in step":
        with Launch(cluster, made.config, out, "--ranks", "2", plan=_plan(case)) as launch:
            reached = launch.reached()
            launches.damage(_newest_file(out, case.rank), how)
            cluster.head.kill(reached["pid"], signal.SIGKILL)
            launch.release()
            if not launch.wait():
                result.problems.append("exit code 0 after a rank was killed")
            result.problems += launches.all_gone(cluster)
    else:
        launches.damage(_newest_file(out, case.rank), how)
    with Launch(cluster, made.config, out, "--ranks", "2") as launch:
        _judge(case, cluster, launch, out, result)
    _continue(cluster, made, out, result)


def _send(case: Case, cluster: Cluster, launch: Launch, reached: dict[str, Any]) -> None:
    number = signal.Signals[SIGNALS[case.fault]]
    pid = reached["pid"]
    if case.victim == "launcher":
        pid = launch.launcher().pid
    elif case.victim == "child":
        pid = launch.child().pid
    elif case.victim == "guard":
        pid = next(process.parent for process in cluster.head.processes() if process.pid == pid)
    cluster.head.kill(pid, number)


def _judge(case: Case, cluster: Cluster, launch: Launch, out: Path, result: Result) -> None:
    """Wait for the end of the struck start; look for processes, the exit code, the message, and halves."""
    if case.fault == "SIGSTOP" and case.victim == "launcher":
        _outlive(cluster, launch, result)
    result.code = launch.wait()
    result.problems += launches.all_gone(cluster, limit=_LEAVING if case.victim == "launcher" else 15.0)
    said = launch.said() + (launch.logs() if case.fault in DAMAGES else "")
    if result.code == 0:
        if not _is_finished(out):
            result.problems.append("exit code 0, but the run is not finished")
        elif not _may_succeed(case):
            result.problems.append("exit code 0 although the fault was not mended")
    if (result.code != 0 or case.fault in DAMAGES) and not _is_silent(case):
        _hear(case, said, result)
    result.problems += launches.not_whole(out)


def _hear(case: Case, said: str, result: Result) -> None:
    patterns = causes(case)
    for pattern in patterns:
        if not re.search(pattern, said):
            result.problems.append(f"nothing like {pattern!r} was said:\n{said[-2000:]}")
    lines = said.splitlines()[::-1]
    result.message = max(
        lines, key=lambda line: sum(bool(re.search(pattern, line)) for pattern in patterns), default=""
    )


def _is_silent(case: Case) -> bool:
    """Whether the launcher cannot tell what happened to it; then the ranks' logs do, and the next start."""
    return case.victim == "launcher" and case.fault in ("kill -9", "SIGSTOP")


def _may_succeed(case: Case) -> bool:
    """The fault may leave the training unharmed: a snapshot before the damaged one, ranks that need no launcher."""
    return case.fault in DAMAGES or (case.fault == "SIGSTOP" and case.victim in ("launcher", "child"))


def _outlive(cluster: Cluster, launch: Launch, result: Result) -> None:
    """A stopped launcher cannot end; the ranks must, by finishing or by leaving. Then it is woken up."""

    def alone() -> bool:
        return not any("engine_fast" in process.command and process.parent for process in cluster.head.processes())

    try:
        launches.wait(alone, launches.LIMIT, lambda: "")
    except TimeoutError:
        result.problems.append("ranks went on without the launcher")
    launch.wake()


def _continue(cluster: Cluster, made: Materials, out: Path, result: Result) -> str:
    """The same command, undisturbed, and the same weights as without any fault. Returns what was said."""
    seen, said = cluster.head.path(out), ""
    if not _is_finished(seen):
        with Launch(cluster, made.config, out, "--ranks", "2") as launch:
            code = launch.wait()
            said = launch.said()
            if code:
                result.problems.append(f"the same command ended with {code}:\n{said[-2000:]}")
                return said
    if launches.weights(seen) != launches.weights(made.whole):
        result.problems.append("other weights than those of the uninterrupted run")
    return said


def _is_finished(out: Path) -> bool:
    return (out / "results.json").is_file()


def _plan(case: Case) -> dict[str, Any]:
    action = {"exception": "raise", "exit 7": "exit"}.get(case.fault, "pause")
    method, number = _METHOD[case.moment], _NUMBER[case.moment]
    if case.variant == "not finite":
        method, action = "backward", "nan"
    elif case.variant == "sealing":
        method = "seal"
    return {"moment": method, "number": number, "rank": case.rank, "action": action}


def _newest_file(out: Path, rank: int) -> Path:
    """The optimiser's state of this rank in the newest snapshot."""
    newest = max((out / "engine" / "checkpoints").glob("update-*"))
    return next(newest.glob(f"deepspeed/*rank_{rank}_*optim_states.pt"))
