"""Processes by number and start time, as /proc tells: a number alone may belong to somebody else by now."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Process:
    """A process that cannot be mistaken for a later one with the same number."""

    pid: int
    start_ticks: int
    """Clock ticks after boot, field 22 of /proc/PID/stat."""

    def is_alive(self) -> bool:
        """Neither gone, nor replaced, nor a zombie."""
        found = _stat(self.pid)
        return found is not None and found.ticks == self.start_ticks and found.state not in "ZX"

    def send(self, number: int) -> None:
        """Signal it, if it is still the same one."""
        if self.is_alive():
            try:
                os.kill(self.pid, number)
            except (ProcessLookupError, PermissionError):
                pass  # ended since, or has become another user's


@dataclass(frozen=True, slots=True)
class _Stat:
    pid: int
    state: str
    parent: int
    group: int
    session: int
    ticks: int


def process(pid: int) -> Process | None:
    """The process that has this number now."""
    found = _stat(pid)
    return Process(pid, found.ticks) if found is not None else None


def command_line(pid: int) -> str:
    """Its words, separated by NUL; empty where there is no such process."""
    try:
        return os.fsdecode((_PROC / str(pid) / "cmdline").read_bytes())
    except OSError:
        return ""


def is_stopped(pid: int) -> bool:
    """Whether it is held by SIGSTOP or a debugger."""
    found = _stat(pid)
    return found is not None and found.state in "Tt"


def descendants(roots: Iterable[int]) -> list[Process]:
    """Children of these processes, their children and so on, without the roots."""
    by_parent: dict[int, list[_Stat]] = {}
    for found in _all():
        by_parent.setdefault(found.parent, []).append(found)
    result, queue = [], list(roots)
    while queue:
        below = by_parent.pop(queue.pop(), [])
        result += [Process(found.pid, found.ticks) for found in below]
        queue += [found.pid for found in below]
    return result


def of_session(session: int) -> list[Process]:
    """Every living process of a session; its leader, which bears the same number, may be gone."""
    return [Process(found.pid, found.ticks) for found in _all() if found.session == session and found.state not in "ZX"]


def of_group(group: int) -> list[Process]:
    """Every living process of a process group."""
    return [Process(found.pid, found.ticks) for found in _all() if found.group == group and found.state not in "ZX"]


def carrying(name: str, value: str) -> list[Process]:
    """This user's processes whose environment holds exactly name=value; they inherited it from a rank."""
    entry = os.fsencode(f"{name}={value}")
    result = []
    for found in _all():
        try:
            environment = (_PROC / str(found.pid) / "environ").read_bytes()
        except OSError:
            continue  # ended since, or another user's
        if found.pid != os.getpid() and found.state not in "ZX" and entry in environment.split(b"\0"):
            result.append(Process(found.pid, found.ticks))
    return result


def end(processes: Iterable[Process], *, patience: float) -> list[Process]:
    """SIGCONT and SIGTERM, up to `patience` seconds of waiting, then SIGKILL. Returns those that had to be killed."""
    living = [process for process in processes if process.is_alive()]
    if patience > 0:
        for process in living:
            process.send(signal.SIGTERM)
            process.send(signal.SIGCONT)
        living = _wait(living, patience)
    for process in living:
        process.send(signal.SIGKILL)
    _wait(living, 5.0)
    return living


def run(
    argv: Sequence[str], *, environment: Mapping[str, str], cwd: str, timeout: float, given_up: threading.Event
) -> tuple[int, str, str]:
    """(exit code, standard output, standard error); code -1: not in time, or `given_up` was set meanwhile.

    Runs in a session of its own, of which nothing is left afterwards. Raises OSError if it cannot be started.
    """
    child = subprocess.Popen(
        argv, env=dict(environment), cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    limit = time.monotonic() + timeout
    while time.monotonic() < limit and not given_up.is_set():
        try:
            said, complaint = child.communicate(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
        return child.returncode, said, complaint
    end_session(child.pid)
    said, complaint = child.communicate()
    return -1, said, complaint


def end_session(session: int) -> None:
    """SIGKILL for a session that this process started, and for what came out of it."""
    members = [*of_session(session), *descendants([session])]
    end(members, patience=0)


def _wait(processes: list[Process], seconds: float) -> list[Process]:
    limit = time.monotonic() + seconds
    while (living := [process for process in processes if process.is_alive()]) and time.monotonic() < limit:
        time.sleep(0.05)
    return living


def _all() -> Iterator[_Stat]:
    for entry in os.listdir(_PROC):
        if entry.isdecimal() and (found := _stat(int(entry))) is not None:
            yield found


def _stat(pid: int) -> _Stat | None:
    try:
        text = (_PROC / str(pid) / "stat").read_bytes().decode("utf-8", "replace")
    except OSError:
        return None
    # The name, in parentheses, may hold anything, also spaces and parentheses.
    fields = text.rpartition(")")[2].split()
    return _Stat(pid, fields[0], int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))
