"""The directory of one start, through which launcher, guards and helpers speak; see Attempt for its files.

Records that are rewritten every second keep their place and size on disk: they still go through when it is full, and an
NFS client, which may believe for a minute that a new file is not there, sees them at once.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine_fast.distributed.launch.hostfile import Host

_BEAT_BYTES = 4096
ASKED = "asked to stop: "
"""How the error begins of a rank that saved and ended because its guard wanted so; the reason follows."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What one attempt starts, as attempt.json holds it."""

    id: str
    """Random; ranks and their children carry it in their environment."""
    number: int
    mode: str
    """local, hosts, nodes or slurm."""
    launcher: str
    """torchrun, pdsh, openmpi or slurm."""
    hosts: tuple[Host, ...]
    """Ranks are dealt to them in this order, a host's ranks in a row."""
    python: str
    cwd: str
    program: tuple[str, ...]
    """What each rank executes, before `arguments`."""
    arguments: tuple[str, ...]
    master_addr: str
    master_port: int
    grace_seconds: float
    """From the request to save and end until a rank is killed."""
    lost_seconds: float
    """Silence of the launcher after which its ranks save and end."""
    launcher_pid: int
    launcher_host: str
    started: float
    """Seconds since 1970."""
    versions: Mapping[str, Any] = field(default_factory=dict)
    collective_seconds: int = 0
    """How long the ranks' collectives wait, where their configuration leaves it open; 0 = torch's choice."""

    @property
    def beat_seconds(self) -> float:
        """Between two beats of a guard: 1 up to 64 ranks, then in proportion: 64 a second in all."""
        return min(5.0, max(1.0, self.world_size / 64))

    @property
    def world_size(self) -> int:
        return sum(host.slots for host in self.hosts)

    def place(self, rank: int) -> tuple[Host, int]:
        """The host of a rank, and its number there."""
        for host in self.hosts:
            if rank < host.slots:
                return host, rank
            rank -= host.slots
        raise IndexError(rank)

    def ranks_of(self, host: str) -> list[int]:
        return [rank for rank in range(self.world_size) if self.place(rank)[0].name == host]


@dataclass(frozen=True, slots=True)
class End:
    """How a rank ended: its completion marker."""

    code: int
    """0 only if the program said that it was done, and then exited with 0."""
    kind: str
    """done, mistake, interrupted, exception, signal, exit, silent, stopped (by a signal) or ended (by the launcher)."""
    error: str
    when: float
    """Seconds since 1970, by that host's clock."""
    traceback: str = ""
    what: str = ""
    """The last thing it did."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """
    attempt.json            the Spec
    environment-HOST.json   variables for the ranks there, readable by the user alone
    hosts                   the hosts once more, as a hostfile
    runner.log              what the transport itself said; in nodes mode runner-HOST.log, one for each
    launcher.beat           {"count", "stop", "closed"}: rewritten every second by the launcher
    stop.json               {"action": "save" | "quit", "why", "dump"}: the same, to be read afterwards
    rank-00000.json         {"rank", "host", "node", "pid", "start_ticks", "pgid", "local_rank", guard and parent alike}
    rank-00000.beat         {"count", "what", "alive", "patient", "state", "since", "record"}: every second, by its
                            guard; in the end {"end", "count", "record"}: the End, shortened
    rank-00000.end.json     the End
    rank-00000.log          the rank's standard output and error
    """

    directory: Path

    @classmethod
    def begin(cls, root: Path, number: int) -> Attempt:
        """Make attempt-NNN under `root`."""
        attempt = cls(root / f"attempt-{number:03d}")
        attempt.directory.mkdir(parents=True)
        attempt.order(0, None)
        return attempt

    def describe(self, spec: Spec, environments: Mapping[str, Mapping[str, str]]) -> None:
        """Write everything that guards read, attempt.json last; what must be writable later at its full size.

        environments: of the ranks, by the name of their host.
        """
        for host, environment in environments.items():
            write_private(self.environment_path(host), dict(environment))
        for rank in range(spec.world_size):
            self.beat(rank, {})
        lines = "".join(f"{host.name} slots={host.slots}\n" for host in spec.hosts)
        self.hostfile.write_text(lines, encoding="utf-8")
        write_json(self.directory / "attempt.json", asdict(spec))

    @property
    def number(self) -> int:
        return int(self.directory.name.removeprefix("attempt-"))

    @classmethod
    def of_token(cls, token: str) -> Attempt:
        """The other way round of `token`."""
        padded = token + "=" * (-len(token) % 4)
        return cls(Path(os.fsdecode(base64.urlsafe_b64decode(padded))))

    @property
    def token(self) -> str:
        """The directory in letters, digits, - and _ alone, so that it may pass through any shell."""
        return base64.urlsafe_b64encode(os.fsencode(self.directory)).decode().rstrip("=")

    @property
    def beat_path(self) -> Path:
        return self.directory / "launcher.beat"

    @property
    def hostfile(self) -> Path:
        """The hosts of this attempt, in the form that DeepSpeed and mpirun read."""
        return self.directory / "hosts"

    def runner_log(self, host: str) -> Path:
        return self.directory / (f"runner-{host}.log" if host else "runner.log")

    def environment_path(self, host: str) -> Path:
        return self.directory / f"environment-{host}.json"

    def rank_path(self, rank: int, ending: str) -> Path:
        return self.directory / f"rank-{rank:05d}.{ending}"

    def spec(self) -> Spec:
        """Raises OSError or ValueError where there is no whole one."""
        tree = json.loads((self.directory / "attempt.json").read_bytes())
        tree["hosts"] = tuple(Host(**host) for host in tree["hosts"])
        return Spec(**{**tree, "program": tuple(tree["program"]), "arguments": tuple(tree["arguments"])})

    def environment(self, host: str) -> dict[str, str]:
        """What the ranks on a host get. Raises OSError or ValueError where there is none."""
        return dict(json.loads(self.environment_path(host).read_bytes()))

    def order(self, count: int, stop: Mapping[str, Any] | None, closed: Mapping[str, Any] | None = None) -> None:
        """The launcher lives, and wants this of the ranks. closed: its last word, see `closed`."""
        write_record(self.beat_path, {"count": count, "stop": stop, "closed": closed}, _BEAT_BYTES)

    def closed(self) -> dict[str, Any] | None:
        """{"code", "restart", "delay", "why", "clean"}: how it ended; None while it runs or if its launcher was killed.

        restart: another attempt follows. clean: every process of it is known to be gone.
        """
        return (read_json(self.beat_path) or {}).get("closed")

    def names(self) -> set[str]:
        """What the directory holds; to list it makes a network file system look anew."""
        try:
            return set(os.listdir(self.directory))
        except OSError:
            return set()

    def holds(self, name: str) -> bool:
        return name in self.names()

    def forget(self, host: str) -> None:
        """The variables of a host's ranks, among them perhaps secrets, once no rank will read them any more."""
        self.environment_path(host).unlink(missing_ok=True)

    def beat(self, rank: int, tree: Mapping[str, Any]) -> None:
        """The rank's guard lives, and sees this."""
        write_record(self.rank_path(rank, "beat"), tree, _BEAT_BYTES)

    def write_end(self, rank: int, end: End, *, count: int = 0, record: Mapping[str, Any] | None = None) -> None:
        """Also into the rank's beat, shortened: a full disk takes no other, and NFS shows it at once."""
        try:
            write_json(self.rank_path(rank, "end.json"), asdict(end))
        except OSError:
            pass
        short = {**asdict(end), "traceback": "", "error": end.error[:400], "what": end.what[:100]}
        self.beat(rank, {"end": short, "count": count, "record": record})

    def read_end(self, rank: int, beat: Mapping[str, Any] | None = None, *, listed: bool = True) -> End | None:
        """None while the rank has not ended. beat: as read a moment ago. listed: whether end.json is there."""
        short = ((read_json(self.rank_path(rank, "beat")) if beat is None else beat) or {}).get("end")
        tree = (read_json(self.rank_path(rank, "end.json")) if listed or short else None) or short
        return End(**tree) if tree else None


def attempts(root: Path) -> list[Attempt]:
    """Every attempt under `root`, oldest first."""
    found = [Attempt(path) for path in root.glob("attempt-[0-9]*") if path.name.removeprefix("attempt-").isdecimal()]
    return sorted(found, key=lambda attempt: attempt.number)


def next_number(root: Path) -> int:
    """Of the next attempt."""
    return max((attempt.number for attempt in attempts(root)), default=-1) + 1


def write_json(path: Path, tree: Any) -> None:
    """Whole or not at all. Raises OSError."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(tree, stream, indent=1)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_private(path: Path, tree: Any) -> None:
    """A new file that only its owner can read, from its first moment."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        json.dump(tree, stream)


def write_record(path: Path, tree: Mapping[str, Any], size: int) -> None:
    """One write in place, padded to `size`, so that a reader sees the old record or the new one. Raises OSError."""
    body = json.dumps(tree, ensure_ascii=False).encode("utf-8", "replace")
    assert len(body) < size, f"{path}: {len(body)} bytes"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(handle, body.ljust(size - 1) + b"\n", 0)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any] | None:
    """None where nothing whole is; opened anew each time, because a network file system looks again only then."""
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None
