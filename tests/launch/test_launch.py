"""The command itself: a real recipe on two ranks, its flags, and what --dry-run prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine_fast.cli.main import app
from engine_fast.config import dump_config
from tests.recipes.micro import STAGES, micro_config

from .test_supervise import left_of

ODD = 'it\'s a "run" $(touch pwned) %h'


@pytest.fixture
def place(tmp_path):
    """A directory that only careful quoting survives, with a recipe in it."""
    directory = tmp_path / ODD
    directory.mkdir()
    (directory / "micro.yaml").write_text(dump_config(micro_config(evaluate={"beam": 1, "iterations": [1]})))
    return directory


def command(*arguments):
    return [sys.executable, "-m", "engine_fast.cli.main", "launch", *arguments]


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *filter(None, sys.path)])}


def launch(place, *arguments):
    return subprocess.run(
        command(*arguments), cwd=place, env=environment(), capture_output=True, text=True, check=False, timeout=300
    )


def test_a_recipe_on_two_ranks(place):
    done = launch(place, "micro.yaml", "--out", "run", "--ranks", "2", "--set", "name=it's $(touch pwned)")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "launch: done: all 2 ranks finished" in done.stderr
    assert "engine: valid at 6" in done.stderr  # rank 0, live
    results = json.loads((place / "run" / "results.json").read_text())
    assert results["config"]["name"] == "it's $(touch pwned)"
    assert all((place / "run" / stage / "stage.json").exists() for stage in STAGES)
    attempt = place / "run" / "launch" / "attempt-000"
    for rank in (0, 1):
        assert json.loads((attempt / f"rank-{rank:05d}.end.json").read_text())["code"] == 0
        assert json.loads((attempt / f"rank-{rank:05d}.beat").read_text())["count"] > 50
    assert json.loads((place / "run" / "launch" / "summary.json").read_text())["world_size"] == 2
    assert left_of(place) == []
    assert not list(place.parent.rglob("pwned"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["micro.yaml", "--out", "run", "--hostfile", "h", "--nodes", "2"], "exclude each other"),
        (["micro.yaml", "--out", "run", "--hostfile", "absent"], "hostfile absent: cannot be read"),
        (["absent.yaml", "--out", "run"], "absent.yaml"),
        (["micro.yaml", "--out", "run", "--set", "engine.o2=STX"], "STX"),
        (["--out", "run", "--", "launch", "micro.yaml"], "'launch' is no command to launch"),
        (["--out", "run", "--", "evaluate", "old", "--frob"], "No such option: --frob"),
        (["--out", "run", "--", "evaluate", "old", "--out", "x"], "No such option: --out"),
        (["--out", "run", "--", "train"], "Missing argument"),
        (["--out", "run", "--", "frobnicate", "x"], "'frobnicate' is no command to launch"),
        (["--out", "run", "--set", "a=b", "--", "train", "micro.yaml"], "Write it after `-- train`"),
        (["micro.yaml", "--out", "run", "--forward", "NOT_SET_HERE"], "--forward NOT_SET_HERE: it is not set here"),
        (["micro.yaml", "--out", "micro.yaml/run"], "a file is in the way"),
    ],
)
def test_mistakes_end_with_2_and_start_nothing(place, monkeypatch, arguments, says):
    monkeypatch.chdir(place)
    done = CliRunner().invoke(app, ["launch", *arguments])
    assert done.exit_code == 2
    assert says in done.stderr
    assert not (place / "run" / "launch").exists()


def test_dry_run_prints_what_would_be_done(place):
    (place / "hosts").write_text("n1 slots=2\nn2 slots=1\n")
    train = ["train", "micro.yaml", "--stage", "teacher", "--data", "prepared"]
    done = launch(place, "--out", "run", "--hostfile", "hosts", "--dry-run", "--", *train)
    assert done.returncode == 0, done.stderr
    assert "hosts: n1 slots=2, n2 slots=1" in done.stdout
    assert "engine_fast.cli.main train micro.yaml --stage teacher --data prepared --out run" in done.stdout
    assert "pdsh -S -N -w n2" in done.stdout
    assert "-m engine_fast.distributed.launch.runner " in done.stdout
    assert "PATH" in next(line for line in done.stdout.splitlines() if line.startswith("forwarded: "))
    assert not (place / "run").exists()


@pytest.mark.parametrize("words", [["evaluate", "old"], ["report", "old"]])
def test_out_goes_only_where_it_is_taken(place, monkeypatch, words):
    monkeypatch.chdir(place)
    (place / "old").mkdir()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = CliRunner().invoke(app, ["launch", "--out", "run", "--dry-run", "--", *words])
    assert done.exit_code == 0, done.output
    assert f"engine_fast.cli.main {' '.join(words)}\n" in done.stdout


def at_update(place, stage, update):
    """Wait until a stage has logged an update."""
    limit = time.monotonic() + 200
    log = place / "run" / stage / "metrics.jsonl"
    while not (log.exists() and f'"update": {update}' in log.read_text()):
        assert time.monotonic() < limit
        time.sleep(0.02)


def long_config():
    teacher = {**micro_config().teacher.model_dump(), "max_updates": 400, "checkpoint_every": 20}
    return micro_config(teacher=teacher)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing happened to."""
    directory = tmp_path_factory.mktemp("whole")
    (directory / "micro.yaml").write_text(dump_config(long_config()))
    assert launch(directory, "micro.yaml", "--ranks", "2", "--out", "whole").returncode == 0
    return directory / "whole"


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["SIGTERM to the launcher", "SIGKILL to the launcher", "SIGKILL", "SIGSTOP", "SIGTERM"]
)
def test_after_a_fault_the_same_command_continues_to_the_same_weights(place, whole, fault):
    (place / "micro.yaml").write_text(dump_config(long_config()))
    train = ["--ranks", "2", "--out", "run", "--max-restarts", "1", "--backoff", "0.1"]
    process = subprocess.Popen(
        command("micro.yaml", *train), cwd=place, env=environment(), stderr=subprocess.PIPE, text=True
    )
    at_update(place, "teacher", 30)
    if "launcher" in fault:
        process.send_signal(getattr(signal, fault.split()[0]))
    else:
        pid = json.loads((place / "run/launch/attempt-000/rank-00001.json").read_text())["pid"]
        os.kill(pid, getattr(signal, fault))
    _, said = process.communicate(timeout=280)
    if fault.startswith(("SIGKILL to", "SIGTERM")):
        assert process.returncode == (-9 if "SIGKILL" in fault else 130), said
        if "SIGTERM" in fault:
            assert left_of(place) == []
        # At once after SIGKILL: the ranks do not yet know that they have no launcher.
        again = launch(place, "micro.yaml", *train)
        assert again.returncode == 0, again.stderr[-4000:]
        assert ("was left by a launcher that was killed" in again.stderr) == ("SIGKILL" in fault)
    else:
        assert process.returncode == 0, said[-4000:]
        assert "restart 1 of 1" in said
        assert "rank 1 on localhost was the first" in said
    last = max((place / "run" / "launch").glob("attempt-*"))
    assert "continuing after update" in (last / "rank-00000.log").read_text()
    for stage in ("teacher", "cmlm", "engine"):
        ours, theirs = (json.loads((out / stage / "stage.json").read_text()) for out in (place / "run", whole))
        assert ours["outputs"] == theirs["outputs"], stage
    assert left_of(place) == []
