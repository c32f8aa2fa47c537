"""The sweep benchmark runs, and its parts add up."""

from __future__ import annotations

import pytest

from benchmarks.bench_sweep import measure


def test_the_parts_add_up() -> None:
    found = measure("configs/tables/table2_transformer.yaml", 1, 2)
    parts = ("step", "validation", "rest_of_training", "evaluation", "rest")
    assert sum(found[f"{part}_seconds"] for part in parts) == pytest.approx(found["wall_seconds"])
    assert found["ratio"] == found["wall_seconds"] / found["step_seconds"] > 1
