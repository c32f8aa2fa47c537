"""Cases that need two machines: the launcher on a third reaches both over ssh, and things happen to one of them."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cluster import launches
from tests.cluster.cases import Result
from tests.cluster.launches import Launch
from tests.cluster.materials import Materials
from tests.cluster.nodes import Cluster

_ROUNDING = 2e-5
"""Largest difference of a weight after four updates that one rank made instead of two; a skipped update gives 1e-3."""


class Host:
    """A case in progress: starts of one run over both nodes, and what was found wrong."""

    def __init__(self, cluster: Cluster, made: Materials, out: Path, result: Result) -> None:
        self.cluster, self.made, self.out, self.result = cluster, made, out, result
        self.b = cluster.nodes[1]
        self.hostfile = cluster.hostfile(out.with_name(out.name + ".hostfile"))

    def launch(self, *options: str, plan: dict[str, Any] | None = None, hostfile: Path | None = None) -> Launch:
        where = ("--hostfile", hostfile or self.hostfile)
        return Launch(self.cluster, self.made.config, self.out, *where, *options, plan=plan)

    def problem(self, text: str) -> None:
        self.result.problems.append(text)

    def fails(self, launch: Launch, *patterns: str, limit: float = launches.LIMIT) -> None:
        """It must end with a code other than 0, say why, and leave nothing running and nothing half-written."""
        self.result.code = launch.wait(limit)
        said = launch.said()
        if self.result.code == 0:
            self.problem("exit code 0")
        for pattern in patterns:
            if not re.search(pattern, said):
                self.problem(f"nothing like {pattern!r} was said:\n{said[-3000:]}")
        lines = said.splitlines()[::-1]
        self.result.message = max(lines, key=lambda line: sum(bool(re.search(p, line)) for p in patterns), default="")
        self.result.problems += launches.all_gone(self.cluster)
        self.result.problems += launches.not_whole(self.out)

    def finishes(self, launch: Launch) -> None:
        """It must end with code 0, leave nothing running, and have the weights of the uninterrupted run."""
        code = launch.wait()
        if self.result.code is None:  # otherwise that of the start that was struck
            self.result.code = code
        if code:
            self.problem(f"ended with {code}:\n{launch.said()[-3000:]}")
            return
        self.result.problems += launches.all_gone(self.cluster)
        if launches.weights(self.out) != launches.weights(self.made.whole):
            self.problem("other weights than those of the uninterrupted run")

    def continues(self) -> None:
        """The same command, undisturbed."""
        with self.launch() as launch:
            self.finishes(launch)


def trains_is_killed_and_restarts_itself(case: Host) -> None:
    """A real run of ENGINE over both nodes: kill -9 of the second's rank in the middle; nobody helps."""
    case.made.copy("fresh", case.out)
    with case.launch("--max-restarts", "1", plan=_pause("step", 5)) as launch:
        reached = launch.reached()
        if reached["host"] != case.b.name:
            case.problem(f"rank 1 runs on {reached['host']}, not on {case.b.name}")
        for node in case.cluster.nodes:
            if not any("engine_fast" in process.command for process in node.processes()):
                case.problem(f"nothing of the run lives on {node.name}")
        case.b.kill(reached["pid"], signal.SIGKILL)
        case.finishes(launch)
        attempts = sorted(path.name for path in (case.out / "launch").glob("attempt-*"))
        if attempts != ["attempt-000", "attempt-001"]:
            case.problem(f"attempts {attempts}, expected two")
        told = json.loads((case.out / "launch" / "summary.json").read_text())["attempts"][0]["first_failure"]
        case.result.message = _line(launch.said(), r"was the first \(")
        if (told["rank"], told["host"], told["why"]) != (1, case.b.name, "killed by SIGKILL"):
            case.problem(f"summary.json tells of the first attempt: {told}")


def finds_nodes_by_address(case: Host) -> None:
    """A hostfile of addresses instead of names."""
    case.made.copy("half", case.out)
    by_address = case.cluster.hostfile(case.hostfile.with_suffix(".addresses"), by_address=True)
    with case.launch(hostfile=by_address) as launch:
        case.finishes(launch)


def refuses_a_node_without_python(case: Host) -> None:
    """Found before anything is started."""
    case.made.copy("half", case.out)
    case.b.hide_python()
    with case.launch() as launch:
        case.fails(launch, case.b.name, r"[Pp]ython", limit=60)
    case.b.show_python()
    case.continues()


def ends_when_a_node_fails_before_rendezvous(case: Host) -> None:
    """As before, but unnoticed by a preflight: the other node must not wait for it."""
    case.made.copy("half", case.out)
    case.b.hide_python()
    with case.launch("--no-preflight") as launch:
        case.fails(launch, rf"rank 1 on {case.b.name} was the first \(never started\)")
    case.b.show_python()
    case.continues()


def names_an_unreachable_node(case: Host) -> None:
    """Its sshd is down; then its cable is out."""
    case.made.copy("half", case.out)
    case.b.stop_sshd()
    with case.launch() as launch:
        case.fails(launch, case.b.name, r"refused|unreachable|ssh", limit=60)
    case.b.start_sshd()
    case.cluster.cut(case.b)
    with case.launch() as launch:
        case.fails(launch, case.b.name, r"timed out|unreachable|ssh|answer", limit=90)
    case.cluster.heal(case.b)
    case.continues()


def ends_when_a_node_dies(case: Host) -> None:
    """Power off in mid-step: no process, no packet, no goodbye."""
    case.made.copy("half", case.out)
    with case.launch(plan=_pause("step", 2)) as launch:
        launch.reached()
        case.cluster.cut(case.b)
        case.b.power_off()
        case.fails(launch, rf"rank 1 on {case.b.name} was the first \(lost\)")
    case.cluster.power_on(case.b)
    case.continues()


def ends_when_the_network_is_cut(case: Host) -> None:
    """The node lives on, but nobody reaches it; its processes must leave by themselves."""
    case.made.copy("half", case.out)
    with case.launch(plan=_pause("step", 2)) as launch:
        launch.reached()
        case.cluster.cut(case.b)
        launch.release()
        # The run directory is shared still, so both nodes look alive; each waits for the other.
        case.fails(launch, r"rank \d on engine-[ab] was the first \((hung|exception)\)", case.b.name)
    case.cluster.heal(case.b)
    case.continues()


def goes_on_without_a_node_if_elastic(case: Host) -> None:
    """The node dies; the launcher starts again by itself on the one that still answers."""
    case.made.copy("half", case.out)
    with case.launch("--max-restarts", "1", "--elastic", plan=_pause("step", 2)) as launch:
        launch.reached()
        case.cluster.cut(case.b)
        case.b.power_off()
        case.result.code = launch.wait()
        if case.result.code:
            case.problem(f"ended with {case.result.code}:\n{launch.said()[-3000:]}")
        else:
            apart = launches.distance(case.out, case.made.whole)
            if apart > _ROUNDING:
                case.problem(f"weights differ by {apart:.1e} from those of two ranks, more than by rounding")
        if case.b.name not in launch.said():
            case.problem(f"the lost node was not named:\n{launch.said()[-3000:]}")
        case.result.message = _line(launch.said(), r"going on without")
        case.result.problems += launches.all_gone(case.cluster)
        case.result.problems += launches.not_whole(case.out)
    case.cluster.power_on(case.b)


CASES: dict[str, Callable[[Host], None]] = {
    "a rank is killed, --max-restarts 1": trains_is_killed_and_restarts_itself,
    "hostfile of addresses": finds_nodes_by_address,
    "a node without python": refuses_a_node_without_python,
    "a node fails before rendezvous, --no-preflight": ends_when_a_node_fails_before_rendezvous,
    "a node is unreachable": names_an_unreachable_node,
    "a node dies in mid-step": ends_when_a_node_dies,
    "the network is cut in mid-step": ends_when_the_network_is_cut,
    "a node dies, --max-restarts 1 --elastic": goes_on_without_a_node_if_elastic,
}


def try_case(name: str, cluster: Cluster, made: Materials, directory: Path) -> Result:
    """The outcome; afterwards both nodes are as new."""
    started = time.monotonic()
    result = Result(f"two hosts: {name}")
    out = directory / re.sub(r"\W+", "-", name)
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        CASES[name](Host(cluster, made, out, result))
    except (TimeoutError, OSError, RuntimeError, StopIteration) as error:
        result.problems.append(f"{type(error).__name__}: {error}")
    finally:
        cluster.ready()
    result.seconds = round(time.monotonic() - started, 1)
    return result


def _line(said: str, pattern: str) -> str:
    return next((line for line in said.splitlines() if re.search(pattern, line)), "")


def _pause(moment: str, number: int, rank: int = 1) -> dict[str, Any]:
    return {"moment": moment, "number": number, "rank": rank, "action": "pause"}
