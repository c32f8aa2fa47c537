"""engine-fast prepare: the printed report, and mistakes as one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from engine_fast.cli.main import app
from engine_fast.data.prepare import Prepared


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    synthetic = {"num_train": 400, "num_valid": 20, "num_test": 10}
    path.write_text(yaml.safe_dump({"data": {"synthetic": synthetic, "vocabulary": {"size": 200}}}))
    return path


def test_prepare_prints_its_report_and_says_when_there_is_nothing_to_do(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["prepare", str(config), "--out", str(out), "--set", "data.filters.max_tokens=9"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    kept = len(Prepared.open(out).split("train"))
    assert 0 < kept < 400
    for expected in ("too long", str(kept), "joint.model", "pairs/s", "longest"):
        assert expected in result.output
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0
    assert "nothing was done" in " ".join(again.output.split())


def test_a_mistake_is_one_line_and_exit_code_2(config: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["prepare", str(config), "--out", str(tmp_path / "o"), "--set", "data.sise=3"])
    assert result.exit_code == 2
    assert "data.sise is not a known key" in result.output
    assert "Traceback" not in result.output
