"""Argument vectors: what starts the ranks, and what runs a small program on one host over the same transport.

What reaches a shell on another host is made of fixed words, the attempt's token and quoted strings.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine_fast.distributed.launch.attempt import Attempt, Spec
from engine_fast.distributed.launch.environment import early

_PACKAGE = "engine_fast.distributed.launch"
_SSH = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
_PINNING = {"openmpi": ("--launcher_args=--bind-to none",)}
"""mpirun would give each rank, with all its threads, a single core."""
_KEEP_ALIVE = ("-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3")


@dataclass(frozen=True, slots=True)
class Command:
    """A process for the launcher to start."""

    argv: tuple[str, ...]
    environment: dict[str, str]
    """All of it, not an addition."""
    cwd: str


def start_command(spec: Spec, attempt: Attempt, environ: Mapping[str, str], *, node: int = 0) -> Command:
    """What starts the ranks of an attempt (in nodes mode: those of node number `node`)."""
    guard = f"{_PACKAGE}.rank"
    if spec.launcher == "torchrun":
        argv = [
            spec.python, "-m", "torch.distributed.run", f"--nnodes={len(spec.hosts)}", f"--node-rank={node}",
            f"--nproc-per-node={spec.hosts[node].slots}", f"--master-addr={spec.master_addr}",
            f"--master-port={spec.master_port}", "-m", guard, attempt.token,
        ]  # fmt: skip
        return Command(tuple(argv), dict(environ), spec.cwd)
    if spec.launcher == "slurm":
        argv = [
            "srun", f"--nodes={len(spec.hosts)}", f"--ntasks={spec.world_size}",
            f"--ntasks-per-node={spec.hosts[0].slots}", f"--nodelist={','.join(host.name for host in spec.hosts)}",
            *_cpus(environ), *_gpus(environ), "--distribution=block", "--kill-on-bad-exit=0", "--wait=0",
            "--export=ALL", "--chdir=/", "--unbuffered",
            spec.python, "-u", "-m", guard, attempt.token,
        ]  # fmt: skip
        return Command(tuple(argv), _unbound(environ), spec.cwd)
    argv = [
        spec.python, "-m", f"{_PACKAGE}.runner", f"--hostfile={attempt.hostfile}", f"--launcher={spec.launcher}",
        f"--master_addr={spec.master_addr}", f"--master_port={spec.master_port}", "--force_multi", "--no_ssh_check",
        "--no_local_rank", *_PINNING.get(spec.launcher, ()), "--module", guard, attempt.token,
    ]  # fmt: skip
    return Command(tuple(argv), _for_runner(spec, environ), "/")


def remote_command(
    launcher: str, host: str, argv: Sequence[str], environ: Mapping[str, str], forwarded: Mapping[str, str]
) -> Command:
    """Run `argv` on one host, by what will start the ranks there; its output comes back.

    An attempt on this host alone, and each node of nodes mode, runs it without any transport.
    """
    if launcher == "torchrun":
        return Command(tuple(argv), dict(environ), "/")
    if launcher == "slurm":
        srun = ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={host}", "--export=ALL", "--chdir=/"]
        return Command((*srun, *_gpus(environ), *argv), _unbound(environ), "/")
    variables = [f"{name}={value}" for name, value in early(forwarded).items()]
    line = shlex.join(["env", *variables, *argv])
    if launcher == "openmpi":
        return Command(("ssh", *_SSH, host, line), dict(environ), "/")
    # pdsh reads %h, %u and %n in a command as its own
    return Command(("pdsh", "-S", "-N", "-w", host, line.replace("%", "%%")), _pdsh(environ), "/")


def helper(python: str, name: str, *arguments: str) -> list[str]:
    """`python -m` of a program of this package."""
    return [python, "-m", f"{_PACKAGE}.{name}", *arguments]


def shown(command: Command) -> str:
    """As one would type it, with the variables that it needs."""
    variables = [f"{name}={value}" for name, value in command.environment.items() if os.environ.get(name) != value]
    absent = [f"--unset={name}" for name in os.environ if name not in command.environment]
    prefix = ["env", f"--chdir={command.cwd}", *absent, *variables]
    return shlex.join([*prefix, *command.argv])


def _cpus(environ: Mapping[str, str]) -> list[str]:
    """srun no longer takes the job's own number by itself."""
    cpus = environ.get("SLURM_CPUS_PER_TASK", "")
    return [f"--cpus-per-task={cpus}"] if cpus.isdecimal() else []


def _gpus(environ: Mapping[str, str]) -> list[str]:
    """Every rank sees every GPU of its node and takes the one of its number, as torchrun and DeepSpeed have it."""
    return ["--gpu-bind=none"] if any(name.startswith("SLURM_") and "GPU" in name for name in environ) else []


def _unbound(environ: Mapping[str, str]) -> dict[str, str]:
    """Without what would give each task GPUs of its own."""
    return {name: value for name, value in environ.items() if name not in ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND")}


def _pdsh(environ: Mapping[str, str]) -> dict[str, str]:
    appended = " ".join([environ.get("PDSH_SSH_ARGS_APPEND", ""), *_SSH, *_KEEP_ALIVE]).strip()
    return {**environ, "PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": appended}


def _for_runner(spec: Spec, environ: Mapping[str, str]) -> dict[str, str]:
    """DeepSpeed reads a file of further variables, pastes them into a shell line, and fails on a comment in it."""
    env = {**environ, "DS_ENV_FILE": "/dev/null"}
    # It looks for GPUs on this host, which need not have any. Not for mpirun: ranks here would inherit it.
    return _pdsh({**env, "DS_ACCELERATOR": "cpu"}) if spec.launcher == "pdsh" else env
