"""Two launchers that find each other through the run directory, over ranks that train nothing."""

from __future__ import annotations

import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .test_supervise import Launched, _beat, left_of, start


def pair(out: Path, what: str, *given: str) -> list[Launched]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    return [start(out, what, f"node={node}", f"master=127.0.0.1:{port}", *given) for node in (0, 1)]


def at_work(nodes: list[Launched]) -> None:
    limit = time.monotonic() + 60
    while not all(_beat(nodes[0], rank).get("count", 0) > 5 for rank in (0, 1)):
        assert time.monotonic() < limit
        time.sleep(0.05)


def finished(out: Path, what: str, *given: str) -> list[Launched]:
    nodes = pair(out, what, *given)
    for node in nodes:
        node.finish()
    return nodes


def signalled(out: Path, which: int, number: int) -> list[Launched]:
    nodes = pair(out, "work", "lost=3")
    at_work(nodes)
    nodes[which].process.send_signal(number)
    for node in nodes:
        node.finish()
    limit = time.monotonic() + 30
    while left_of(out) and time.monotonic() < limit:
        time.sleep(0.1)
    return nodes


def alone(out: Path) -> list[Launched]:
    """Node 1 with another command than node 0's."""
    node = start(out, "work", "node=0", "master=127.0.0.1:29999")
    other = start(out, "done", "node=1", "master=127.0.0.1:29999")
    other.finish()
    node.process.send_signal(signal.SIGTERM)
    node.finish()
    return [node, other]


def between_attempts(out: Path) -> list[Launched]:
    """Ctrl-C at node 0 when it has promised a restart."""
    nodes = pair(out, "exit7", "restarts=1", "backoff=300")
    limit = time.monotonic() + 60
    while not (_record(nodes[0].attempt() / "launcher.beat").get("closed") or {}).get("restart"):
        assert time.monotonic() < limit
        time.sleep(0.05)
    nodes[0].process.send_signal(signal.SIGINT)
    for node in nodes:
        node.finish()
    return nodes


def _record(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Launched]]:
    root = tmp_path_factory.mktemp("nodes")
    bodies = {
        "done": lambda out: finished(out, "done"),
        "once": lambda out: finished(out, "once", "restarts=2"),
        "kill": lambda out: finished(out, "kill"),
        "signal-1": lambda out: signalled(out, 1, signal.SIGTERM),
        "kill-1": lambda out: signalled(out, 1, signal.SIGKILL),
        "kill-0": lambda out: signalled(out, 0, signal.SIGKILL),
        "other": alone,
        "between": between_attempts,
    }
    with ThreadPoolExecutor(len(bodies)) as pool:
        futures = {name: pool.submit(body, root / name) for name, body in bodies.items()}
    return {name: future.result() for name, future in futures.items()}


def codes(nodes: list[Launched]) -> list[int]:
    return [node.process.returncode for node in nodes]


def test_both_finish(launched):
    nodes = launched["done"]
    assert codes(nodes) == [0, 0], nodes[0].said + nodes[1].said
    spec = json.loads((nodes[0].attempt() / "attempt.json").read_text())
    assert spec["hosts"] == [{"name": "node-0", "slots": 1}, {"name": "node-1", "slots": 1}]
    assert not list(nodes[0].attempt().glob("environment-*"))
    assert left_of(nodes[0].out) == []


def test_both_restart(launched):
    nodes = launched["once"]
    assert codes(nodes) == [0, 0], nodes[0].said + nodes[1].said
    ports = [json.loads((nodes[0].attempt(number) / "attempt.json").read_text())["master_port"] for number in (0, 1)]
    assert ports[0] != ports[1]


def test_a_killed_rank_is_named_on_node_0(launched):
    nodes = launched["kill"]
    assert codes(nodes) == [2, 2], nodes[0].said + nodes[1].said
    assert "rank 1 on node-1 was the first (signal): killed by SIGKILL" in nodes[0].said
    assert "node 0 says: exit code 2" in nodes[1].said
    assert left_of(nodes[0].out) == []


def test_a_signal_to_any_launcher_stops_all(launched):
    nodes = launched["signal-1"]
    assert codes(nodes) == [130, 130], nodes[0].said + nodes[1].said
    assert {end["code"] for end in nodes[0].ends().values()} == {130}
    assert left_of(nodes[0].out) == []


def test_a_killed_launcher_of_another_node_is_missed(launched):
    nodes = launched["kill-1"]
    assert codes(nodes) == [2, -9], nodes[0].said
    assert "the launcher on node-1" in nodes[0].said
    assert {end["code"] for end in nodes[0].ends().values()} == {130}
    assert left_of(nodes[0].out) == []


def test_a_killed_launcher_of_node_0_is_missed(launched):
    nodes = launched["kill-0"]
    assert codes(nodes) == [-9, 2], nodes[1].said
    assert "node 0's launcher has given no sign for 3 s; this node is clean" in nodes[1].said
    assert {end["code"] for end in nodes[0].ends().values()} == {130}
    assert left_of(nodes[0].out) == []


def test_a_promised_restart_is_taken_back(launched):
    nodes = launched["between"]
    assert codes(nodes) == [130, 130], nodes[0].said + nodes[1].said
    assert "node 0 has given up the restart" in nodes[1].said
    assert left_of(nodes[0].out) == []


def test_another_command_is_refused(launched):
    node, other = launched["other"]
    assert "Start the same command on every node" in other.said
    assert node.process.returncode == 130
    assert left_of(node.out) == []
