"""One attempt from its start to the last of its processes: start the transport, watch, decide, end everything."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine_fast.distributed.launch import processes
from engine_fast.distributed.launch.attempt import Attempt, Spec, write_json
from engine_fast.distributed.launch.commands import Command
from engine_fast.distributed.launch.watch import INTERRUPTED, Limits, Trouble, Watch, deserted, echo, first_failure

MISTAKE = 2
"""Exit code of engine-fast when somebody has to change something."""
_POLL = 0.25
_SETTLE = 1.5
"""Seconds in which the ranks that die of another's death may still be overtaken by its own marker."""
_QUIT_SECONDS = 10.0
_RUNNER_SECONDS, _LATE_SECONDS = 5.0, 20.0
"""How long the transport may take to end once its ranks have; when some have not even started."""

Say = Callable[[str], None]
Interrupt = Callable[[], int]
"""How many signals have asked the launcher to stop."""
Reap = Callable[[list[str]], dict[str, str]]
"""Ends what is left of the ranks on these hosts; host -> complaint for those where that failed."""


class Heart(threading.Thread):
    """Tells the guards every second that the launcher lives and what it wants of them."""

    def __init__(self, attempt: Attempt) -> None:
        super().__init__(name="launcher.beat", daemon=True)
        self._attempt, self._count, self._over = attempt, 0, threading.Event()
        self._lock = threading.Lock()
        self.stop: dict[str, Any] | None = None
        self._closed: dict[str, Any] | None = None

    def run(self) -> None:
        while not self._over.wait(1.0):
            self._tell()

    def publish(self, stop: Mapping[str, Any]) -> None:
        """From now on the ranks are to stop; `quit` stands over `save`."""
        self.stop = dict(stop)
        self._tell()
        try:
            write_json(self._attempt.directory / "stop.json", self.stop)
        except OSError:
            pass  # for readers afterwards; the guards obey the beat

    def end(self) -> None:
        """The last word to the ranks; it stays in the file, so that a guard that starts late ends at once."""
        if self.stop is None:
            self.stop = {"action": "quit", "why": "the attempt is over"}
        self._tell()

    def close(self, closed: Mapping[str, Any]) -> None:
        """The attempt is over, and so is the launch, unless `closed` says that another one follows: see Attempt."""
        self._closed = {**closed, "why": str(closed["why"])[:800]}
        if not closed["restart"]:
            self._over.set()
        self._tell()

    def withdraw(self, code: int, why: str) -> None:
        """No attempt follows after all."""
        self.close({**(self._closed or {}), "code": code, "restart": False, "why": why})

    def rest(self) -> None:
        """The next attempt has its own."""
        self._over.set()

    def _tell(self) -> None:
        with self._lock:
            self._count += 1
            try:
                self._attempt.order(self._count, self.stop, self._closed)
            except OSError:
                pass  # the file system is away: the guards will end their ranks if it stays away


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended."""

    code: int
    """0, 130 (asked to stop) or 2."""
    trouble: Trouble | None
    watch: Watch
    seconds: float
    unreaped: Mapping[str, str]
    """Hosts on which the clean-up failed."""
    transport_log: Path

    @property
    def can_mend(self) -> bool:
        """Whether the same command may go further the next time without anybody having changed anything."""
        if self.code in (0, 130):
            return False
        if self.trouble is None or self.trouble.rank is None:
            return True
        end = self.watch.ranks[self.trouble.rank].end
        return end is None or end.code != MISTAKE


def supervise(
    attempt: Attempt,
    spec: Spec,
    command: Command,
    heart: Heart,
    *,
    limits: Limits,
    interrupts: Interrupt,
    reap: Reap,
    say: Say,
    host: str = "",
    other: Callable[[Watch], Trouble | None] = lambda _: None,
) -> Outcome:
    """Run one attempt. When it returns, no process of it is left on a host that could be reached.

    host: the one whose ranks `command` starts; "" = all. other: a failure that is seen neither here nor on a rank.
    """
    started = time.monotonic()
    watch = Watch(attempt, spec, limits, started)
    log_path = attempt.runner_log(host)
    child = start_transport(command, log_path)
    tail = _Tail(attempt.rank_path(0, "log"))
    try:
        trouble, interrupted = _run(
            watch, child, heart, log_path, interrupts=interrupts, tail=tail, say=say, host=host, other=other
        )
        _await_ends(watch, heart, spec, interrupts=interrupts, tail=tail, say=say)
        if trouble is not None:
            better = _refined(watch, trouble)
            alone = better.rank is not None and (end := watch.ranks[better.rank].end) is not None and deserted(end)
            keep = interrupted and better.kind != "interrupted" and not alone
            trouble = _missing(watch, trouble if keep else better)
            interrupted = interrupted and trouble.kind != "lost" and not alone
        if interrupted and (unsaved := _unsaved(watch)) is not None:
            trouble, interrupted = unsaved, False
    finally:
        heart.end()
        left = {spec.place(rank)[0].name for rank in watch.unended()}
        complaints = reap(sorted(left)) if left else {}
        end_transport(child, late=bool(watch.unended()) and not complaints, interrupts=interrupts)
        tail.show()
    code = 130 if interrupted else 0 if trouble is None else 2
    return Outcome(code, trouble, watch, time.monotonic() - started, complaints, log_path)


def _run(
    watch: Watch,
    child: subprocess.Popen[bytes],
    heart: Heart,
    log_path: Path,
    *,
    interrupts: Interrupt,
    tail: _Tail,
    say: Say,
    host: str,
    other: Callable[[Watch], Trouble | None],
) -> tuple[Trouble | None, bool]:
    """Until the ranks are done, or something is to be done about them. Returns (trouble, asked to stop)."""
    ended_at: float | None = None
    while True:
        now = time.monotonic()
        watch.look(now)
        tail.show()
        if watch.all_done:
            return None, False
        if interrupts():
            say("stopping: the ranks save their state; press again to stop at once")
            heart.publish({"action": "save", "why": "the launcher was asked to stop"})
            return None, True
        trouble = watch.trouble(now) or watch.unreached(read_log(log_path)) or other(watch)
        if trouble is None and (code := peek(child)) is not None:
            ended_at = ended_at or now
            trouble = transport_ended(watch, code, host, ended_at)
        if trouble is not None and trouble.kind == "interrupted":
            # Somebody signalled a rank: its peers are saving with it, and so should those that are not.
            heart.publish({"action": "save", "why": f"rank {trouble.rank} was asked to stop"})
            return trouble, True
        if trouble is not None:
            if trouble.kind in ("exception", "signal", "ended") and trouble.action == "quit":
                _settle(watch)
                trouble = _refined(watch, trouble)
            why = trouble.why
            if trouble.rank is not None:
                why = f"rank {trouble.rank} on {watch.spec.place(trouble.rank)[0].name} failed ({trouble.kind})"
                say(f"{why}; ending the others")
            heart.publish({"action": trouble.action, "why": why, "dump": trouble.dump})
            return trouble, False
        _pause(watch)


def _pause(watch: Watch) -> None:
    """Less often where ranks beat less often: each look opens a file a rank."""
    beat = watch.spec.beat_seconds
    time.sleep(_POLL if beat == 1 else beat / 2)


def _settle(watch: Watch) -> None:
    limit = time.monotonic() + _SETTLE
    while time.monotonic() < limit and not watch.all_ended:
        time.sleep(_POLL)
        watch.look(time.monotonic())


def _refined(watch: Watch, trouble: Trouble) -> Trouble:
    """The same, unless markers that came since name an earlier culprit."""
    if trouble.rank is None or trouble.kind in ("hung", "stopped", "lost", "never started"):
        return trouble
    failed = {rank: seen.end for rank, seen in watch.ranks.items() if seen.end is not None and seen.end.code}
    if not failed:
        return trouble
    rank = first_failure(failed)
    return replace(trouble, rank=rank, kind=failed[rank].kind, why=failed[rank].error)


def _unsaved(watch: Watch) -> Trouble | None:
    """After an interrupt: a rank that failed by itself, most likely while it saved."""
    ends = {rank: seen.end for rank, seen in watch.ranks.items() if seen.end is not None}
    by_launcher = {rank for rank, end in ends.items() if end.kind in ("ended", "stopped")}
    failed = {
        rank: end for rank, end in ends.items()
        if end.code not in (0, INTERRUPTED) and rank not in by_launcher
        and not (end.kind == "signal" and "SIGTERM" in end.error)  # it was asked before it could save, or had to
    }  # fmt: skip
    if not failed:
        return None
    rank = first_failure(failed)
    left = by_launcher or any(end.code == INTERRUPTED for end in ends.values())
    if echo(failed[rank]) and left:
        return None  # it missed a peer that had ended as it was asked to
    return Trouble(rank, failed[rank].kind, failed[rank].error)


def _missing(watch: Watch, trouble: Trouble) -> Trouble:
    """After every rank was awaited: of one whose guard was killed there is no marker, and its peers only echo that."""
    gone = [rank for rank in watch.unended() if watch.ranks[rank].record is not None]
    end = watch.ranks[trouble.rank].end if trouble.rank is not None else None
    if not gone or not (trouble.kind == "transport" or (end is not None and echo(end))):
        return trouble
    heard = trouble.why if trouble.rank is None else f"rank {trouble.rank}: {trouble.why or trouble.kind}"
    return Trouble(gone[0], "lost", f"its guard left no word: it was killed, or its host is away ({heard})")


def start_transport(command: Command, log_path: Path) -> subprocess.Popen[bytes]:
    """In a session of its own, so that no signal of the terminal reaches it."""
    with log_path.open("ab") as log:
        return subprocess.Popen(
            command.argv, env=command.environment, cwd=command.cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip


def transport_ended(watch: Watch, code: int, host: str, ended_at: float) -> Trouble | None:
    """The transport is gone, and some rank of the host has no marker. Its own exit code is told, not trusted.

    A rank whose guard shows itself after that has lost its transport. One that is silent may have ended well, with the
    news still on its way through a file system; if not, it counts as lost like any other that gives no sign.
    """
    settle = max(_SETTLE, 1.5 * watch.spec.beat_seconds)
    if time.monotonic() - ended_at <= settle:
        return None
    how = f"by signal {-code}" if code < 0 else f"with code {code}"
    unended = [rank for rank in watch.unended() if host in ("", watch.spec.place(rank)[0].name)]
    missing = [rank for rank in unended if watch.ranks[rank].record is None]
    if missing:
        return Trouble(missing[0], "never started", f"what starts the ranks ended {how} before this one was there")
    if any(watch.ranks[rank].alive_at > ended_at + settle for rank in unended):
        return Trouble(None, "transport", f"what starts the ranks ended {how} before they did", action="save")
    return None


def _await_ends(watch: Watch, heart: Heart, spec: Spec, *, interrupts: Interrupt, tail: _Tail, say: Say) -> None:
    """Until every rank that has started has ended, or patience does."""
    if watch.all_done:
        return
    began, before = time.monotonic(), interrupts()
    quits_at = began if (heart.stop or {}).get("action") == "quit" else None
    while True:
        now = time.monotonic()
        watch.look(now)
        tail.show()
        if not [rank for rank in watch.unended() if watch.ranks[rank].record is not None]:
            return
        if quits_at is None and interrupts() > before:
            say("stopping at once")
            heart.publish({"action": "quit", "why": "the launcher was asked twice to stop"})
            quits_at = now
        patience = max(5.0, 3 * spec.beat_seconds)
        silent = all(now - watch.ranks[rank].alive_at > patience for rank in watch.unended())
        limit = quits_at + _QUIT_SECONDS if quits_at is not None else began + spec.grace_seconds + _QUIT_SECONDS
        if now > limit or (quits_at is not None and silent):
            return
        _pause(watch)


def end_transport(child: subprocess.Popen[bytes], *, late: bool, interrupts: Interrupt) -> None:
    """It ends by itself once its ranks have. DeepSpeed's would answer SIGINT by killing every job it finds: no SIGINT.

    late: guards may be about to start, which will end at once; better not to cut them off from this host before.
    """
    limit, before = time.monotonic() + (_LATE_SECONDS if late else _RUNNER_SECONDS), interrupts()
    while peek(child) is None and time.monotonic() < limit and interrupts() == before:
        time.sleep(0.1)
    processes.end_session(child.pid)
    child.wait()


def peek(child: subprocess.Popen[bytes]) -> int | None:
    """Its exit code, without taking it from the kernel: until then its number is its own, and that of its session."""
    found = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


class _Tail:
    """Shows on the terminal what rank 0 writes."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def show(self) -> None:
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._offset)
                fresh = stream.read()
        except OSError:
            return
        self._offset += len(fresh)
        try:
            sys.stderr.buffer.write(fresh)
            sys.stderr.buffer.flush()
        except OSError:
            pass  # the terminal is gone; the ranks are still to be brought to an end


def read_log(path: Path, limit: int = 200_000) -> str:
    try:
        return path.read_bytes()[-limit:].decode("utf-8", "replace")
    except OSError:
        return ""
