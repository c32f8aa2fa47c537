"""The user starts the same command on every node: how these launchers find one another, without any ssh.

Node 0 leads. It opens an attempt; the others, who look for one with a living launcher, write down what they are and
wait. Once all have joined, node 0 writes attempt.json, and each starts the ranks of its own node. All decisions are
node 0's, published as ever to the guards; the others report, obey, clean up their own node, and read from node 0's last
word in launcher.beat how it ended and whether there will be another attempt. Files of node I, beside those of Attempt:

    open.json               {"nodes", "arguments"}, by node 0
    node-I.json             what joined: {"name", "slots", "answer", "python", "cwd"}
    node-I.beat             {"count", "time", "interrupts", "transport", "over"}: rewritten every second
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_fast.distributed.launch import preflight, probe
from engine_fast.distributed.launch.attempt import Attempt, attempts, read_json, write_json, write_record
from engine_fast.distributed.launch.hostfile import Host
from engine_fast.distributed.launch.probe import gpus_here
from engine_fast.distributed.launch.watch import Trouble
from engine_fast.errors import ConfigError

JOIN_SECONDS = 300.0
"""How long node 0 waits for the others to join, and they for it."""
_CLOCK_SECONDS = 5.0
_POLL = 0.25
_BYTES = 1024


def name_of(node: int) -> str:
    """A node as a host, in records and messages."""
    return f"node-{node}"


class NodeHeart(threading.Thread):
    """Tells node 0 every second that this node's launcher lives, and what it has to report."""

    def __init__(self, attempt: Attempt, node: int, interrupts: Callable[[], int]) -> None:
        super().__init__(name="node.beat", daemon=True)
        self._path, self._interrupts = attempt.directory / f"{name_of(node)}.beat", interrupts
        self._count, self._over, self._lock = 0, threading.Event(), threading.Lock()
        self.transport: int | None = None
        """Exit code of what started the ranks here."""
        self._finished = False

    def run(self) -> None:
        self._tell()
        while not self._over.wait(1.0):
            self._tell()

    def end(self) -> None:
        """The node is clean."""
        self._over.set()
        self._finished = True
        self._tell()

    def _tell(self) -> None:
        with self._lock:
            self._count += 1
            tree = {
                "count": self._count, "time": time.time(), "interrupts": self._interrupts(),
                "transport": self.transport, "over": self._finished,
            }  # fmt: skip
            try:
                write_record(self._path, tree, _BYTES)
            except OSError:
                pass  # missed, as the guards' beats are


@dataclass(slots=True)
class _Peer:
    record: dict[str, Any]
    count: int = -1
    changed_at: float = 0.0
    offset: float | None = None
    """Seconds by which its clock is ahead."""
    interrupts: int = 0
    transport: int | None = None
    transport_at: float = 0.0
    over: bool = False


class Peers:
    """The other nodes' launchers, as node 0 sees them."""

    def __init__(self, attempt: Attempt, count: int, *, silence: float) -> None:
        self._attempt, self._count, self._silence = attempt, count, silence
        self._peers: dict[int, _Peer] = {}
        self._members: set[str] = set()

    def invite(self, arguments: Sequence[str]) -> None:
        write_json(self._attempt.directory / "open.json", {"nodes": self._count, "arguments": list(arguments)})

    def gather(
        self, own: Host, *, root: Path, python: str, cwd: str, seconds: float, given_up: threading.Event, gpus: bool
    ) -> tuple[list[Host], dict[str, str]]:
        """(hosts that take part, this one first; host -> why another cannot)."""
        limit, here = time.monotonic() + seconds, probe.versions()
        wanted = range(1, self._count)
        while time.monotonic() < limit and not given_up.is_set():
            self.look()
            if all(node in self._peers and self._peers[node].offset is not None for node in wanted):
                break
            time.sleep(_POLL)
        hosts, failures = [own], dict[str, str]()
        if gpus and (why := preflight.short_of_gpus(gpus_here(), own.slots, anywhere=False)):
            failures[own.name] = why
        for node in wanted:
            peer = self._peers.get(node)
            why = "has not joined. Start the same command there, with --out on a shared file system."
            if peer is not None:
                why = self._unfit(peer, root=root, here=here, python=python, cwd=cwd)
                if gpus and not why:
                    why = preflight.short_of_gpus(peer.record["answer"]["gpus"], peer.record["slots"], anywhere=False)
            if why:
                failures[name_of(node)] = why if peer is None else f"({peer.record['answer']['host']}) {why}"
            else:
                assert peer is not None
                hosts.append(Host(name_of(node), int(peer.record["slots"])))
        self._members = {host.name for host in hosts}
        return hosts, failures

    def look(self) -> None:
        """Read what has changed."""
        now, names = time.monotonic(), self._attempt.names()
        for node in range(1, self._count):
            peer = self._peers.get(node)
            if peer is None:
                if f"{name_of(node)}.json" not in names:
                    continue
                record = read_json(self._attempt.directory / f"{name_of(node)}.json")
                if record is None:
                    continue
                peer = self._peers[node] = _Peer(record, changed_at=now)
            beat = read_json(self._attempt.directory / f"{name_of(node)}.beat")
            if beat is None or beat["count"] == peer.count:
                continue
            if peer.count >= 0:  # the first one seen may be old
                peer.offset = beat["time"] - time.time()
            peer.count, peer.changed_at, peer.interrupts = beat["count"], now, beat["interrupts"]
            if peer.transport is None and beat["transport"] is not None:
                peer.transport, peer.transport_at = beat["transport"], now
            peer.over = beat["over"]

    def interrupts(self) -> int:
        """Signals that the other launchers got."""
        return max((peer.interrupts for _, peer in self._taking_part()), default=0)

    def trouble(self) -> Trouble | None:
        """A launcher that is gone. Its ranks may be well, so they save."""
        self.look()
        now = time.monotonic()
        for node, peer in self._taking_part():
            if not peer.over and now - peer.changed_at > self._silence:
                why = f"the launcher on {name_of(node)} ({peer.record['answer']['host']}) has given no sign"
                return Trouble(None, "transport", f"{why} for {now - peer.changed_at:.0f} s", action="save")
        return None

    def ended_transports(self) -> list[tuple[str, int, float]]:
        """(host, exit code, when by the monotonic clock) where what started the ranks has ended."""
        return [
            (name_of(node), peer.transport, peer.transport_at)
            for node, peer in self._taking_part()
            if peer.transport is not None
        ]

    def await_over(self, hosts: Sequence[str], seconds: float) -> dict[str, str]:
        """Host -> complaint, for those whose launcher does not report that its node is clean."""
        limit = time.monotonic() + seconds
        while True:
            self.look()
            open_ = [host for host in hosts if not any(name_of(n) == host and p.over for n, p in self._peers.items())]
            if not open_ or time.monotonic() > limit:
                return dict.fromkeys(open_, "its launcher has not reported that the node is clean")
            time.sleep(_POLL)

    def _taking_part(self) -> list[tuple[int, _Peer]]:
        """Without those that came too late for this attempt."""
        return [(node, peer) for node, peer in self._peers.items() if name_of(node) in self._members]

    def _unfit(self, peer: _Peer, *, root: Path, here: Mapping[str, str], python: str, cwd: str) -> str:
        record, now = peer.record, time.time()
        if peer.offset is None:
            return "joined, and has given no sign since."
        if abs(peer.offset) > _CLOCK_SECONDS:
            return f"its clock is {abs(peer.offset):.0f} s off. Let both hosts set their clocks (chrony, ntpd)."
        for name, theirs, ours in (("python", record["python"], python), ("directory", record["cwd"], cwd)):
            if theirs != ours:
                return f"was started with {name} {theirs}, node 0 with {ours}. Start the same command on every node."
        answer = {**record["answer"], "time": now}
        return preflight.unfit(answer, nonce=answer["nonce"], here=here, started=now, ended=now, root=root, cwd=cwd)


def find_attempt(
    root: Path, *, after: Attempt | None, nodes: int, arguments: Sequence[str], seconds: float,
    given_up: threading.Event,
) -> Attempt | None:  # fmt: skip
    """The newest attempt later than `after` whose launcher lives.

    None if `given_up` was set first, or there will be none: the newest, `after` or one that this node missed, says so.
    Raises ConfigError: none within the time, or one that was started with another command.
    """
    seen: dict[int, int] = {}
    limit = time.monotonic() + seconds
    while not given_up.is_set():
        attempt = next(reversed(attempts(root)), None)
        closed = attempt.closed() if attempt is not None else None
        if after is not None and closed is not None and not closed["restart"]:
            return None
        if attempt is not None and (after is None or attempt.number > after.number):
            count = (read_json(attempt.beat_path) or {}).get("count")
            invitation = read_json(attempt.directory / "open.json") if attempt.holds("open.json") else None
            alive = count is not None and seen.setdefault(attempt.number, count) != count
            if alive and invitation is not None and closed is None:
                if (invitation["nodes"], invitation["arguments"]) != (nodes, list(arguments)):
                    theirs = f"--nodes {invitation['nodes']}, {' '.join(invitation['arguments'])}"
                    raise ConfigError(
                        f"node 0 was started with {theirs!r}, this node with --nodes {nodes}, {' '.join(arguments)!r}. "
                        "Start the same command on every node."
                    )
                return attempt
        if time.monotonic() > limit:
            raise ConfigError(
                f"{root}: node 0 has not opened an attempt within {seconds:g} s. Start the same command there, "
                "with --out on a file system that all nodes share."
            )
        given_up.wait(_POLL)
    return None
