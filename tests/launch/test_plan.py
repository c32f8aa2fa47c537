"""Flags that contradict each other are refused before anything starts; what remains is a plan."""

from __future__ import annotations

import subprocess
import sys

import pytest

from engine_fast.distributed.launch import plan as planning
from engine_fast.distributed.launch.hostfile import Host
from engine_fast.distributed.launch.plan import Flags, make_plan, parse_master
from engine_fast.errors import ConfigError


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("n1 slots=4\nn2 slots=2\n")
    return path


def flags(tmp_path, **given):
    return Flags(out=tmp_path, arguments=("run", "a.yaml"), **given)


def test_defaults_by_place(tmp_path, hostfile):
    local = make_plan(flags(tmp_path), count_gpus=lambda: 0)
    assert (local.mode, local.launcher, local.hosts) == ("local", "torchrun", (Host("localhost", 1),))
    assert make_plan(flags(tmp_path), count_gpus=lambda: 8).hosts == (Host("localhost", 8),)
    assert make_plan(flags(tmp_path, ranks=3), count_gpus=lambda: 8).hosts == (Host("localhost", 3),)
    hosts = make_plan(flags(tmp_path, hostfile=hostfile, ranks_per_node=2))
    assert (hosts.launcher, hosts.hosts) == ("pdsh", (Host("n1", 2), Host("n2", 2)))
    nodes = make_plan(flags(tmp_path, nodes=2, node_rank=1, master="n0:29500"), count_gpus=lambda: 4)
    assert (nodes.launcher, nodes.hosts, nodes.master_addr, nodes.port) == (
        "torchrun", (Host("node-1", 4),), "n0", 29500
    )  # fmt: skip
    assert local.program == (sys.executable, "-u", "-m", "engine_fast.cli.main")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"hostfile": True, "nodes": 2}, "--hostfile and --nodes exclude each other"),
        ({"hostfile": True, "slurm": True}, "--hostfile and --slurm exclude"),
        ({"nodes": 2, "node_rank": 2, "master": "a:1"}, "--node-rank = 2, expected 0 to 1"),
        ({"nodes": 2, "node_rank": -1, "master": "a:1"}, "--node-rank = -1"),
        ({"nodes": 2, "master": "a:1"}, "--node-rank = None"),
        ({"nodes": 0, "node_rank": 0, "master": "a:1"}, "--nodes = 0"),
        ({"nodes": 2, "node_rank": 0}, "--nodes needs --master"),
        ({"node_rank": 0}, "--node-rank = 0, expected no such flag without --nodes"),
        ({"master": "a:1"}, "--master = 'a:1'"),
        ({"nodes": 2, "node_rank": 0, "master": "a:1", "port": 5}, "--port = 5"),
        ({"launcher": "pdsh"}, "--launcher pdsh: cannot be used on this host, expected torchrun. Give --hostfile."),
        ({"launcher": "slurm"}, "Give --slurm"),
        ({"hostfile": True, "launcher": "torchrun"}, "expected pdsh or openmpi"),
        ({"hostfile": True, "ranks": 2}, "--ranks = 2"),
        ({"hostfile": True, "ranks_per_node": 3}, "expected at most 2: the slots of n2"),
        ({"ranks": 0}, "--ranks = 0"),
        ({"ranks_per_node": 0}, "--ranks-per-node = 0"),
        ({"max_restarts": -1}, "--max-restarts = -1"),
        ({"backoff": -1.0}, "--backoff"),
        ({"hang_seconds": 0.0}, "--hang-seconds"),
        ({"grace_seconds": 0.0}, "--grace-seconds"),
        ({"port": 70000}, "--port = 70000"),
        ({"elastic": True}, "--elastic"),
        ({"slurm": True}, "no allocation is here"),
    ],
)
def test_refused(tmp_path, hostfile, given, says):
    given = {**given, "hostfile": hostfile} if given.get("hostfile") else given
    with pytest.raises(ConfigError) as caught:
        make_plan(flags(tmp_path, **given), {})
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "a", ":1", "a:", "a:0", "a:65536", "a:1x", "a b:1", "$(id):1", "a:-1", "a:\u0661"]
)
def test_bad_master(text):
    with pytest.raises(ConfigError, match="--master"):
        parse_master(text)


def test_master():
    assert parse_master("n0.example:29500") == ("n0.example", 29500)
    assert parse_master("10.0.0.1:1") == ("10.0.0.1", 1)
    assert parse_master("[fd00::2]:29500") == ("fd00::2", 29500)


def test_slurm_allocation(tmp_path, monkeypatch):
    def scontrol(command, **_):
        assert command == ["scontrol", "show", "hostnames", "gpu[1-2]"]
        return subprocess.CompletedProcess(command, 0, "gpu1\ngpu2\n", "")

    monkeypatch.setattr(planning.subprocess, "run", scontrol)
    around = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_GPUS_ON_NODE": "4"}
    plan = make_plan(flags(tmp_path, slurm=True), around)
    assert plan.hosts == (Host("gpu1", 4), Host("gpu2", 4))
    assert (plan.launcher, plan.master_addr) == ("slurm", "gpu1")
    assert make_plan(flags(tmp_path, slurm=True), {**around, "SLURM_NTASKS_PER_NODE": "2"}).hosts[0].slots == 2


@pytest.mark.parametrize(
    ("around", "ranks", "notes"),
    [
        ({"SLURM_TASKS_PER_NODE": "8(x2)"}, 8, 0),
        ({"SLURM_TASKS_PER_NODE": "8(x2)", "SLURM_NTASKS": "16", "SLURM_GPUS_ON_NODE": "8"}, 8, 0),
        ({"SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_PER_NODE": "h100:8"}, 8, 0),
        ({"SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_NTASKS": "4", "SLURM_GPUS_PER_NODE": "gpu:h100:8"}, 2, 1),
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "4"}, 2, 1),
        ({}, 1, 0),
    ],
)
def test_ranks_of_a_slurm_node(tmp_path, monkeypatch, around, ranks, notes):
    expand = subprocess.CompletedProcess([], 0, "gpu1\ngpu2\n", "")
    monkeypatch.setattr(planning.subprocess, "run", lambda *_, **__: expand)
    plan = make_plan(flags(tmp_path, slurm=True), {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[1-2]", **around})
    assert [host.slots for host in plan.hosts] == [ranks, ranks]
    assert len(plan.notes) == notes
    assert all(f"--ranks-per-node {8 if 'SLURM_NTASKS' in around else 4}" in note for note in plan.notes)


@pytest.mark.parametrize("tasks", ["8,4", "8(x1),4", "a few"])
def test_slurm_nodes_that_differ(tmp_path, monkeypatch, tasks):
    expand = subprocess.CompletedProcess([], 0, "gpu1\ngpu2\n", "")
    monkeypatch.setattr(planning.subprocess, "run", lambda *_, **__: expand)
    around = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_TASKS_PER_NODE": tasks}
    with pytest.raises(ConfigError, match="Give --ranks-per-node"):
        make_plan(flags(tmp_path, slurm=True), around)
    assert make_plan(flags(tmp_path, slurm=True, ranks_per_node=4), around).hosts[1].slots == 4


def test_gpus_are_counted_without_torch(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    assert planning.gpus_here() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert planning.gpus_here() == 0
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    listed = subprocess.CompletedProcess([], 0, "GPU 0: H100 (UUID: x)\nGPU 1: H100 (UUID: y)\n", "")
    monkeypatch.setattr(planning.subprocess, "run", lambda *_, **__: listed)
    assert planning.gpus_here() == 2


def test_the_launcher_never_imports_torch():
    code = (
        "import sys, engine_fast.cli.main, engine_fast.cli.launch, engine_fast.distributed.launch.follow, "
        "engine_fast.distributed.launch.rank, engine_fast.distributed.launch.reap, engine_fast.config; "
        "sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
