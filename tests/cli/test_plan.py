"""engine-fast doctor --plan: the table, the JSON, what does not fit, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine_fast.cli.main import app

CONFIG = """
data: {synthetic: {}, vocabulary: {size: 2000}}
teacher: {architecture: {width: 64, heads: 4}}
cmlm: {architecture: {width: 64, heads: 4}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path / "run.yaml"


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["doctor", "--plan", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_the_table_has_every_term_of_every_stage_and_compares_ranks(path):
    output = run(path, "--ranks", 2, "--set", "engine.zero_stage=2")
    for text in ("teacher: ", "cmlm: ", "engine: ", "weights", "workspace", "total", "512 ranks", "Most is "):
        assert text in output
    assert output.count("the number of ranks changes nothing") == 2
    assert "From 2 to 512: optimizer -" in output


def test_offload_has_a_column_of_its_own(path):
    arguments = (path, "--device", "cpu", "--stage", "teacher", "--set", "teacher.zero_stage=2")
    assert "host GB" not in run(*arguments)
    assert "host GB" in run(*arguments, "--set", "teacher.offload.optimizer=true")


def test_json_says_the_same(path):
    report = json.loads(run(path, "--ranks", "4,8", "--json", "--stage", "engine"))
    (stage,) = report["stages"]
    assert stage["stage"] == "engine"
    assert stage["total"] == sum(stage["device"].values())
    assert stage["dominant"] in stage["device"]
    assert [plan["ranks"] for plan in stage["scaling"]] == [4, 8]
    assert stage["fits"] is None


def test_what_does_not_fit_fails_and_says_what_would(path):
    assert "It fits into 80 GB" in run(path, "--stage", "engine", "--device-memory", 80)
    output = run(path, "--stage", "engine", "--device-memory", 0.5, "--set", "engine.batch.max_tokens=16384", code=1)
    assert "does not fit into 0.5 GB" in output
    assert "--set engine." in output
    output = run(path, "--stage", "engine", "--device-memory", 0.0001, code=1)
    assert "Nothing that is tried suffices" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ranks", "0"), "--ranks '0', expected a number of ranks"),
        (("--ranks", "eight"), "--ranks 'eight', expected a number of ranks"),
        (("--device-memory", "-1"), "--device-memory -1.0, expected gigabytes"),
        (("--set", "engine.zero_stage=9"), "engine.zero_stage = 9"),
    ],
)
def test_mistakes_are_named(path, arguments, message):
    assert message in run(path, *arguments, code=2)
