"""`engine-fast export`: a model directory from a stage's checkpoints, whatever became of the stage."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from engine_fast.cli.main import app
from engine_fast.models import load_model
from engine_fast.training import Interrupted

from .conftest import stop_at, weights_of


@pytest.fixture(scope="module")
def stage(plain_teacher, tmp_path_factory):
    """A copy of the finished stage without its model."""
    directory = tmp_path_factory.mktemp("export") / "teacher"
    shutil.copytree(plain_teacher, directory)
    shutil.rmtree(directory / "model")
    return directory


def run(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_the_best_checkpoint_makes_the_model_that_the_stage_made(stage, plain_teacher, tmp_path):
    result = run(stage, "--to", tmp_path / "model")
    assert result.exit_code == 0, result.stderr
    assert "best-00000012" in result.stdout
    assert weights_of(tmp_path) == weights_of(plain_teacher)
    one, other = load_model(tmp_path / "model"), load_model(plain_teacher / "model")
    assert one.model.architecture == other.model.architecture
    assert one.target_vocabulary.fingerprint == other.target_vocabulary.fingerprint
    assert one.card["checkpoint"] == "best-00000012"
    assert one.card["settings"] == other.card["settings"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [("latest", "update-00000012"), ("update-8", "update-00000008"), ("update-00000008", "update-00000008")],
)
def test_any_checkpoint_can_be_named(stage, tmp_path, checkpoint, name):
    result = run(stage, "--to", tmp_path / "model", "--checkpoint", checkpoint)
    assert result.exit_code == 0, result.stderr
    saved = load_file(stage / "checkpoints" / name / "weights.safetensors")
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert all(saved[key].equal(exported[key]) for key in exported)


def test_a_stage_and_its_model_are_exported_for_others(stage, plain_teacher, tmp_path):
    assert run(stage, "--to", tmp_path / "model").exit_code == 0
    assert (tmp_path / "model" / "README.md").read_text().startswith("# teacher\n")
    for name, source in (("a", stage), ("b", plain_teacher / "model")):
        result = run(source, "--to", tmp_path / name, "--format", "ctranslate2")
        assert result.exit_code == 0, result.stderr
    assert (tmp_path / "a" / "model.bin").read_bytes() == (tmp_path / "b" / "model.bin").read_bytes()
    assert "Checkpoint: best-00000012" in (tmp_path / "a" / "README.md").read_text()
    assert run(stage, "--to", tmp_path / "a", "--format", "ctranslate2").exit_code == 0  # an older export goes
    result = run(stage, "--to", tmp_path / "a")  # and only by its own kind
    assert result.exit_code == 2
    assert "exists, and is no model directory" in result.stderr
    result = run(stage, "--to", tmp_path / "c", "--format", "onnx")
    assert result.exit_code == 2
    assert "--format ctranslate2" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "model"]


def test_a_stage_that_took_over_its_model_is_exported(plain_teacher, tmp_path):
    (tmp_path / "teacher").mkdir()
    shutil.copytree(plain_teacher / "model", tmp_path / "teacher" / "model")
    result = run(tmp_path / "teacher", "--to", tmp_path / "model")
    assert result.exit_code == 0, result.stderr
    assert str(tmp_path / "teacher" / "model") in result.stdout
    assert weights_of(tmp_path) == weights_of(plain_teacher)
    refused = run(tmp_path / "teacher", "--to", tmp_path / "other", "--checkpoint", "latest")
    assert refused.exit_code == 2
    assert "has a model, and no checkpoints" in refused.stderr.replace("\n", " ")


def test_an_unfinished_stage_is_exported_too(teach, monkeypatch, tmp_path):
    stop_at(monkeypatch, 2)
    with pytest.raises(Interrupted):
        teach()
    assert run(tmp_path / "teacher", "--to", tmp_path / "model", "--checkpoint", "latest").exit_code == 0
    assert load_model(tmp_path / "model", kind="transformer").card["stage"] == "teacher"
    result = run(tmp_path / "teacher", "--to", tmp_path / "best")
    assert "nothing was validated yet" in result.stderr


def test_damage_is_found_and_the_model_that_was_there_is_kept(stage, tmp_path):
    directory, to = tmp_path / "teacher", tmp_path / "model"
    shutil.copytree(stage, directory)
    assert run(directory, "--to", to).exit_code == 0
    before = weights_of(tmp_path)
    for name in ("best-00000012", "update-00000012"):
        victim = directory / "checkpoints" / name / "weights.safetensors"
        content = victim.read_bytes()
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    result = run(directory, "--to", to)
    assert result.exit_code == 2
    assert "weights.safetensors has changed since it was written" in result.stderr
    assert weights_of(tmp_path) == before
    result = run(directory, "--to", to, "--checkpoint", "latest")
    assert result.exit_code == 0
    assert "falling back to checkpoint" in result.stderr
    assert "update-00000008" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "update-5"], "not in .*, which holds best-00000004, .*update-00000012"),
        (["--checkpoint", "newest"], "Take best, latest or one of these"),
    ],
)
def test_what_cannot_be_found_is_named(stage, tmp_path, options, message):
    result = run(stage, "--to", tmp_path / "model", *options)
    assert result.exit_code == 2
    assert re.search(message, result.stderr)
    assert list(tmp_path.iterdir()) == []


def test_only_a_model_directory_is_replaced(stage, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    result = run(stage, "--to", tmp_path)
    assert result.exit_code == 2
    assert "exists, and is no model directory" in result.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert "no readable run.json" in run(tmp_path, "--to", tmp_path / "model").stderr


def test_a_vocabulary_that_was_changed_is_refused(stage, tmp_path):
    directory = tmp_path / "teacher"
    shutil.copytree(stage, directory)
    path = directory / "vocabulary" / "vocabulary.json"
    entries = json.loads(path.read_text())
    entries["source"]["hash"] = "0" * 64
    path.write_text(json.dumps(entries))
    result = run(directory, "--to", tmp_path / "model")
    assert result.exit_code == 2
    assert "put the original back" in result.stderr


def test_deepspeed_is_not_needed(stage, tmp_path):
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from engine_fast.cli.main import app\n"
        f"app(['export', {str(stage)!r}, '--to', {str(tmp_path / 'model')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / "config.json").is_file()
