"""Real processes, real signals: what a killed `engine-fast train` leaves, and that the same command goes on."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from engine_fast.config import dump_config
from engine_fast.training.metrics import read_metrics

from .conftest import lines_of, make_config, weights_of

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")
LONG = {"teacher__max_updates": 90, "teacher__checkpoint_every": 5, "teacher__validate_every": 30}


@pytest.fixture(scope="module")
def command(data_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "tiny.yaml"
    tree = yaml.safe_load(dump_config(make_config(**LONG)))
    path.write_text(yaml.safe_dump(tree))
    return [
        sys.executable, "-m", "engine_fast.cli.main", "train", str(path), "--stage", "teacher", "--data", str(data_dir),
    ]  # fmt: skip


def last_update(directory):
    return max((line["update"] for line in read_metrics(directory / "metrics.jsonl")), default=0)


def run_and_signal(command, directory, number, *, after):
    """Send the signal once the run has logged update `after`; returns (exit code, standard error)."""
    process = subprocess.Popen([*command, "--out", str(directory)], stderr=subprocess.PIPE, text=True)
    try:
        limit = time.monotonic() + 120
        while last_update(directory) < after:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < limit, "training did not come so far"
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, said


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory):
    from engine_fast.training import train_teacher

    directory = tmp_path_factory.mktemp("whole") / "teacher"
    train_teacher(make_config(**LONG), prepared, directory)
    return directory


def test_sigterm_then_kill_then_the_same_command_equals_uninterrupted(command, uninterrupted, prepared, tmp_path):
    from engine_fast.training import train_teacher

    directory = tmp_path / "teacher"
    code, said = run_and_signal(command, directory, signal.SIGTERM, after=9)
    assert code == 130, said
    assert "stopped by SIGTERM after update" in said
    assert "The same command continues" in said
    assert "Traceback" not in said
    stopped_at = int((directory / "checkpoints" / "latest").read_text().strip().removeprefix("update-"))
    assert 9 <= stopped_at < 60

    code, _ = run_and_signal(command, directory, signal.SIGKILL, after=stopped_at + 12)
    assert code == -signal.SIGKILL

    train_teacher(make_config(**LONG), prepared, directory)
    assert weights_of(directory) == weights_of(uninterrupted)
    for kind in ("train", "valid"):
        assert lines_of(directory, kind) == lines_of(uninterrupted, kind)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("after", [3, 27, 33, 60])
def test_any_signal_at_any_time(command, uninterrupted, prepared, tmp_path, number, after):
    from engine_fast.training import train_teacher

    directory = tmp_path / "teacher"
    run_and_signal(command, directory, number, after=after)
    train_teacher(make_config(**LONG), prepared, directory)
    assert weights_of(directory) == weights_of(uninterrupted)
    assert lines_of(directory, "train") == lines_of(uninterrupted, "train")
