"""bench_extras on a run of seconds: what it trains, what it does not train again, what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_extras, extras_table
from engine_fast.config import dump_config
from engine_fast.data.prepared import Prepared
from engine_fast.distributed import start
from engine_fast.recipes.execute import run_graph
from engine_fast.recipes.stages import build_stages
from engine_fast.training import train_teacher
from tests.recipes.micro import micro_config


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> bench_extras.Bench:
    """A run up to its cmlm, and a right-to-left teacher."""
    root = tmp_path_factory.mktemp("extras")
    config = micro_config()
    world = start(config.runtime)
    stages = build_stages(config, root / "run", world=world, say=print)
    run_graph(
        [stage for stage in stages if stage.name in ("prepare", "teacher", "distill", "cmlm")],
        root / "run",
        world=world,
        say=print,
    )
    (root / "run" / "config.yaml").write_text(dump_config(config))
    prepared = Prepared.open(root / "run" / "prepare" / "data")
    train_teacher(micro_config(teacher={**config.teacher.model_dump(), "right_to_left": True}), prepared, root / "r2l")
    return bench_extras.Bench(root / "run", root / "r2l", root / "work", updates=5, threads=1)


def test_every_variant_is_trained_and_measured_once(bench: bench_extras.Bench) -> None:
    only = ["plain", "ensemble", "o1_temperature", "repetition"]
    first = bench_extras.run(bench, only)
    assert set(only) <= set(first["variants"])
    for name, each in first["variants"].items():
        for kind in ("own", "rerank", "oracle"):
            assert {"bleu", "energy", "repetition", "p_value"} <= each[kind].keys(), (name, kind)
        assert each["oracle"]["length_accuracy"] == 1.0
    hard = first["variants"]["o1_temperature"]
    assert hard["gap"] != hard["own_gap"] or hard["best_update"] == 0
    assert first["variants"]["plain"]["gap"] == first["variants"]["plain"]["own_gap"]
    assert str(bench.backward) not in json.dumps(first)

    before = {path: path.stat().st_mtime_ns for path in bench.work.rglob("*") if path.is_file()}
    assert bench_extras.run(bench, only) == first
    assert {path: path.stat().st_mtime_ns for path in before} == before

    page = extras_table.markdown(first)
    assert page.count("\n| ") == 1 + len(first["before"]) + len(first["variants"])
    widths = {line.count("|") for line in page.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_the_dev_set_says_what_goes_together() -> None:
    found: dict[str, Any] = {name: {"dev": {"bleu": 10.0}} for name in ("plain", "ensemble", "repetition")}
    found["ensemble"]["dev"]["bleu"] = 10.1
    assert bench_extras.together(found) == ["ensemble"]


def test_the_schedules_temperature_is_that_of_the_kept_update(bench: bench_extras.Bench) -> None:
    engine = bench.config(bench_extras.VARIANTS["o1_temperature"]).engine
    assert [bench_extras.temperature_of(engine, update) for update in (0, 4, 5)] == pytest.approx([1.0, 0.1, 0.1])
    assert bench_extras.temperature_of(bench.config({}).engine, 4) == 1.0
    assert Path(bench.config(bench_extras.VARIANTS["ensemble"]).engine.ensemble[0].path) == bench.backward
