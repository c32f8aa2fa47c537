"""What the launcher sees of its ranks, and when that is a failure: decided from files and a clock alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine_fast.distributed.launch.attempt import ASKED, Attempt, End, Spec, read_json

INTERRUPTED = 130
"""Exit code of a rank that was asked to save and did."""
_GAP_SECONDS = 5.0
_PEERS = re.compile(
    r"(?i)connection (was )?(closed|reset|refused|aborted)|broken pipe|DistBackendError|DistNetworkError|DistStoreError"
    r"|timed out|timeout|NCCL|Gloo|peer"
)
"""In an exception: it may be the echo of another rank's end."""
_PDSH = re.compile(r"^pdsh@[^:]*: ([^:]+): ssh exited with exit code (\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds of patience."""

    hang: float
    """Without progress."""
    start: float = 300.0
    """From the start of the transport until a rank's guard has shown itself, and then until the rank's first sign."""
    contact: float = 30.0
    """Without a sign of a guard: then its host counts as lost."""
    stopped: float = 5.0
    """Of a rank that is held by SIGSTOP."""
    alone: float = 1800.0
    """Without progress while others get on: so long may a rank wait for another, as torch's own collectives do."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """The first thing that went wrong, as far as is known."""

    rank: int | None
    """None: the transport itself, or the launcher."""
    kind: str
    """An End's kind, or hung, stopped, lost, never started, transport."""
    why: str
    action: str = "quit"
    """What the other ranks are told: quit, or save if they are healthy."""
    dump: bool = False
    """They print tracebacks first."""


@dataclass(slots=True)
class Seen:
    """One rank."""

    record: dict[str, Any] | None = None
    end: End | None = None
    count: int = -1
    alive: int = -1
    patient: bool = True
    what: str = ""
    state: str = "running"
    progress_at: float = 0.0
    """When `count` last changed, by the launcher's own clock; likewise the others."""
    alive_at: float = 0.0
    since: float = 0.0
    """When it made its last beat, by its host's clock: the launcher sees beats a second late, and so out of order."""
    stopped_at: float | None = None


@dataclass(slots=True)
class Watch:
    """The ranks of one attempt."""

    attempt: Attempt
    spec: Spec
    limits: Limits
    started: float
    """By the monotonic clock."""
    ranks: dict[int, Seen] = field(default_factory=dict)
    looked_at: float = 0.0

    def __post_init__(self) -> None:
        self.looked_at = self.started
        self.ranks = {
            rank: Seen(progress_at=self.started, alive_at=self.started) for rank in range(self.spec.world_size)
        }

    def look(self, now: float) -> None:
        """Read what has changed."""
        gap = now - self.looked_at
        if gap > max(_GAP_SECONDS, 3 * self.spec.beat_seconds):
            self._forgive(gap)
        self.looked_at = now
        names = self.attempt.names()
        for rank, seen in self.ranks.items():
            if seen.end is not None:
                continue
            beat = read_json(self.attempt.rank_path(rank, "beat")) or {}
            if seen.record is None:
                path = self.attempt.rank_path(rank, "json")
                seen.record = beat.get("record") or (read_json(path) if path.name in names else None)
                if seen.record is not None:
                    seen.progress_at = seen.alive_at = now
            if beat:
                self._note(seen, beat, now)
            listed = self.attempt.rank_path(rank, "end.json").name in names
            seen.end = self.attempt.read_end(rank, beat, listed=listed)

    def trouble(self, now: float) -> Trouble | None:
        """The failure to act on, if there is one."""
        failed = {rank: seen.end for rank, seen in self.ranks.items() if seen.end is not None and seen.end.code}
        if failed:
            rank = first_failure(failed)
            if echo(failed[rank]) == 1 and (stuck := self._stood_before(rank, now)) is not None:
                return stuck
            # Ranks that missed the launcher save by themselves: those that still do are left to it.
            action = "save" if deserted(failed[rank]) else "quit"
            return Trouble(rank, failed[rank].kind, failed[rank].error, action=action)
        for rank, seen in self.ranks.items():
            found = self._silence(rank, seen, now) if seen.end is None else None
            if found is not None:
                return found
        return self._hang(now)

    def unreached(self, transport_log: str) -> Trouble | None:
        """pdsh says at once that a host's ssh failed, and waits for the other hosts for ever."""
        for host, code in _PDSH.findall(transport_log):
            for rank in self._ranks_of(host):
                if self.ranks[rank].record is None and self.ranks[rank].end is None:
                    return Trouble(rank, "never started", f"what starts ranks on {host} ended with code {code}")
        return None

    def _ranks_of(self, host: str) -> list[int]:
        """pdsh leaves out the domain where all hosts share one."""
        if exact := self.spec.ranks_of(host):
            return exact
        names = [known.name for known in self.spec.hosts if known.name.partition(".")[0] == host]
        return [rank for name in names for rank in self.spec.ranks_of(name)]

    @property
    def all_done(self) -> bool:
        return all(seen.end is not None and seen.end.code == 0 for seen in self.ranks.values())

    @property
    def all_ended(self) -> bool:
        return all(seen.end is not None for seen in self.ranks.values())

    def unended(self) -> list[int]:
        return [rank for rank, seen in self.ranks.items() if seen.end is None]

    def _forgive(self, gap: float) -> None:
        """This process was held, or its file system was: in that time nobody could have been seen."""
        for seen in self.ranks.values():
            seen.progress_at += gap
            seen.alive_at += gap
            seen.stopped_at = None if seen.stopped_at is None else seen.stopped_at + gap

    def _note(self, seen: Seen, beat: Mapping[str, Any], now: float) -> None:
        if "alive" not in beat:
            return  # the rank's end
        if beat["count"] != seen.count:
            seen.count, seen.progress_at = beat["count"], now
        if beat["alive"] != seen.alive:
            seen.alive, seen.alive_at = beat["alive"], now
        seen.patient, seen.what, seen.since = beat["patient"], beat["what"], beat["since"]
        if beat["state"] != seen.state:
            seen.state = beat["state"]
            seen.stopped_at = now if seen.state == "stopped" else None

    def _silence(self, rank: int, seen: Seen, now: float) -> Trouble | None:
        if seen.record is None:
            waited = now - self.started
            why = f"its host did not start it within {waited:.0f} s"
            return Trouble(rank, "never started", why) if waited > self.limits.start else None
        if now - seen.alive_at > self.limits.contact:
            return Trouble(rank, "lost", f"no sign of its host for {now - seen.alive_at:.0f} s", dump=True)
        if seen.stopped_at is not None and now - seen.stopped_at > self.limits.stopped:
            return Trouble(rank, "stopped", "it was stopped by a signal and not continued", dump=True)
        # Until it has spoken for the first time it loads its libraries, which may come from a slow disk.
        if seen.count <= 0 and now - seen.progress_at > self.limits.start:
            why = f"no progress for {now - seen.progress_at:.0f} s while it was starting"
            return Trouble(rank, "hung", why, dump=True)
        return None

    def _hang(self, now: float) -> Trouble | None:
        """A rank that waits for another stands still as well: while one gets on, no other is said to hang for long.

        Of those that stand, the one that stood first is named: the others went on until they needed it.
        """
        busy = {
            rank: seen for rank, seen in self.ranks.items() if seen.end is None and not seen.patient and seen.count > 0
        }
        if not busy:
            return None
        all_stand = now - max(seen.progress_at for seen in busy.values()) > self.limits.hang
        longest = now - min(seen.progress_at for seen in busy.values())
        if not all_stand and longest <= max(self.limits.hang, self.limits.alone):
            return None
        rank = min(busy, key=lambda rank: busy[rank].since)
        why = f"no progress for {now - busy[rank].progress_at:.0f} s at: {busy[rank].what}"
        return Trouble(rank, "hung", why, dump=True)

    def _stood_before(self, rank: int, now: float) -> Trouble | None:
        """The rank that a peer, tired of waiting for it, may have failed for."""
        limit = self.limits.hang / 2
        standing = {
            other: seen for other, seen in self.ranks.items()
            if seen.end is None and not seen.patient and 0 < seen.since < self.ranks[rank].since
            and now - seen.progress_at > limit
        }  # fmt: skip
        if not standing:
            return None
        other = min(standing, key=lambda other: standing[other].since)
        why = f"no progress for {now - standing[other].progress_at:.0f} s at: {standing[other].what}"
        return Trouble(other, "hung", f"{why} (rank {rank} waited for it no longer)", dump=True)


def first_failure(failed: Mapping[int, End]) -> int:
    """The rank that failed by itself, and the earliest of these; the others often die of its absence."""
    return min(failed, key=lambda rank: (echo(failed[rank]), failed[rank].when, rank))


def echo(end: End) -> int:
    """How likely a rank ended so because of another one, from 0."""
    if deserted(end):
        return 2
    if end.kind == "ended":
        return 4
    if end.kind == "interrupted":
        return 3 if end.error.startswith(ASKED) or "another rank" in end.error else 2
    if end.kind == "signal" and "SIGTERM" in end.error:
        return 2
    if end.kind == "signal" and "SIGABRT" in end.error:
        return 1  # so NCCL's watchdog ends a rank that waited too long
    return int(end.kind == "exception" and _PEERS.search(end.error) is not None)


def deserted(end: End) -> bool:
    """Whether it saved and ended because its launcher gave no sign, and not because somebody wanted it to."""
    return end.kind == "ended" and end.code == INTERRUPTED
