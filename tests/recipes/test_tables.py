"""The stage that makes a table of one run, from measurements that are there."""

from __future__ import annotations

import json
from pathlib import Path

from engine_fast.evaluation.files import write_json
from engine_fast.recipes.tables import run_stage
from tests.evaluation.test_tables import HEADER, of_run
from tests.recipes.micro import micro_config


def test_results_hold_the_config_that_asked_for_the_table(tmp_path: Path) -> None:
    """Not that of the run under the same --out whose evaluation it takes over."""
    config = micro_config().model_copy(update={"table": "table4", "name": "mine"})
    before = {**HEADER, **of_run((28.0, 33.0), (32.0, 33.2)), "config": {"seed": 1, "table": "table3"}}
    write_json(tmp_path / "evaluate" / "results.json", before)
    stage = run_stage(config, tmp_path)
    assert stage.directory is not None
    stage.directory.mkdir()
    stage.run(stage.directory)
    results = json.loads((stage.directory / "results.json").read_text())
    assert (results["name"], results["config"]["name"], results["config"]["table"]) == ("mine", "mine", "table4")
