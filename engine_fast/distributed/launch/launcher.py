"""The launch itself: lock the run directory, clear what an older launch left, then attempts until one is enough."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from engine_fast.distributed.launch import preflight, probe, summary
from engine_fast.distributed.launch.attempt import Attempt, Spec, attempts, read_json
from engine_fast.distributed.launch.commands import helper, hostfile_of, remote_command, shown, start_command
from engine_fast.distributed.launch.environment import forwarded
from engine_fast.distributed.launch.plan import LOST_SECONDS, Plan
from engine_fast.distributed.launch.reap import reap
from engine_fast.distributed.launch.supervise import Heart, Outcome, Say, supervise
from engine_fast.errors import ConfigError

MAX_BACKOFF = 300.0
_PROGRAMS = {"pdsh": "pdsh", "openmpi": "mpirun", "slurm": "srun"}


class Signals:
    """SIGINT, SIGTERM and SIGHUP, counted."""

    def __init__(self) -> None:
        self.count = 0
        self.given_up = threading.Event()

    def __call__(self) -> int:
        return self.count

    def note(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        self.given_up.set()

    @contextmanager
    def caught(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self.note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class Launch:
    """A plan on its way."""

    plan: Plan
    say: Say
    environ: Mapping[str, str]
    program: tuple[str, ...] | None = None
    """Instead of engine-fast itself: for tests."""
    lost_seconds: float = LOST_SECONDS

    def __post_init__(self) -> None:
        flags = self.plan.flags
        self.root = flags.out.absolute() / "launch"
        self.forwarded = forwarded(self.environ, flags.forward, everywhere=self.plan.mode in ("hosts", "slurm"))
        self.signals = Signals()
        self._history: list[dict[str, Any]] = []

    def run(self) -> int:
        """The exit code: 0, 130 or 2. Raises ConfigError for what keeps the first attempt from starting."""
        needed = _PROGRAMS.get(self.plan.launcher)
        if needed is not None and shutil.which(needed, path=self.environ.get("PATH")) is None:
            raise ConfigError(f"--launcher {self.plan.launcher} needs {needed}, which is not on PATH. Install it.")
        self._warn()
        with self._locked(), self.signals.caught():
            self._clear_older()
            restarts = 0
            while True:
                outcome = self._attempt(restarts)
                if self.signals():
                    return 130
                if outcome is not None and outcome.code in (0, 130):
                    return outcome.code
                if outcome is not None and not outcome.can_mend:
                    return 2
                if restarts == self.plan.flags.max_restarts:
                    return 2
                delay = min(self.plan.flags.backoff * 2**restarts, MAX_BACKOFF)
                restarts += 1
                self.say(f"restart {restarts} of {self.plan.flags.max_restarts} in {delay:g} s")
                if self.signals.given_up.wait(delay):
                    return 130

    def dry_run(self) -> str:
        """What would be done; nothing is started or written."""
        plan = self.plan
        port = plan.port or probe.free_port()
        spec = self._spec(plan.with_hosts(plan.hosts), plan.master_addr or plan.hosts[0].name, port, {})
        attempt = Attempt(self.root / f"attempt-{spec.number:03d}")
        lines = [f"hosts: {', '.join(f'{host.name} slots={host.slots}' for host in plan.hosts)}"]
        lines.append(f"ranks: {spec.world_size}, each executes: {shlex.join([*spec.program, *spec.arguments])}")
        lines.append(f"forwarded: {' '.join(self.forwarded) or 'nothing'}")
        if plan.flags.preflight and plan.mode != "local":
            question = helper(plan.python, "probe", "QUESTION")
            for host in plan.hosts:
                command = remote_command(plan.launcher, host.name, question, self.environ, self.forwarded)
                lines.append(f"preflight: {shlex.join(command.argv)}")
        node = plan.flags.node_rank or 0
        command = start_command(spec, attempt, self.environ, node=node)
        if plan.mode == "nodes":
            lines.append(f"port, nodes and their slots as they will have joined; this is node {node}")
        lines.append(f"start: {shown(command)}")
        return "\n".join(lines)

    # ------------------------------------------------------------ one attempt

    def _attempt(self, restarts: int) -> Outcome | None:
        """None: it could not be started."""
        try:
            plan, master, port, versions = self._prepared(restarts)
        except ConfigError as error:
            if restarts == 0 or self.signals():
                if self.signals():
                    return None
                raise
            self.say(str(error))
            return None
        spec = self._spec(plan, master, port, versions)
        attempt = Attempt.create(self.root, spec, self.forwarded)
        lines = "".join(f"{host.name} slots={host.slots}\n" for host in spec.hosts)
        Path(hostfile_of(attempt)).write_text(lines, encoding="utf-8")
        where = ", ".join(f"{host.name}:{host.slots}" for host in spec.hosts)
        self.say(f"attempt {spec.number}: {spec.world_size} ranks on {where}, logs in {attempt.directory}")
        heart = Heart(attempt)
        heart.start()
        outcome = supervise(
            attempt, spec, start_command(spec, attempt, self.environ), heart,
            hang_seconds=plan.flags.hang_seconds, interrupts=self.signals,
            reap=lambda hosts: self._reap(attempt, spec, hosts, patience=0.0), say=self.say,
        )  # fmt: skip
        self.say(summary.describe(outcome, attempt, spec))
        self._history.append(summary.record(outcome, spec))
        summary.write(self.root, self._history)
        return outcome

    def _prepared(self, restarts: int) -> tuple[Plan, str, int, Mapping[str, str]]:
        """(plan with the hosts that take part, master's address, port, versions). Raises ConfigError."""
        plan, flags = self.plan, self.plan.flags
        # A fresh port for each attempt: the old one may still be held by what the last attempt left.
        wanted = plan.port if restarts == 0 else 0
        if not flags.preflight and plan.mode != "local":
            return plan, plan.master_addr or plan.hosts[0].name, wanted or probe.free_port(), probe.versions()
        if plan.mode == "local":
            ask: preflight.Ask = _ask_here
        else:
            ask = preflight.asking(plan.launcher, self.environ, self.forwarded, self.signals.given_up)
        report = preflight.check_hosts(
            plan.hosts, self.root, ask=ask, python=plan.python, cwd=plan.cwd, master=plan.master_addr, port=wanted
        )
        if report.failures and flags.elastic and restarts and report.hosts:
            self.say(f"going on without: {preflight.describe(report.failures, len(plan.hosts))}")
        else:
            preflight.require_all(report, len(plan.hosts))
        return plan.with_hosts(report.hosts), report.master_addr, report.port, report.versions

    def _spec(self, plan: Plan, master: str, port: int, versions: Mapping[str, str]) -> Spec:
        number = (
            max((int(path.directory.name.removeprefix("attempt-")) for path in attempts(self.root)), default=-1) + 1
        )
        return Spec(
            id=secrets.token_hex(16), number=number, mode=plan.mode, launcher=plan.launcher, hosts=plan.hosts,
            python=plan.python, cwd=plan.cwd, program=self.program or plan.program, arguments=plan.flags.arguments,
            master_addr=master, master_port=port, grace_seconds=plan.flags.grace_seconds,
            lost_seconds=self.lost_seconds, launcher_pid=os.getpid(), launcher_host=socket.gethostname(),
            started=time.time(), versions=dict(versions),
        )  # fmt: skip

    # ------------------------------------------------------------ cleanliness

    def _reap(self, attempt: Attempt, spec: Spec, hosts: list[str], *, patience: float) -> dict[str, str]:
        """Host -> complaint, for those where it could not be done."""
        complaints = {}
        ask = preflight.asking(spec.launcher, self.environ, self.forwarded, threading.Event())
        for host in hosts:
            if spec.mode in ("local", "nodes"):
                found: dict[str, Any] | None = reap(attempt, host, patience=patience)
                reason = ""
            else:
                question = probe.pack({"host": host, "patience": patience})
                code, said, complaint = ask(host, helper(spec.python, "reap", attempt.token, question))
                found = probe.find_answer(said)
                reason = (complaint.strip().splitlines() or [f"exit code {code}"])[-1][:200]
            if found is None:
                late = f"what is left there ends by itself within {spec.lost_seconds + spec.grace_seconds:g} s"
                complaints[host] = f"{reason}; {late}"
            elif found["left"]:
                complaints[host] = f"processes {found['left']} do not end"
        return complaints

    def _clear_older(self) -> None:
        """An older launcher that was killed may have left ranks that are still on their way out."""
        older = attempts(self.root)
        if not older or (read_json(older[-1].beat_path) or {}).get("stop") is not None:
            return
        try:
            spec = older[-1].spec()
        except (OSError, ValueError, TypeError):
            return  # it came no further than making the directory
        self.say(f"attempt {spec.number} was left by a launcher that was killed; ending what runs of it")
        complaints = self._reap(older[-1], spec, [host.name for host in spec.hosts], patience=spec.grace_seconds)
        older[-1].order(-1, {"action": "quit", "why": "another launcher has taken over"})
        for host, complaint in complaints.items():
            self.say(f"{host}: {complaint}")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One launcher at a time works in a run directory (in nodes mode: one for each node)."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigError(
                f"{self.root}: a file is in the way, expected a directory. Choose another --out."
            ) from error
        node = self.plan.flags.node_rank
        name = ".lock" if node is None else f".lock-{node}"
        with (self.root / name).open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"{self.root}: another `engine-fast launch` works here. Wait for it, or choose another --out."
                ) from error
            yield

    def _warn(self) -> None:
        for path in (Path(".deepspeed_env"), Path.home() / ".deepspeed_env"):
            if self.plan.launcher in ("pdsh", "openmpi") and path.is_file():
                self.say(f"{path}: is not read, because DeepSpeed would run its values in a shell. Use --forward NAME.")


def _ask_here(_host: str, argv: Sequence[str]) -> tuple[int, str, str]:
    """The probe of this host needs no process of its own."""
    return 0, probe.MARK + json.dumps(probe.examine(probe.unpack(argv[-1]))), ""
