"""`engine-fast run`: a file over another one, and the table on standard output."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from engine_fast.cli.main import app
from engine_fast.config import dump_config
from tests.recipes.micro import micro_config


def test_a_table_over_another_corpus(tmp_path: Path) -> None:
    """The table's own base is the demo; --base puts it over the micro corpus."""
    below = tmp_path / "below.yaml"
    below.write_text(dump_config(micro_config()))
    command = ["run", "configs/tables/table3.yaml", "--base", str(below), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, [*command, "--set", "evaluate.iterations=[1, 2]", "--set", "evaluate.rerank=false"])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("# Table 3: BLEU by number of refinement iterations\n")
    assert "Run `micro`, test split, 12 sentences, seed 3." in done.stdout
    for name in ("results.json", "table3/table.md", "table3/figure.png", "report.html"):
        assert (tmp_path / "run" / name).is_file(), name
    assert "table: table3" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_missing_base_is_a_mistake(tmp_path: Path) -> None:
    command = ["run", "configs/tables/table3.yaml", "--base", str(tmp_path / "no.yaml"), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "configs/tables/table3.yaml: its base" in done.stderr
    assert "cannot be read" in done.stderr
