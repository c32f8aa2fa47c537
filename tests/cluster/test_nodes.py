"""The cluster itself: what a node is, and that nothing of it outlives the test."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.cluster.launches import all_gone
from tests.cluster.nodes import obstacle

ROOT = Path(__file__).resolve().parents[2]


def test_a_node_answers_to_name_and_address_and_has_its_own_processes(cluster):
    for node in cluster.nodes:
        for name in (node.name, node.address):
            said = cluster.head.run("ssh", name, "hostname; hostname -I; ls -d /proc/[0-9]* | wc -l").stdout.split()
            assert said[:2] == [node.name, node.address]
            assert int(said[2]) < 15  # init, sshd and this shell: nothing of the machine around
    said = cluster.head.run("env", "PDSH_RCMD_TYPE=ssh", "pdsh", "-w", "engine-a,engine-b", "hostname").stdout
    assert sorted(said.split("\n")) == ["", "engine-a: engine-a", "engine-b: engine-b"]
    assert all_gone(cluster) == []


def test_an_unknown_host_key_is_refused(cluster):
    name, other = (node.name for node in cluster.nodes)
    known = cluster.directory / "client" / "known_hosts"
    before = known.read_text()
    try:
        known.write_text("".join(line for line in before.splitlines(keepends=True) if name not in line))
        assert "verification failed" in cluster.head.run("ssh", name, "true", check=False).stderr
        assert cluster.head.run("ssh", other, "true").returncode == 0
    finally:
        known.write_text(before)


def test_faults_of_a_node_come_and_go(cluster):
    def reach(node, seconds=20):
        return cluster.head.run("ssh", "-o", f"ConnectTimeout={seconds}", node.name, sys.executable, "-V", check=False)

    a, b = cluster.nodes
    a.hide_python()
    assert reach(a).returncode == 127
    a.show_python()
    assert reach(a).returncode == 0
    a.stop_sshd()
    assert "refused" in reach(a).stderr
    a.start_sshd()
    cluster.cut(a)
    assert "timed out" in reach(a, seconds=1).stderr
    assert reach(b).returncode == 0
    cluster.heal(a)
    assert reach(a).returncode == 0


def test_power_off_ends_every_process_of_the_node_alone(cluster):
    sleepers = [subprocess.Popen(node.inside(["sleep", "60"])) for node in cluster.nodes]
    a, b = cluster.nodes
    while [process.command for some in cluster.processes().values() for process in some] != ["sleep 60"] * 2:
        time.sleep(0.01)
    [sleeper] = b.processes()
    a.power_off()
    assert sleepers[0].wait(timeout=5) == -signal.SIGKILL
    assert [process.pid for process in b.processes()] == [sleeper.pid]
    b.kill(sleeper.pid, signal.SIGTERM)
    assert sleepers[1].wait(timeout=5) == -signal.SIGTERM


@pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "possible")
def test_nothing_outlives_a_killed_test_run(tmp_path):
    script = f"""
        import subprocess, sys, time
        from pathlib import Path
        from tests.cluster.nodes import Cluster
        with Cluster(Path({str(tmp_path / "cluster")!r})) as cluster:
            subprocess.Popen(cluster.nodes[0].inside(["sleep", "4711"]))
            while not cluster.processes():
                time.sleep(0.01)
            print(*(f"{{node.pid}}" for node in (cluster.head, *cluster.nodes)), flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as run:
        pids = run.stdout.readline().split()
        assert len(pids) == 3
        run.kill()
    limit = time.monotonic() + 10
    while any(Path("/proc", pid).exists() for pid in pids):
        assert time.monotonic() < limit, "nodes outlived the test run"
        time.sleep(0.02)
