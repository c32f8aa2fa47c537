"""The launchers of nodes 1, 2, ...: join node 0's attempt, start the ranks of this node, obey, clean up, and go on."""

from __future__ import annotations

import secrets
import socket
import time
from dataclasses import dataclass
from typing import Any

from engine_fast.distributed.launch import nodes, probe
from engine_fast.distributed.launch.attempt import Attempt, Spec, attempts, read_json, write_json, write_private
from engine_fast.distributed.launch.cleanup import reap_hosts
from engine_fast.distributed.launch.launcher import Launch, locked
from engine_fast.distributed.launch.supervise import end_transport, peek, start_transport
from engine_fast.errors import ConfigError

_POLL = 0.25
_QUIT_SECONDS = 10.0


@dataclass
class Follower:
    """One node's launcher that is not node 0's."""

    launch: Launch

    def __post_init__(self) -> None:
        node = self.launch.plan.flags.node_rank
        assert node
        self._node, self._name = node, nodes.name_of(node)
        self._heard: tuple[float, Any] = (time.monotonic(), None)

    def run(self) -> int:
        """Node 0's exit code, or 2 if it is lost. Raises ConfigError if there is none."""
        launch, flags = self.launch, self.launch.plan.flags
        after: Attempt | None = None
        patience = nodes.JOIN_SECONDS
        with locked(launch.root, self._node, launch.say), launch.signals.caught():
            while True:
                attempt = nodes.find_attempt(
                    launch.root, after=after, nodes=flags.nodes or 1, arguments=flags.arguments, seconds=patience,
                    given_up=launch.signals.given_up,
                )  # fmt: skip
                if attempt is None and launch.signals():
                    return 130
                closed = self._take_part(attempt) if attempt is not None else attempts(launch.root)[-1].closed()
                if closed is None:
                    launch.say(f"node 0's launcher has given no sign for {launch.lost_seconds:g} s; this node is clean")
                    return 2
                if not closed["restart"]:
                    if closed["why"]:
                        launch.say(closed["why"])
                    launch.say(f"node 0 says: exit code {closed['code']}; the summary is on its terminal")
                    return int(closed["code"])
                after = attempt
                patience = nodes.JOIN_SECONDS + float(closed["delay"])

    def _take_part(self, attempt: Attempt) -> dict[str, Any] | None:
        """From joining to node 0's last word; None: node 0 is lost."""
        launch = self.launch
        launch.say(f"joining {attempt.directory} as node {self._node}")
        heart = nodes.NodeHeart(attempt, self._node, launch.signals)
        self._heard = (time.monotonic(), None)
        self._join(attempt)
        heart.start()
        try:
            spec = self._await_start(attempt)
            if spec is not None and self._name in [host.name for host in spec.hosts]:
                self._run(attempt, spec, heart)
        finally:
            attempt.forget(self._name)
            heart.end()
        while (closed := attempt.closed()) is None and not self._lost(attempt):
            time.sleep(_POLL)
        return closed

    def _join(self, attempt: Attempt) -> None:
        plan, root = self.launch.plan, self.launch.root
        nonce = f".nonce-{secrets.token_hex(8)}"
        (attempt.directory / nonce).write_text(nonce, encoding="utf-8")
        question = {"root": str(attempt.directory), "nonce": nonce, "cwd": plan.cwd, "port": 0, "master": ""}
        answer = {**probe.examine(question), "host": socket.gethostname()}
        (attempt.directory / nonce).unlink()
        if answer["nonce"] != nonce:
            raise ConfigError(f"{root}: what this node writes there cannot be read back.")
        write_private(attempt.environment_path(self._name), dict(self.launch.forwarded))
        joined = {
            "name": self._name, "slots": plan.hosts[0].slots, "answer": answer, "python": plan.python, "cwd": plan.cwd,
        }  # fmt: skip
        write_json(attempt.directory / f"{self._name}.json", joined)

    def _await_start(self, attempt: Attempt) -> Spec | None:
        while not attempt.holds("attempt.json"):
            if attempt.closed() is not None or self._lost(attempt) or self.launch.signals() > 1:
                return None
            time.sleep(_POLL)
        return attempt.spec()

    def _run(self, attempt: Attempt, spec: Spec, heart: nodes.NodeHeart) -> None:
        """Until the ranks of this node have ended."""
        index = [host.name for host in spec.hosts].index(self._name)
        child = start_transport(self.launch.command(spec, attempt, index), attempt.runner_log(self._name))
        self.launch.say(f"attempt {spec.number}: {spec.hosts[index].slots} ranks here, logs in {attempt.directory}")
        ranks, quit_at, lost_at = spec.ranks_of(self._name), None, None
        try:
            names = attempt.names()
            while not all(attempt.read_end(rank, listed=_end(attempt, rank) in names) is not None for rank in ranks):
                now = time.monotonic()
                if heart.transport is None:
                    heart.transport = peek(child)
                stop = (read_json(attempt.beat_path) or {}).get("stop") or {}
                if quit_at is None and (stop.get("action") == "quit" or self.launch.signals() > 1):
                    quit_at = now
                if lost_at is None and self._lost(attempt):
                    lost_at = now
                if quit_at is not None and now - quit_at > _QUIT_SECONDS:
                    break
                if lost_at is not None and now - lost_at > spec.grace_seconds + _QUIT_SECONDS:
                    break
                started = any(attempt.rank_path(rank, "json").exists() for rank in ranks)
                if heart.transport is not None and stop and not started:
                    break
                time.sleep(_POLL)
                names = attempt.names()
        finally:
            late = not all(attempt.rank_path(rank, "json").exists() for rank in ranks)
            end_transport(child, late=late, interrupts=self.launch.signals)
            for complaint in reap_hosts(attempt, spec, [self._name], None).values():
                self.launch.say(complaint)

    def _lost(self, attempt: Attempt) -> bool:
        """Whether node 0's launcher is gone, by changes of its beat and this node's own clock."""
        now, count = time.monotonic(), (read_json(attempt.beat_path) or {}).get("count")
        if count != self._heard[1]:
            self._heard = now, count
        return now - self._heard[0] > self.launch.lost_seconds


def _end(attempt: Attempt, rank: int) -> str:
    return attempt.rank_path(rank, "end.json").name
