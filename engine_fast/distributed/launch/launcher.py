"""The launch itself: lock the run directory, clear what an older launch left, then attempts until one is enough."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shlex
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_fast.distributed.launch import nodes, preflight, probe, summary
from engine_fast.distributed.launch.attempt import Attempt, Spec, next_number
from engine_fast.distributed.launch.cleanup import left_behind, reap_hosts, take_over
from engine_fast.distributed.launch.commands import Command, helper, remote_command, shown, start_command
from engine_fast.distributed.launch.environment import forwarded
from engine_fast.distributed.launch.hostfile import Host
from engine_fast.distributed.launch.plan import LOST_SECONDS, Plan
from engine_fast.distributed.launch.signals import Signals
from engine_fast.distributed.launch.supervise import Heart, Outcome, Say, supervise, transport_ended
from engine_fast.distributed.launch.watch import INTERRUPTED, Limits, Trouble, Watch
from engine_fast.errors import ConfigError

MAX_BACKOFF = 300.0
_COLLECTIVE_SECONDS = 86400
"""At least so long the ranks wait for one another; who hangs or is gone the launcher finds out, and much sooner."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system without locks answers."""
_PROGRAMS = {"pdsh": "pdsh", "openmpi": "mpirun", "slurm": "srun"}


@dataclass
class Launch:
    """A plan on its way. In nodes mode that of node 0; `follow` is the others'."""

    plan: Plan
    say: Say
    environ: Mapping[str, str]
    program: tuple[str, ...] | None = None
    """What a rank executes instead of engine-fast itself."""
    start: Callable[[Spec, Attempt], Command] | None = None
    """What starts the ranks instead of the plan's launcher."""
    limits: Limits | None = None
    """Default: by --hang-seconds."""
    lost_seconds: float = LOST_SECONDS

    def __post_init__(self) -> None:
        flags = self.plan.flags
        self.root = flags.out.absolute() / "launch"
        self.forwarded = forwarded(self.environ, flags.forward, everywhere=self.plan.mode in ("hosts", "slurm"))
        self.signals = Signals()
        self._history: list[dict[str, Any]] = []
        self._promised: Heart | None = None
        """Of the last attempt, while another one is to follow."""

    def run(self) -> int:
        """The exit code: 0, 130 or 2. Raises ConfigError for what keeps the first attempt from starting."""
        needed = _PROGRAMS.get(self.plan.launcher)
        if needed is not None and shutil.which(needed, path=self.environ.get("PATH")) is None:
            raise ConfigError(f"--launcher {self.plan.launcher} needs {needed}, which is not on PATH. Install it.")
        self._warn()
        with locked(self.root, self.plan.flags.node_rank, self.say), self.signals.caught():
            older = left_behind(self.root, self.signals.given_up)
            if older is not None:
                ask = self._ask(older[1].mode, older[1].launcher, threading.Event())
                take_over(*older, ask, self.say, self.signals.given_up)
            return self._attempts()

    def dry_run(self) -> str:
        """What would be done; nothing is started or written."""
        plan = self.plan
        hosts = plan.hosts
        if plan.mode == "nodes":
            hosts = tuple(Host(nodes.name_of(node), plan.hosts[0].slots) for node in range(plan.flags.nodes or 1))
        port = plan.port or probe.free_port()
        spec = self._spec(plan.with_hosts(hosts), next_number(self.root), plan.master_addr or hosts[0].name, port, {})
        attempt = Attempt(self.root / f"attempt-{spec.number:03d}")
        lines = [f"hosts: {', '.join(f'{host.name} slots={host.slots}' for host in hosts)}"]
        lines.append(f"ranks: {spec.world_size}, each executes: {shlex.join([*spec.program, *spec.arguments])}")
        lines.append(f"forwarded: {' '.join(self.forwarded) or 'nothing'}")
        if plan.flags.preflight and plan.mode in ("hosts", "slurm"):
            for host in hosts:
                question = helper(plan.python, "probe", "QUESTION")
                command = remote_command(plan.launcher, host.name, question, self.environ, self.forwarded)
                lines.append(f"preflight: {shown(command)}")
        node = plan.flags.node_rank or 0
        lines += plan.notes
        if plan.mode == "nodes":
            lines.append(f"this is node {node}; the others are assumed to have as many ranks")
        lines.append(f"start: {shown(start_command(spec, attempt, self.environ, node=node))}")
        return "\n".join(lines)

    def command(self, spec: Spec, attempt: Attempt, node: int = 0) -> Command:
        """What starts the ranks, in nodes mode those of one node."""
        if self.start is not None:
            return self.start(spec, attempt)
        return start_command(spec, attempt, self.environ, node=node)

    # ------------------------------------------------------------ attempts

    def _attempts(self) -> int:
        most, backoff = self.plan.flags.max_restarts, self.plan.flags.backoff
        restarts, code, again = 0, 2, True
        try:
            while again:
                delay = min(backoff * 2**restarts, MAX_BACKOFF)
                code, again = self._attempt(restarts, delay)
                if again:
                    restarts += 1
                    self.say(f"restart {restarts} of {most} in {delay:g} s")
                    if self.signals.given_up.wait(delay):
                        code, again = INTERRUPTED, False
        finally:
            self._take_back(code)
        return code

    def _take_back(self, code: int) -> None:
        """No attempt follows after all: the other nodes' launchers need not wait for one."""
        if self._promised is not None:
            self._promised.withdraw(code, "node 0 has given up the restart")
            self._promised = None

    def _attempt(self, restarts: int, delay: float) -> tuple[int, bool]:
        """(exit code, whether another one follows)."""
        may_restart = restarts < self.plan.flags.max_restarts
        attempt = Attempt.begin(self.root, next_number(self.root))
        if self._promised is not None:
            self._promised.rest()
        heart = Heart(attempt)
        heart.start()
        peers = self._peers(attempt)
        try:
            plan, master, port, versions = self._prepared(attempt, restarts, peers)
        except BaseException as error:
            again = may_restart and restarts > 0 and isinstance(error, ConfigError) and not self.signals()
            code = INTERRUPTED if self.signals() else 2
            heart.end()
            heart.close(_word(code, again, delay, str(error)))
            if peers is None:
                heart.rest()
                shutil.rmtree(attempt.directory, ignore_errors=True)
            else:
                self._keep(heart, again, code)
            if not isinstance(error, ConfigError) or (restarts == 0 and not self.signals()):
                raise
            if not self.signals():
                self.say(str(error))
            return code, again
        spec = self._spec(plan, attempt.number, master, port, versions)
        own = spec.hosts[:1] if peers is not None else spec.hosts
        self._promised = None  # the promise is kept
        attempt.describe(spec, {host.name: self.forwarded for host in own})
        where = ", ".join(f"{host.name}:{host.slots}" for host in spec.hosts)
        self.say(f"attempt {spec.number}: {spec.world_size} ranks on {where}, logs in {attempt.directory}")
        outcome = self._supervised(attempt, spec, heart, peers)
        again = may_restart and outcome.can_mend and not self.signals()
        self.say(summary.describe(outcome, attempt, spec))
        heart.close(_word(outcome.code, again, delay, "", clean=not outcome.unreaped))
        self._keep(heart, again, outcome.code)
        for host in own:
            attempt.forget(host.name)
        self._history.append(summary.record(outcome, spec))
        summary.write(self.root, self._history)
        return outcome.code, again

    def _supervised(self, attempt: Attempt, spec: Spec, heart: Heart, peers: nodes.Peers | None) -> Outcome:
        own = spec.hosts[0].name

        def interrupts() -> int:
            return self.signals() + (peers.interrupts() if peers is not None else 0)

        def clean(hosts: list[str]) -> dict[str, str]:
            if peers is None:
                return reap_hosts(attempt, spec, hosts, self._ask(spec.mode, spec.launcher, threading.Event()))
            others = [host for host in hosts if host != own]
            return {**reap_hosts(attempt, spec, [own], None), **peers.await_over(others, spec.grace_seconds)}

        def other(watch: Watch) -> Trouble | None:
            found = peers.trouble() if peers is not None else None
            for host, code, ended_at in peers.ended_transports() if peers is not None else []:
                found = found or transport_ended(watch, code, host, ended_at)
            return found

        return supervise(
            attempt, spec, self.command(spec, attempt), heart,
            limits=self._limits,
            interrupts=interrupts, reap=clean, say=self.say, host=own if peers is not None else "", other=other,
        )  # fmt: skip

    def _prepared(
        self, attempt: Attempt, restarts: int, peers: nodes.Peers | None
    ) -> tuple[Plan, str, int, Mapping[str, str]]:
        """(plan with the hosts that take part, master's address, port, versions). Raises ConfigError."""
        plan, flags = self.plan, self.plan.flags
        # A fresh port for each attempt: the old one may still be held by what the last attempt left.
        wanted = plan.port if restarts == 0 else 0
        if peers is not None:
            peers.invite(flags.arguments)
            self.say(f"waiting for {(flags.nodes or 1) - 1} other nodes in {attempt.directory}")
            hosts, failures = peers.gather(
                plan.hosts[0], root=self.root, python=plan.python, cwd=plan.cwd, seconds=nodes.JOIN_SECONDS,
                given_up=self.signals.given_up, gpus=self._on_gpus,
            )  # fmt: skip
            port = next((port for port in range(plan.port + restarts, 65536) if probe.is_free(port)), 0)
            if port != plan.port and restarts == 0:
                failures = {**failures, plan.hosts[0].name: f"port {plan.port} is in use. Choose another in --master."}
            report = preflight.Report(tuple(hosts), failures, plan.master_addr, port, probe.versions())
        elif flags.preflight or plan.mode == "local":
            ask = self._ask(plan.mode, plan.launcher, self.signals.given_up) or _ask_here
            report = preflight.check_hosts(
                plan.hosts, self.root, ask=ask, python=plan.python, cwd=plan.cwd, master=plan.master_addr, port=wanted,
                gpus=self._on_gpus,
            )  # fmt: skip
        else:
            return plan, plan.master_addr or plan.hosts[0].name, wanted or probe.free_port(), probe.versions()
        if report.failures and flags.elastic and restarts and report.hosts:
            self.say(f"going on without: {preflight.describe(report.failures, len(plan.hosts))}")
        elif report.failures:
            total = flags.nodes or len(plan.hosts)
            raise ConfigError(f"preflight: {preflight.describe(report.failures, total)}")
        return plan.with_hosts(report.hosts), report.master_addr, report.port, report.versions

    def _spec(self, plan: Plan, number: int, master: str, port: int, versions: Mapping[str, str]) -> Spec:
        return Spec(
            id=secrets.token_hex(16), number=number, mode=plan.mode, launcher=plan.launcher, hosts=plan.hosts,
            python=plan.python, cwd=plan.cwd, program=self.program or plan.program, arguments=plan.flags.arguments,
            master_addr=master, master_port=port, grace_seconds=plan.flags.grace_seconds,
            lost_seconds=self.lost_seconds, launcher_pid=os.getpid(), launcher_host=socket.gethostname(),
            started=time.time(), versions=dict(versions),
            collective_seconds=max(_COLLECTIVE_SECONDS, round(2 * max(self._limits.hang, self._limits.alone))),
        )  # fmt: skip

    @property
    def _limits(self) -> Limits:
        return self.limits or Limits(self.plan.flags.hang_seconds)

    @property
    def _on_gpus(self) -> bool:
        """Whether ranks may want a host's GPUs."""
        return self.plan.flags.gpus and self.forwarded.get("CUDA_VISIBLE_DEVICES") != ""

    def _peers(self, attempt: Attempt) -> nodes.Peers | None:
        if self.plan.mode != "nodes":
            return None
        return nodes.Peers(attempt, self.plan.flags.nodes or 1, silence=self.lost_seconds)

    def _keep(self, heart: Heart, again: bool, code: int) -> None:
        """The heart of an attempt that another one follows beats on: its launcher lives, and may change its mind."""
        if again:
            self._promised = heart
        else:
            self._take_back(code)

    def _ask(self, mode: str, launcher: str, given_up: threading.Event) -> preflight.Ask | None:
        """How to run something on a host; None where every host is this one."""
        if mode in ("local", "nodes"):
            return None
        return preflight.asking(launcher, self.environ, self.forwarded, given_up)

    def _warn(self) -> None:
        for note in self.plan.notes:
            self.say(note)
        for path in (Path(".deepspeed_env"), Path.home() / ".deepspeed_env"):
            if self.plan.launcher in ("pdsh", "openmpi") and path.is_file():
                self.say(f"{path}: is not read, because DeepSpeed would run its values in a shell. Use --forward NAME.")


def _word(code: int, restart: bool, delay: float, why: str, *, clean: bool = True) -> dict[str, Any]:
    """The last word on an attempt: see Attempt.closed."""
    return {"code": code, "restart": restart, "delay": delay, "why": why, "clean": clean}


@contextmanager
def locked(root: Path, node: int | None, say: Say) -> Iterator[None]:
    """One launcher at a time works in a run directory (in nodes mode: one for each node).

    A lock may hold on this host alone, or not at all: whether the last attempt's launcher lives is looked at besides.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{root}: a file is in the way, expected a directory. Choose another --out.") from error
    # Node 0 stands for all nodes against launches of other kinds.
    with (root / (f".lock-{node}" if node else ".lock")).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{root}: another `engine-fast launch` works here. Wait for it, or choose another --out."
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            say(f"{root}: this file system has no locks ({error.strerror}). Start no second launch here meanwhile.")
        yield


def _ask_here(_host: str, argv: Sequence[str]) -> tuple[int, str, str]:
    """The probe of this host needs no process of its own."""
    return 0, probe.MARK + json.dumps(probe.examine(probe.unpack(argv[-1]))), ""
