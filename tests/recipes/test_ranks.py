"""Two launched ranks train with every kind of teacher as one process does that takes as many micro-batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine_fast.config import RunConfig, dump_config, load_config
from engine_fast.models import load_model
from engine_fast.recipes.run import run
from tests.distributed.torchrun import torchrun
from tests.recipes.micro import micro_config
from tests.recipes.test_pretrained import config_for, marian, until  # noqa: F401 - a fixture

pytestmark = pytest.mark.slow


def lines_of(out: Path, stage: str, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["kind"] == kind]


def assert_same(config: RunConfig, place: Path, *of_ranks: str, stages: tuple[str, ...]) -> Path:
    """Run it in this process, and on two ranks with settings of theirs, and compare. The directory of the ranks."""
    (place / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    common = [f"{stage}.batch.micro_batches=2" for stage in stages]
    one, two = place / "one", place / "two"
    assert run(load_config(place / "config.yaml", common), one, say=lambda line: None) is not None
    settings = [part for setting in (*common, *of_ranks) for part in ("--set", setting)]
    done = torchrun(2, "engine_fast.cli.main", "run", place / "config.yaml", "--out", two, *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in stages:
        for kind in ("train", "valid"):
            losses = [[line["loss"] for line in lines_of(out, stage, kind)] for out in (one, two)]
            assert len(losses[0]) >= 2
            assert losses[1] == pytest.approx(losses[0], rel=1e-4), (stage, kind)
    rows = [json.loads((out / "results.json").read_text())["systems"] for out in (one, two)]
    for key in ("bleu", "energy"):
        found = [{row["label"]: row[key] for row in each} for each in rows]
        assert found[1] == pytest.approx(found[0], rel=1e-4), key
    return two


def test_an_ensemble_with_a_teacher_from_right_to_left(tmp_path: Path) -> None:
    until("teacher", micro_config(), tmp_path / "member")
    ensemble = [{"path": str(tmp_path / "member" / "teacher"), "weight": 0.5}]
    training = micro_config().model_dump(mode="json", exclude_unset=True)
    config = micro_config(
        teacher=training["teacher"] | {"right_to_left": True}, engine=training["engine"] | {"ensemble": ensemble}
    )
    stages = ("teacher", "cmlm", "engine")
    two = assert_same(config, tmp_path, "teacher.zero_stage=1", "engine.zero_stage=2", stages=stages)
    assert load_model(two / "teacher" / "model", kind="teacher").model.right_to_left
    inputs = [json.loads((tmp_path / out / "engine" / "run.json").read_text())["inputs"] for out in ("one", "two")]
    assert inputs[0]["teacher 2 model"] == inputs[1]["teacher 2 model"]


def test_a_marian_in_shards(marian: Path, tmp_path: Path) -> None:  # noqa: F811
    sharded = ("cmlm.zero_stage=3", "engine.zero_stage=3", "engine.teacher_placement=sharded")
    two = assert_same(config_for(marian), tmp_path, *sharded, stages=("cmlm", "engine"))
    assert load_model(two / "teacher" / "model").model.kind == "huggingface"
