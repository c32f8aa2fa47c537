"""`engine-fast train`: what it asks for, and that one stage follows from another."""

import pytest
from typer.testing import CliRunner

from engine_fast.cli.main import app
from engine_fast.config import dump_config
from engine_fast.data.atomic import only_one

from .conftest import make_config


@pytest.fixture
def train(data_dir, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_config(make_config()))

    def run(stage, *options):
        arguments = ["train", str(path), "--stage", stage, "--data", str(data_dir), "--out", str(tmp_path / stage)]
        return CliRunner().invoke(app, [*arguments, *map(str, options)])

    return run


def test_the_three_stages_follow_each_other(train, tmp_path):
    short = [option for stage in ("teacher", "cmlm", "engine") for option in ("--set", f"{stage}.max_updates=2")]
    for stage, needs in (
        ("teacher", []),
        ("cmlm", []),
        ("engine", ["--teacher", tmp_path / "teacher", "--student", tmp_path / "cmlm"]),
    ):
        result = train(stage, *needs, *short)
        assert result.exit_code == 0, result.stderr
        assert (tmp_path / stage / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("engine", [], "--stage engine needs --teacher"),
        ("engine", ["--teacher", "x"], "--stage engine needs --student"),
        ("cmlm", ["--set", "cmlm.data=distilled"], "needs --distilled"),
        (
            "cmlm",
            ["--set", "cmlm.from_teacher=true"],
            "cmlm.from_teacher = True, expected false when there is no teacher",
        ),
        ("teacher", ["--set", "teacher.learning_rate=1"], "teacher.learning_rate is not a known key"),
        ("cmlm", ["--set", "cmlm.data=distilled", "--distilled", "/nowhere"], "/nowhere: no such directory"),
        ("engine", ["--teacher", "/nowhere", "--student", "/nowhere"], "/nowhere"),
    ],
)
def test_what_is_missing_is_named(train, stage, options, message):
    result = train(stage, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_two_trainings_never_share_a_directory(train, tmp_path):
    with only_one(tmp_path / "teacher"):
        result = train("teacher")
    assert result.exit_code == 2
    assert "another engine-fast works here" in result.stderr
    assert not (tmp_path / "teacher" / "run.json").exists()


def test_the_launchers_option_is_accepted(data_dir, tmp_path):
    result = CliRunner().invoke(app, ["--local_rank=0", "train", "--help"])
    assert result.exit_code == 0
