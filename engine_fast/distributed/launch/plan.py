"""From flags to what is started where. Everything that can be wrong in the flags alone is refused here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine_fast.distributed.launch.hostfile import Host, is_host_name, read_hostfile
from engine_fast.distributed.launch.probe import gpus_here
from engine_fast.errors import ConfigError, require

MODES = ("local", "hosts", "nodes", "slurm")
LAUNCHERS = {"local": ("torchrun",), "hosts": ("pdsh", "openmpi"), "nodes": ("torchrun",), "slurm": ("slurm",)}
"""What can start ranks where; the first is the default."""
LOST_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Flags:
    """The command line of `engine-fast launch`, as it came."""

    out: Path
    arguments: tuple[str, ...]
    """Of engine-fast on every rank, subcommand first."""
    hostfile: Path | None = None
    nodes: int | None = None
    node_rank: int | None = None
    master: str | None = None
    slurm: bool = False
    launcher: str | None = None
    ranks: int | None = None
    ranks_per_node: int | None = None
    max_restarts: int = 0
    backoff: float = 5.0
    elastic: bool = False
    hang_seconds: float = 600.0
    grace_seconds: float = 60.0
    port: int = 0
    forward: tuple[str, ...] = ()
    preflight: bool = True
    gpus: bool = True
    """False: the configuration says that the ranks use none."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to start, before an attempt has a number and a port."""

    flags: Flags
    mode: str
    launcher: str
    hosts: tuple[Host, ...]
    """In nodes mode this node alone, until the others have joined."""
    master_addr: str
    """Empty: host 0's, as preflight finds it."""
    port: int
    """0: a free one of host 0."""
    python: str
    cwd: str
    notes: tuple[str, ...] = ()
    """What the user may not have meant."""

    @property
    def program(self) -> tuple[str, ...]:
        return (self.python, "-u", "-m", "engine_fast.cli.main")

    def with_hosts(self, hosts: Sequence[Host]) -> Plan:
        return replace(self, hosts=tuple(hosts))


def make_plan(
    flags: Flags, environ: Mapping[str, str] = os.environ, *, count_gpus: Callable[[], int] | None = None
) -> Plan:
    """Raises ConfigError for flags that contradict each other or their surroundings."""
    count_gpus = count_gpus or gpus_here
    mode = _mode(flags)
    launcher = flags.launcher or LAUNCHERS[mode][0]
    if launcher not in LAUNCHERS[mode]:
        where = {"local": "on this host", "hosts": "with --hostfile", "nodes": "with --nodes", "slurm": "with --slurm"}
        fitting = next((other for other in MODES if launcher in LAUNCHERS[other]), None)
        hint = {"hosts": " Give --hostfile.", "slurm": " Give --slurm."}.get(fitting or "", "")
        raise ConfigError(
            f"--launcher {launcher}: cannot be used {where[mode]}, expected {' or '.join(LAUNCHERS[mode])}.{hint}"
        )
    _check_numbers(flags)
    master_addr, port = _master(flags, mode)
    notes: tuple[str, ...] = ()
    if mode == "hosts":
        assert flags.hostfile is not None
        hosts = read_hostfile(flags.hostfile)
        if flags.ranks_per_node is not None:
            hosts = [_limited(host, flags.ranks_per_node) for host in hosts]
        require(flags.ranks is None, "--ranks", flags.ranks, "no such flag with --hostfile", "Its slots say it.")
    elif mode == "slurm":
        require(flags.ranks is None, "--ranks", flags.ranks, "no such flag with --slurm", "Use --ranks-per-node.")
        hosts, notes = _allocation(flags, environ)
    else:
        given = flags.ranks_per_node if flags.ranks is None else flags.ranks
        name = "localhost" if mode == "local" else f"node-{flags.node_rank}"
        hosts = [Host(name, given or count_gpus() or 1)]
    if mode == "local":
        master_addr = "127.0.0.1"
    if mode == "slurm" and not master_addr:
        master_addr = hosts[0].name
    return Plan(flags, mode, launcher, tuple(hosts), master_addr, port, sys.executable, os.getcwd(), notes)


def parse_master(text: str) -> tuple[str, int]:
    """`host:port` or `[address]:port`. Raises ConfigError."""
    name, _, port = text.rpartition(":")
    name = name.removeprefix("[").removesuffix("]") if name.startswith("[") else name
    good = is_host_name(name) and port.isascii() and port.isdecimal() and 1 <= int(port[:6]) <= 65535
    require(good, "--master", text, "HOST:PORT with a port from 1 to 65535")
    return name, int(port)


def _mode(flags: Flags) -> str:
    chosen = [
        ("--hostfile", "hosts", flags.hostfile is not None),
        ("--nodes", "nodes", flags.nodes is not None),
        ("--slurm", "slurm", flags.slurm),
    ]
    given = [(flag, mode) for flag, mode, is_given in chosen if is_given]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(flag for flag, _ in given)} exclude each other. Give one of them.")
    mode = given[0][1] if given else "local"
    if mode != "nodes":
        require(flags.node_rank is None, "--node-rank", flags.node_rank, "no such flag without --nodes")
        require(
            flags.master is None or mode == "hosts",
            "--master",
            flags.master,
            "no such flag without --nodes or --hostfile",
        )
        return mode
    assert flags.nodes is not None
    require(flags.nodes >= 1, "--nodes", flags.nodes, "at least 1")
    if flags.node_rank is None or not 0 <= flags.node_rank < flags.nodes:
        raise ConfigError(
            f"--node-rank = {flags.node_rank}, expected 0 to {flags.nodes - 1}: "
            "the same command runs on every node, each with its own number."
        )
    if flags.master is None:
        raise ConfigError("--nodes needs --master HOST:PORT: the address of node 0 and a free port there.")
    return mode


def _check_numbers(flags: Flags) -> None:
    require(flags.ranks is None or flags.ranks >= 1, "--ranks", flags.ranks, "at least 1")
    require(flags.ranks_per_node is None or flags.ranks_per_node >= 1, "--ranks-per-node", flags.ranks_per_node, ">= 1")
    require(flags.max_restarts >= 0, "--max-restarts", flags.max_restarts, "0 or more")
    require(flags.backoff >= 0, "--backoff", flags.backoff, "0 or more seconds")
    require(flags.hang_seconds > 0, "--hang-seconds", flags.hang_seconds, "more than 0 seconds")
    require(flags.grace_seconds > 0, "--grace-seconds", flags.grace_seconds, "more than 0 seconds")
    require(0 <= flags.port <= 65535, "--port", flags.port, "0 (a free one) to 65535")
    require(
        not flags.elastic or flags.max_restarts > 0, "--elastic", True, "false without --max-restarts",
        "It says which hosts a restart uses.",
    )  # fmt: skip


def _master(flags: Flags, mode: str) -> tuple[str, int]:
    if flags.master is None:
        return "", flags.port
    require(flags.port == 0, "--port", flags.port, "no such flag with --master, which has one")
    return parse_master(flags.master)


def _limited(host: Host, most: int) -> Host:
    if most > host.slots:
        raise ConfigError(f"--ranks-per-node = {most}, expected at most {host.slots}: the slots of {host.name}.")
    return Host(host.name, most)


def _allocation(flags: Flags, environ: Mapping[str, str]) -> tuple[list[Host], tuple[str, ...]]:
    """The hosts of the SLURM job around this process, and what is odd about it."""
    nodelist = environ.get("SLURM_JOB_NODELIST")
    if "SLURM_JOB_ID" not in environ or not nodelist:
        raise ConfigError("--slurm: no allocation is here (SLURM_JOB_ID is not set). Use it inside sbatch or salloc.")
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, timeout=60, check=True
        ).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"--slurm: scontrol cannot expand SLURM_JOB_NODELIST = {nodelist!r} ({error}).") from error
    gpus = _last_number(environ.get("SLURM_GPUS_ON_NODE", "")) or _last_number(environ.get("SLURM_GPUS_PER_NODE", ""))
    per_node = flags.ranks_per_node or _tasks(environ, gpus, len(listed)) or gpus or 1
    notes: tuple[str, ...] = ()
    if flags.ranks_per_node is None and per_node < gpus:
        notes = (f"SLURM says {per_node} tasks for {gpus} GPUs a node; for a rank a GPU give --ranks-per-node {gpus}",)
    return [Host(name, per_node) for name in listed], notes


def _tasks(environ: Mapping[str, str], gpus: int, nodes: int) -> int:
    """Tasks a node that the job asks for; 0 if it leaves them open. Raises ConfigError where nodes differ."""
    if asked := _last_number(environ.get("SLURM_NTASKS_PER_NODE", "")):
        return asked
    if gpus and not environ.get("SLURM_NTASKS"):
        return 0  # SLURM then counts one a node
    text = environ.get("SLURM_TASKS_PER_NODE", "")
    counts = []
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        require(found is not None, "SLURM_TASKS_PER_NODE", text, "such as 8(x2),4", "Give --ranks-per-node.")
        assert found is not None
        counts += [int(found[1])] * int(found[2] or 1)
    if len(set(counts[:nodes])) > 1:
        raise ConfigError(
            f"--slurm: SLURM_TASKS_PER_NODE = {text!r}, expected the same on every node. Give --ranks-per-node, "
            "or --ntasks-per-node to sbatch."
        )
    return counts[0] if counts else 0


def _last_number(text: str) -> int:
    """4 of `4`, `h100:4` and `gpu:h100:4`; 0 where there is none."""
    number = text.rpartition(":")[2]
    return int(number) if number.isascii() and number.isdecimal() else 0
