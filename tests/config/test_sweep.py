"""Sweeps as data: which trials there are, what they are called, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from engine_fast.config import SweepConfig, parse_config
from engine_fast.config.sweep import trials_of
from engine_fast.errors import ConfigError


def sweep(**tree: Any) -> SweepConfig:
    found = parse_config({"data": {"synthetic": {}}, "sweep": tree}).sweep
    assert found is not None
    return found


def test_a_grid_is_every_combination_in_order() -> None:
    trials = trials_of(sweep(grid={"engine.o1": ["SX", "ST"], "engine.seed": [1, 2]}))
    assert [trial.label for trial in trials] == ["o1=SX,seed=1", "o1=SX,seed=2", "o1=ST,seed=1", "o1=ST,seed=2"]
    assert [trial.group for trial in trials] == ["o1=SX", "o1=SX", "o1=ST", "o1=ST"]
    assert trials[1].values == {"engine.o1": "SX", "engine.seed": 2}


def test_listed_trials_are_combined_with_the_grid() -> None:
    trials = trials_of(sweep(trials=[{"name": "a", "set": {"cmlm.data": "references"}}], grid={"engine.seed": [1, 2]}))
    assert [(trial.label, trial.name, trial.group) for trial in trials] == [
        ("a,seed=1", "a", "a"),
        ("a,seed=2", "a", "a"),
    ]
    assert trials[0].values == {"cmlm.data": "references", "engine.seed": 1}
    assert trials_of(sweep(grid={"engine.seed": [7]}))[0].group == "all"


def test_null_takes_out_what_a_base_has() -> None:
    assert sweep(grid={"engine.o1": None, "engine.seed": [1]}) == sweep(grid={"engine.seed": [1]})
    assert sweep(grid={"engine": {"o1": None, "seed": [1]}}) == sweep(grid={"engine.seed": [1]})
    both = {"engine": {"o1": None}, "engine.o1": ["SX"], "engine.seed": [1]}
    assert sweep(grid=both) == sweep(grid=dict(reversed(both.items()))) == sweep(grid={"engine.seed": [1]})
    assert len(trials_of(sweep(grid={"engine.seed": [None, 2]}))) == 2


def test_another_teacher_is_another_trial_and_no_repetition() -> None:
    trials = trials_of(sweep(grid={"teacher.seed": [1, 2], "cmlm.seed": [3], "engine.seed": [4, 5]}))
    assert [trial.group for trial in trials] == ["teacher.seed=1"] * 2 + ["teacher.seed=2"] * 2


def test_sections_may_be_written_as_such() -> None:
    nested = sweep(
        grid={"engine": {"optim": {"lr": [1e-4]}, "o1": ["SX"]}}, trials=[{"name": "a", "set": {"cmlm": {"data": "x"}}}]
    )
    assert nested == sweep(
        grid={"engine.optim.lr": [1e-4], "engine.o1": ["SX"]}, trials=[{"name": "a", "set": {"cmlm.data": "x"}}]
    )


def test_labels_are_names_of_directories() -> None:
    labels = [
        trial.label for trial in trials_of(sweep(grid={"engine.optim.lr": [1e-5], "evaluate.iterations": [[1, 4]]}))
    ]
    assert labels == ["lr=1e-05,iterations=1+4"]
    both = trials_of(sweep(grid={"engine.optim.lr": [0.1], "cmlm.optim.lr": [0.2]}))
    assert both[0].label == "engine.optim.lr=0.1,cmlm.optim.lr=0.2"


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({}, "neither a grid nor trials"),
        ({"grid": {"engine.o1": []}}, "engine.o1 has no values"),
        ({"grid": {"engine.seed": [1, 1]}}, "engine.seed has a value twice"),
        ({"grid": {"seed": [1, 2]}}, "seed would change the corpus .* Vary engine.seed"),
        ({"grid": {"data.corpus": ["a"]}}, "'data.corpus' is no key that a trial may set: section.key of teacher"),
        ({"grid": {"engine": [1]}}, "'engine' is no key"),
        ({"grid": {"nonsense": None, "engine.seed": [1]}}, "'nonsense' is no key"),
        ({"grid": {"evaluate.split": ["valid", "test"]}}, "evaluate.split would compare figures of two corpora"),
        ({"trials": [{"name": "a", "set": {"evaluate": {"split": "test"}}}]}, "evaluate.split would compare"),
        ({"grid": {"teacher.pretrained.path": ["a", "b"]}}, "may bring another vocabulary"),
        ({"trials": [{"name": "a/b", "set": {}}]}, "sweep.trials.0.name"),
        ({"trials": [{"name": "..", "set": {}}]}, "sweep.trials.0.name"),
        ({"trials": [{"name": "-a", "set": {}}]}, "sweep.trials.0.name"),
        ({"trials": [{"name": "a", "set": {"cmlm.seed": 2}}]}, r"seeds belong into sweep.grid, cmlm.seed: \[1\]"),
        ({"trials": [{"name": "a", "set": {}}, {"name": "a", "set": {}}]}, "two trials would be called a"),
        (
            {"trials": [{"name": "a", "set": {"engine.o1": "SX"}}], "grid": {"engine.o1": ["ST"]}},
            r"engine.o1 stands in the trial a and in the grid: take it out of one of them \(sweep.grid.engine.o1: null",
        ),
        ({"grid": {"engine.seed": [None, 1]}}, r"sweep.grid.engine.seed has a seed twice: \[None, 1\], and null is"),
        ({"grid": {"engine.o1": ["SX"]}, "process": 2}, "sweep.process is not a known key. Did you mean 'processes'"),
    ],
)  # fmt: skip
def test_mistakes(tree: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        sweep(**tree)
