"""A sweep: which variations of a run are tried, as data, and what each is called.

A trial is the run's configuration with some keys set to other values. Trials come from a grid (every combination of its
values), from a list, or from both (every listed one with every combination).
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from engine_fast.config.base import Section

SECTIONS = ("teacher", "distill", "cmlm", "engine", "evaluate")
"""Whose keys a trial may set: the corpus and its vocabulary are those of the run, or figures could not be compared."""
_UNSAFE = re.compile(r"[^A-Za-z0-9._+,=-]+")
_LONGEST_LABEL = 150


class ListedTrial(Section):
    """One variation, by name."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")
    """Of the trial, and of its directory."""
    set: dict[str, Any]
    """section.key -> value; sections may also be written as such. engine.seed and cmlm.seed belong into the grid."""

    @field_validator("set", mode="before")
    @classmethod
    def _flat(cls, values: Any) -> Any:
        return _flattened(values)

    @field_validator("set")
    @classmethod
    def _known_sections(cls, values: dict[str, Any]) -> dict[str, Any]:
        for key in _checked(values):
            if is_seed(key):
                raise ValueError(f"{key} repeats a trial: seeds belong into sweep.grid, {key}: [1]")
        return values


class SweepConfig(Section):
    """Variations of the run, from one trained teacher and baseline wherever they leave these as they are."""

    grid: dict[str, list[Any]] = {}
    """section.key -> values; every combination is a trial. Trials that differ in engine.seed or cmlm.seed alone are
    averaged. null instead of a list takes out a key that the file's base has."""
    trials: list[ListedTrial] = []
    """Further ones by name; each is combined with the grid."""
    processes: NonNegativeInt = 1
    """Trials at a time, each in a process; 0 = one per core, or one on a GPU. Under a launcher: one on each rank."""

    @field_validator("grid", mode="before")
    @classmethod
    def _flat(cls, grid: Any) -> Any:
        flat = _flattened(grid)
        if not isinstance(flat, dict):
            return flat
        return {key: values for key, values in _checked(flat).items() if values is not None}

    @field_validator("grid")
    @classmethod
    def _values_given(cls, grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for key, values in grid.items():
            if not values:
                raise ValueError(f"{key} has no values")
            if len({_text(value) for value in values}) < len(values):
                raise ValueError(f"{key} has a value twice: {values}")
        return _checked(grid)

    @model_validator(mode="after")
    def _names_differ(self) -> SweepConfig:
        if not self.grid and not self.trials:
            raise ValueError("it has neither a grid nor trials")
        for trial in self.trials:
            if both := sorted(self.grid.keys() & trial.set.keys()):
                raise ValueError(
                    f"{both[0]} stands in the trial {trial.name} and in the grid: take it out of one of them "
                    f"(sweep.grid.{both[0]}: null)"
                )
        twice = [label for label, count in Counter(trial.label for trial in trials_of(self)).items() if count > 1]
        if twice:
            raise ValueError(f"two trials would be called {twice[0]}")
        return self


@dataclass(frozen=True, slots=True)
class Trial:
    """A variation of the run."""

    label: str
    """Unique and fit for a directory's name."""
    values: dict[str, Any]
    """section.key -> value."""
    group: str
    """The label without seeds: trials of one group are repetitions."""
    name: str = ""
    """Of the listed trial that it comes from, if it comes from one."""


def trials_of(sweep: SweepConfig) -> list[Trial]:
    """In the order of the list, then of the grid, whose last key changes fastest."""
    listed = [Trial(trial.name, trial.set, trial.name, trial.name) for trial in sweep.trials] or [Trial("", {}, "")]
    short = _short_names(list(sweep.grid))
    found = []
    for trial in listed:
        for values in itertools.product(*sweep.grid.values()):
            chosen = dict(zip(sweep.grid, values, strict=True))
            parts = {key: f"{short[key]}={_text(value)}" for key, value in chosen.items()}
            label = ",".join(filter(None, [trial.label, *parts.values()]))
            group = ",".join(filter(None, [trial.group, *(parts[key] for key in parts if not is_seed(key))]))
            found.append(
                replace(trial, label=_safe(label), values={**trial.values, **chosen}, group=_safe(group) or "all")
            )
    return found


def is_seed(key: str) -> bool:
    """Whether values of the key make repetitions of one trial, and not another one, which another teacher would."""
    return key in ("cmlm.seed", "engine.seed")


def _flattened(tree: Any) -> Any:
    """{engine: {seed: ..}} as {engine.seed: ..}, so that both can be written, also with --set."""
    if not isinstance(tree, dict):
        return tree
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        below = _flattened(value)
        nested = isinstance(below, dict)
        leaves = {f"{key}.{rest}": leaf for rest, leaf in below.items()} if nested else {str(key): value}
        for name, leaf in leaves.items():  # null wins, whichever way it is written
            flat[name] = None if name in flat and flat[name] is None else leaf
    return flat


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    for key in values:
        section, dot, _ = key.partition(".")
        if section == "seed" and not dot:
            raise ValueError("seed would change the corpus of every trial. Vary engine.seed, or cmlm.seed")
        if section not in SECTIONS or not all(key.split(".")[1:]) or not dot:
            raise ValueError(f"{key!r} is no key that a trial may set: section.key of {', '.join(SECTIONS)}")
        if key == "evaluate.split":
            raise ValueError("evaluate.split would compare figures of two corpora. Set it for the whole run")
        if key in ("teacher.pretrained", "teacher.pretrained.path", "teacher.pretrained.revision"):
            raise ValueError(f"{key} may bring another vocabulary, and the trials share one. Make a run of each")
    return values


def _short_names(keys: list[str]) -> dict[str, str]:
    """The last part of each key where that is unique, else the whole."""
    counts = Counter(key.split(".")[-1] for key in keys)
    return {key: last if counts[last := key.split(".")[-1]] == 1 else key for key in keys}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value)


def _safe(label: str) -> str:
    """Short, and without what a file name must not hold; two labels that become one are refused.

    It begins with a letter or digit, as names and keys do, so that none is hidden or another directory's.
    """
    return _UNSAFE.sub("_", label).lstrip("._+,=-")[:_LONGEST_LABEL]
