"""The exact argument vectors; and hostile values through a real shell, a real guard and DeepSpeed's real runner."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine_fast.distributed.launch import commands, probe
from engine_fast.distributed.launch.attempt import Attempt, Spec
from engine_fast.distributed.launch.environment import for_rank, forwarded
from engine_fast.distributed.launch.hostfile import Host
from engine_fast.errors import ConfigError

HOSTILE = {
    "ENGINE_FAST_QUOTES": "a 'b' \"c\" \\d \\",
    "NCCL_SHELL": "$(touch pwned) `touch pwned` ${HOME} $HOME !! ; touch pwned & | > pwned",
    "GLOO_LINES": "one\ntwo\n\n  export PWNED=1\n",
    "HF_LETTERS": "\u00e4\u00f6 \u4f60\u597d \U0001f600",
    "TORCH_BYTES": os.fsdecode(b"\xff\xfe latin \xe9"),
    "DS_PERCENT": "%h %n %u %% 100%",
    "OMP_EMPTY": "",
    "MKL_EQUALS": "a=b=c # comment",
}
ODD = 'it\'s a "dir" $(touch pwned) `id` %h %n\n\u00e4'


def make_spec(launcher="pdsh", hosts=(Host("n1", 2), Host("n2", 1)), **changes):
    given = {
        "id": "0123", "number": 0, "mode": "hosts", "launcher": launcher, "hosts": hosts,
        "python": "/opt/py/bin/python", "cwd": "/home/me",
        "program": ("/opt/py/bin/python", "-u", "-m", "engine_fast.cli.main"),
        "arguments": ("run", "a.yaml"), "master_addr": "n1", "master_port": 29500, "grace_seconds": 60.0,
        "lost_seconds": 20.0, "launcher_pid": 1, "launcher_host": "me", "started": 0.0,
    }  # fmt: skip
    return Spec(**{**given, **changes})


ATTEMPT = Attempt(Path("/shared/run/launch/attempt-000"))
GUARD = ["-m", "engine_fast.distributed.launch.rank", ATTEMPT.token]


def test_torchrun():
    spec = make_spec("torchrun", mode="nodes")
    command = commands.start_command(spec, ATTEMPT, {"A": "1"}, node=1)
    assert list(command.argv) == [
        "/opt/py/bin/python", "-m", "torch.distributed.run", "--nnodes=2", "--node-rank=1", "--nproc-per-node=1",
        "--master-addr=n1", "--master-port=29500", *GUARD,
    ]  # fmt: skip
    assert command.environment == {"A": "1"}


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_deepspeeds_runner(launcher):
    command = commands.start_command(make_spec(launcher), ATTEMPT, {"PDSH_SSH_ARGS_APPEND": "-p 22"})
    pinning = ["--launcher_args=--bind-to none"] if launcher == "openmpi" else []
    assert list(command.argv) == [
        "/opt/py/bin/python", "-m", "engine_fast.distributed.launch.runner",
        "--hostfile=/shared/run/launch/attempt-000/hosts", f"--launcher={launcher}", "--master_addr=n1",
        "--master_port=29500", "--force_multi", "--no_ssh_check", "--no_local_rank", *pinning,
        "--module", "engine_fast.distributed.launch.rank", ATTEMPT.token,
    ]  # fmt: skip
    assert command.cwd == "/"
    assert command.environment["DS_ENV_FILE"] == "/dev/null"
    if launcher == "pdsh":
        assert command.environment["PDSH_RCMD_TYPE"] == "ssh"
        assert command.environment["PDSH_SSH_ARGS_APPEND"].startswith("-p 22 -o BatchMode=yes")


def test_srun():
    spec = make_spec("slurm", (Host("g1", 4), Host("g2", 4)))
    command = commands.start_command(spec, ATTEMPT, {"SLURM_CPUS_PER_TASK": "8"})
    assert list(command.argv) == [
        "srun", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--nodelist=g1,g2", "--cpus-per-task=8",
        "--distribution=block", "--kill-on-bad-exit=0", "--wait=0", "--export=ALL", "--chdir=/", "--unbuffered",
        "/opt/py/bin/python", "-u", *GUARD,
    ]  # fmt: skip


def test_helpers_on_a_host():
    given = {"PYTHONPATH": "/a b", "NCCL_DEBUG": "x"}
    run = [*commands.helper("/py", "probe", "TOKEN")]
    quoted = "env 'PYTHONPATH=/a b' /py -m engine_fast.distributed.launch.probe TOKEN"
    assert commands.remote_command("pdsh", "n1", run, {}, given).argv == ("pdsh", "-S", "-N", "-w", "n1", quoted)
    assert commands.remote_command("openmpi", "n1", run, {}, given).argv[-2:] == ("n1", quoted)
    assert commands.remote_command("slurm", "n1", run, {}, given).argv[-4:] == tuple(run)
    assert "--nodelist=n1" in commands.remote_command("slurm", "n1", run, {}, given).argv
    assert commands.remote_command("torchrun", "n1", run, {}, given).argv == tuple(run)


def test_forwarded_names():
    around = {
        "PATH": "/bin", "HOME": "/root", "NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "3", "CUDA_HOME": "/cuda",
        "RANK": "0", "MASTER_PORT": "1", "ENGINE_FAST_ATTEMPT": "/x", "DS_ENV_FILE": "f", "AWS_SECRET": "s",
        "MINE": "m",
    }  # fmt: skip
    assert set(forwarded(around, everywhere=True)) == {"PATH", "NCCL_DEBUG", "CUDA_HOME"}
    assert set(forwarded(around, ["MINE"], everywhere=False)) == {
        "PATH", "NCCL_DEBUG", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "MINE"
    }  # fmt: skip
    for name, says in (("A=b", "not the name"), ("$(id)", "not the name"), ("NONE", "not set"), ("RANK", "its own")):
        with pytest.raises(ConfigError, match=says):
            forwarded(around, [name], everywhere=True)
    own = {"RANK": "1", "PYTHONPATH": "/", "OMP_NUM_THREADS": "1", "TERM": "dumb", "PATH": "/other"}
    assert for_rank(own, {"PATH": "/bin", "RANK": "0"}) == {"RANK": "1", "TERM": "dumb", "PATH": "/bin"}


@pytest.mark.parametrize("launcher", ["torchrun", "pdsh", "openmpi", "slurm"])
def test_hostile_values_reach_the_rank_through_its_guard(tmp_path, launcher):
    """Environment, working directory, program and arguments, by files alone."""
    odd = tmp_path / ODD.replace("/", "")
    odd.mkdir()
    attempt = Attempt.begin(odd, 0)
    report = "import json, os, sys; json.dump([dict(os.environ), os.getcwd(), sys.argv[1:]], open('seen', 'w'))"
    spec = make_spec(
        launcher,
        (Host("n1", 1),),
        program=(sys.executable, "-c", report),
        cwd=str(odd),
        arguments=tuple(HOSTILE.values()),
    )
    attempt.describe(spec, {"n1": {**HOSTILE, "LD_LIBRARY_PATH": ODD}})
    names = {
        "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
        "slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    }.get(launcher, ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    place = dict(zip(names, ("0", "0", "1"), strict=True))
    line = shlex.join([sys.executable, "-m", "engine_fast.distributed.launch.rank", attempt.token])
    environment = {**os.environ, **place, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *filter(None, sys.path)])}
    done = subprocess.run(["sh", "-c", line], env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0  # told to the transport whatever became of the rank
    assert (attempt.read_end(0).code, attempt.read_end(0).kind) == (1, "silent")
    seen, cwd, arguments = json.loads((odd / "seen").read_text())
    assert {name: seen.get(name) for name in HOSTILE} == HOSTILE
    assert seen["LD_LIBRARY_PATH"] == ODD
    assert (seen["RANK"], seen["LOCAL_RANK"], seen["WORLD_SIZE"], seen["MASTER_PORT"]) == ("0", "0", "1", "29500")
    assert seen["ENGINE_FAST_ATTEMPT"] == str(attempt.directory)
    assert os.path.samefile(cwd, odd)
    assert arguments == list(HOSTILE.values())
    assert attempt.environment_path("n1").stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.rglob("pwned"))


PDSH = """#!{python}
# What pdsh does with its arguments: joined by blanks, %n %h %u %% replaced, given to the remote shell.
import os, re, subprocess, sys
words = sys.argv[1:]
hosts = words.pop(words.index("-w") + 1).split(",")
options = {{"-S": 1, "-N": 1, "-w": 1, "-f": 2}}
while words and words[0] in options:
    del words[: options[words[0]]]
environment = {{"HOME": "/nowhere", "PATH": "/usr/bin:/bin"}}
running = []
for number, host in enumerate(hosts):
    known = {{"%n": str(number), "%h": host, "%u": "me", "%%": "%"}}
    line = re.sub("%[nhu%]", lambda found: known[found[0]], " ".join(words))
    running.append(subprocess.Popen(["sh", "-c", line], env=environment))
sys.exit(max(child.wait() for child in running))
"""


def test_hostile_values_through_deepspeeds_runner_and_a_shell(tmp_path):
    """The interpreter's own path and PYTHONPATH are the only strings that a remote shell reads."""
    odd = tmp_path / ODD.replace("\n", "")
    (odd / "bin").mkdir(parents=True)
    python = odd / "bin" / "python"
    python.symlink_to(sys.executable)
    if (configuration := Path(sys.prefix) / "pyvenv.cfg").exists():
        (odd / "pyvenv.cfg").write_text(configuration.read_text())
        (odd / "lib").symlink_to(Path(sys.prefix) / "lib")
    pdsh = tmp_path / "tools" / "pdsh"
    pdsh.parent.mkdir()
    pdsh.write_text(PDSH.format(python=sys.executable))
    pdsh.chmod(0o755)
    root = odd / "launch"
    root.mkdir()
    attempt = Attempt.begin(root, 0)
    report = (
        "import json, os; from engine_fast.distributed import presence; presence.attach(); "
        "json.dump(dict(os.environ), open('seen-' + os.environ['RANK'], 'w')); presence.finished(0)"
    )
    spec = make_spec(
        hosts=(Host("n1", 1),), python=str(python), cwd=str(odd), program=(str(python), "-c", report),
        arguments=tuple(HOSTILE.values()),
    )  # fmt: skip
    trees = {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *filter(None, sys.path), str(odd)])}
    attempt.describe(spec, {"n1": {**HOSTILE, **trees}})
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".deepspeed_env").write_text("# a comment\nA=$(touch pwned)\n")
    around = {**os.environ, **HOSTILE, **trees, "HOME": str(tmp_path / "home"), "DS_ACCELERATOR": "cpu"}
    around.update({"PATH$(touch pwned)": "1", "PYTHONPATH`touch pwned`": "2"})
    around["PATH"] = f"{pdsh.parent}{os.pathsep}{ODD}{os.pathsep}{os.environ['PATH']}"
    command = commands.start_command(spec, attempt, around)
    done = subprocess.run(command.argv, env=command.environment, cwd=command.cwd, capture_output=True, check=False)
    said = done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")
    assert done.returncode == 0, said[-3000:]
    assert attempt.read_end(0).kind == "done"
    seen = json.loads((odd / "seen-0").read_text())
    assert {name: seen.get(name) for name in HOSTILE} == HOSTILE
    assert seen["PYTHONPATH"] == trees["PYTHONPATH"]
    assert (seen["LOCAL_RANK"], seen["WORLD_SIZE"], seen["MASTER_ADDR"]) == ("0", "1", "n1")
    assert not list(tmp_path.rglob("pwned"))
    assert not Path("/pwned").exists()


@pytest.mark.parametrize(
    "real", [False, pytest.param(True, marks=pytest.mark.skipif(not shutil.which("pdsh"), reason="pdsh"))]
)
def test_helpers_through_pdsh(tmp_path, real):
    """The line that pdsh gives to ssh, run by a real shell in ssh's place."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "ssh").write_text('#!/bin/sh\nfor last; do :; done\nexec sh -c "$last"\n')
    (tools / "ssh").chmod(0o755)
    if not real:
        (tools / "pdsh").write_text(PDSH.format(python=sys.executable))
        (tools / "pdsh").chmod(0o755)
    given = {"PYTHONPATH": ODD, "LD_LIBRARY_PATH": HOSTILE["NCCL_SHELL"], "PATH": os.environ["PATH"]}
    report = "import json, os; print(json.dumps(dict(os.environ)))"
    around = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    command = commands.remote_command("pdsh", "n1", [sys.executable, "-c", report], around, given)
    done = subprocess.run(
        command.argv, env=command.environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert {name: json.loads(done.stdout)[name] for name in given} == given, done.stderr
    assert not list(tmp_path.rglob("pwned"))


def test_probe_answers_among_other_output(tmp_path):
    (tmp_path / "nonce").write_text("1234")
    question = {"root": str(tmp_path), "nonce": "nonce", "cwd": str(tmp_path), "port": 0, "master": "localhost"}
    token = probe.pack(question)
    assert probe.unpack(token) == question
    line = shlex.join(commands.helper(sys.executable, "probe", token))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *filter(None, sys.path)])}
    said = subprocess.run(
        ["sh", "-c", f"echo welcome; {line}"], capture_output=True, text=True, env=environment, check=True
    )
    answer = probe.find_answer(said.stdout)
    assert answer["nonce"] == "1234"
    assert answer["writable"]
    assert answer["cwd"]
    assert answer["versions"] == probe.versions()
    assert abs(answer["time"] - time.time()) < 60
    assert "127.0.0.1" in answer["resolves"] or "::1" in answer["resolves"]
    assert probe.is_free(answer["port"])
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen(1)
        assert not probe.is_free(server.getsockname()[1])
    assert probe.find_answer("nothing\n") is None
