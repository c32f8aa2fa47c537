"""A rank's guard: `python -m engine_fast.distributed.launch.rank TOKEN`, started by the transport on the rank's host.

It gives the rank its environment and log, then sits beside it as its parent. A parent learns at once, from the kernel,
what no transport passes on: which signal killed the rank, that it was stopped, that it exited without having finished.
It tells the launcher, obeys the launcher, and ends the rank when there is no launcher any more; and if the guard itself
is killed, the kernel kills the rank.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine_fast.distributed import presence
from engine_fast.distributed.launch import processes
from engine_fast.distributed.launch.attempt import ASKED, Attempt, End, Spec, read_json, write_json
from engine_fast.distributed.launch.environment import for_rank
from engine_fast.errors import ConfigError

_GAP = 5.0
_WATCHED = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_PLACES = {
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
}
_PR_SET_PDEATHSIG = 1
EXIT_ENDED = 143
"""Exit code of a rank that was ended because another one failed."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which rank this is."""

    rank: int
    local_rank: int
    local_size: int
    host: str


def find_place(spec: Spec, environ: Mapping[str, str]) -> Place:
    """From what the transport set. Raises ConfigError if it started other ranks than were planned."""
    names = _PLACES.get(spec.launcher, ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    try:
        rank, local_rank, size = (int(environ[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{spec.launcher} set no usable {', '.join(names)}. Start with `engine-fast launch`."
        ) from error
    if size != spec.world_size or not 0 <= rank < size:
        raise ConfigError(f"{spec.launcher} started rank {rank} of {size}, expected {spec.world_size} ranks.")
    host, planned = spec.place(rank)
    if spec.launcher == "pdsh":
        # DeepSpeed counts a host's ranks from (rank mod slots), which is not 0 after hosts with other slots.
        local_rank = planned
    return Place(rank, local_rank, host.slots, host.name)


def environment(spec: Spec, place: Place, attempt: Attempt, environ: Mapping[str, str]) -> dict[str, str]:
    """What the rank's process gets."""
    patience = {presence.COLLECTIVE_TIMEOUT: str(spec.collective_seconds)} if spec.collective_seconds else {}
    return {
        **patience,
        **for_rank(environ, attempt.environment(spec.place(place.rank)[0].name)),
        # torchrun and DeepSpeed have set these two; MPI and SLURM know nothing of them.
        "MASTER_ADDR": environ.get("MASTER_ADDR", spec.master_addr),
        "MASTER_PORT": environ.get("MASTER_PORT", str(spec.master_port)),
        "RANK": str(place.rank),
        "WORLD_SIZE": str(spec.world_size),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_size),
        "ENGINE_FAST_ATTEMPT": str(attempt.directory),
        **dict([mark_of(spec, place.host)]),
    }


def mark_of(spec: Spec, host: str) -> tuple[str, str]:
    """The variable, with its value, that only this attempt's ranks on this host and their children carry."""
    return "ENGINE_FAST_ATTEMPT_ID", f"{spec.id}/{host}"


class Guard:
    """One rank's process and what is known of it."""

    def __init__(self, attempt: Attempt, spec: Spec, place: Place) -> None:
        self._attempt, self._spec, self._place = attempt, spec, place
        self._board, self._descriptor = presence.Board.create()
        self._child: subprocess.Popen[bytes] | None = None
        self._status: int | None = None
        self._stopped = False
        self._alive = 0
        self._why_ended = ""
        self._was_stopped = False
        self._asked_at: float | None = None
        self._passed_on = False
        self._deserted = False
        self._record: dict[str, Any] | None = None
        self._heard: tuple[float, Any] = (time.monotonic(), None)
        self._looked_at = time.monotonic()

    def run(self) -> int:
        """Start the rank, stay until it has ended, write its marker. Returns the exit code for the transport.

        That is 0 whatever became of the rank: at another one mpirun would kill the other guards after a second and
        torchrun after thirty, with their ranks in the midst of saving. Only the markers count.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
        self._look()
        if not self._why_ended:  # the launcher may have given up while this host was starting
            self._start()
            while self._status is None:
                self._turn()
            self._clear_group()
        self._attempt.write_end(self._place.rank, self._end(), count=self._board.progress()[0], record=self._record)
        return 0

    def _start(self) -> None:
        found = os.fstat(self._descriptor)
        variables = environment(self._spec, self._place, self._attempt, os.environ)
        variables[presence.VARIABLE] = f"{self._descriptor}:{found.st_dev}:{found.st_ino}"
        prctl = ctypes.CDLL(None).prctl

        def before() -> None:
            prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)

        with self._attempt.rank_path(self._place.rank, "log").open("ab") as log:
            self._child = subprocess.Popen(
                [*self._spec.program, *self._spec.arguments], env=variables, cwd=self._spec.cwd,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                pass_fds=[self._descriptor], preexec_fn=before,
            )  # fmt: skip
        self._record = self._describe(self._child.pid)
        write_json(self._attempt.rank_path(self._place.rank, "json"), self._record)
        self._beat()

    def _describe(self, pid: int) -> dict[str, Any]:
        def described(number: int) -> dict[str, int] | None:
            found = processes.process(number)
            return {"pid": found.pid, "start_ticks": found.start_ticks} if found is not None else None

        place = self._place
        return {
            "rank": place.rank, "host": place.host, "node": socket.gethostname(), "local_rank": place.local_rank,
            **(described(pid) or {"pid": pid, "start_ticks": -1}), "pgid": pid,
            "guard": described(os.getpid()), "parent": self._transport(described),
        }  # fmt: skip

    def _transport(self, described: Callable[[int], dict[str, int] | None]) -> dict[str, int] | None:
        """The parent, if it is what started this guard; when that is gone, it is init or a service manager."""
        number = os.getppid()
        found = described(number)
        return found if self._attempt.token in processes.command_line(number) else None

    # ------------------------------------------------------------ while it runs

    def _turn(self) -> None:
        """Wait for a signal, at most until the next beat; then beat, and hear the launcher."""
        info = signal.sigtimedwait(_WATCHED, self._spec.beat_seconds)
        self._reap()
        if self._status is not None:
            return
        if info is not None and info.si_signo != signal.SIGCHLD:
            self._pass_on()
        if info is None or info.si_signo == signal.SIGCHLD:
            self._beat()
        self._look()
        self._press()

    def _reap(self) -> None:
        assert self._child is not None
        while self._status is None:
            pid, status = os.waitpid(self._child.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if pid == 0:
                return
            if os.WIFSTOPPED(status):
                self._stopped = True
            elif os.WIFCONTINUED(status):
                self._stopped = False
            else:
                self._status = self._child.returncode = os.waitstatus_to_exitcode(status)

    def _beat(self) -> None:
        self._alive += 1
        count, patient, what, since = self._board.progress()
        state = "stopped" if self._stopped else "running"
        try:
            self._attempt.beat(
                self._place.rank,
                {
                    "count": count,
                    "what": what,
                    "alive": self._alive,
                    "patient": patient,
                    "state": state,
                    "since": since,
                    "record": self._record,
                },
            )
        except OSError:
            pass  # a full disk or a lost file system: the launcher will miss the beat, training need not

    def _look(self) -> None:
        """Obey the launcher; without one, as if it had asked to save and end."""
        now, order = time.monotonic(), read_json(self._attempt.beat_path)
        gap = max(_GAP, 3 * self._spec.beat_seconds)
        held, self._looked_at = now - self._looked_at > gap, now  # this process was held, perhaps with its host
        if held or (order is not None and order["count"] != self._heard[1]):
            self._heard = now, order["count"] if order is not None else None
        stop = (order or {}).get("stop")
        if stop is None and now - self._heard[0] > self._spec.lost_seconds:
            stop = {"action": "save", "why": f"the launcher has given no sign for {self._spec.lost_seconds:g} s"}
            self._deserted = self._asked_at is None or self._deserted
        if stop is None:
            return
        if stop["action"] == "quit" and self._child is not None:
            self._kill(stop["why"], dump=bool(stop.get("dump")))
        elif self._asked_at is None:
            self._asked_at = now
            self._why_ended = stop["why"]
            self._pass_on()

    def _press(self) -> None:
        """The end of patience."""
        if (
            self._status is None
            and self._asked_at is not None
            and time.monotonic() - self._asked_at > self._spec.grace_seconds
        ):
            grace = f"{self._spec.grace_seconds:g} s"
            self._kill(f"{self._why_ended}; it did not end within {grace} of being asked to", dump=True)

    def _pass_on(self) -> None:
        """Ask the rank to save and end, once: a second request would end it at once, and transports send their own."""
        if self._child is not None and not self._passed_on:
            self._passed_on = True
            self._send(signal.SIGTERM)
            self._send(signal.SIGCONT)

    def _kill(self, why: str, *, dump: bool) -> None:
        assert self._child is not None
        self._why_ended, self._was_stopped = why, self._stopped
        if self._stopped:
            self._why_ended = f"it was stopped by a signal and not continued; {why}"
        elif dump and self._board.progress()[0]:  # before its first beat it may not know the signal
            self._send(presence.DUMP_SIGNAL)
            signal.sigtimedwait({signal.SIGCHLD}, 1.0)
        self._send(signal.SIGKILL)
        if self._status is None:
            self._status = self._child.wait()

    def _send(self, number: int) -> None:
        assert self._child is not None
        if self._status is None:
            os.kill(self._child.pid, number)  # our own child, not waited for yet: the number is still its own

    # ------------------------------------------------------------ afterwards

    def _clear_group(self) -> None:
        """What the rank started does not outlive it."""
        assert self._child is not None
        processes.end(processes.of_session(self._child.pid), patience=0)

    def _end(self) -> End:
        said, status = self._board.end(), self._status
        _, _, what, _ = self._board.progress()
        when, traceback = float(said.get("when", time.time())), str(said.get("traceback", ""))
        kind, error = str(said.get("kind", "exit")), str(said.get("error", ""))
        if status is None:
            return End(EXIT_ENDED, "ended", self._why_ended, when, what="it had not started yet")
        if status < 0:
            name = _signal_name(-status)
            if self._why_ended:
                kind = "stopped" if self._was_stopped else "ended"
                return End(EXIT_ENDED, kind, self._why_ended, time.time(), traceback, what)
            if said and kind != "done":
                return End(128 - status, kind, error, when, traceback, what)  # the signal came while it was ending
            return End(128 - status, "signal", f"killed by {name}", time.time(), traceback, what)
        if kind == "interrupted" and self._deserted:
            return End(status, "ended", f"{self._why_ended}; it has saved", when, traceback, what)
        if status == 0 and kind != "done":
            return End(1, "silent", "it exited with 0 without having finished", when, traceback, what)
        if status and kind in ("done", "exit") and not error:
            kind, error = "exit", f"it exited with {status} without a word"
        if kind == "interrupted" and self._why_ended:
            error = f"{ASKED}{self._why_ended}. {error}"
        return End(status, kind, error, when, traceback, what)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def main(argv: list[str]) -> int:
    """TOKEN -> 0 once the rank's marker is written."""
    attempt = Attempt.of_token(argv[0])
    try:
        spec = attempt.spec()
    except (OSError, ValueError) as error:
        print(
            f"engine-fast: {socket.gethostname()}: {attempt.directory}: cannot be read ({error}). "
            "The run directory must be on a file system that all hosts share.",
            file=sys.stderr,
        )
        return 2
    place = find_place(spec, os.environ)
    guard = Guard(attempt, spec, place)
    try:
        return guard.run()
    except OSError as error:
        said = f"{place.host}: the rank could not be started: {error}"
        print(f"engine-fast: {said}", file=sys.stderr)
        attempt.write_end(place.rank, End(2, "exit", said, time.time()))
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
