"""The last stage of a run or sweep that makes one of the paper's tables: results.json, table.md and figure.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine_fast.config import RunConfig
from engine_fast.config.sweep import Trial, is_seed, trials_of
from engine_fast.errors import require
from engine_fast.evaluation.files import write_atomic, write_json
from engine_fast.evaluation.results import read_results
from engine_fast.evaluation.systems import systems_of
from engine_fast.evaluation.tables import PaperTable, markdown
from engine_fast.evaluation.tables_of_runs import table3, table4, table6
from engine_fast.evaluation.tables_of_sweeps import ROLES5, Measured, any_sweep, table2, table5
from engine_fast.evaluation.tables_plots import picture
from engine_fast.recipes.graph import Stage
from engine_fast.recipes.sweep import trial_config
from engine_fast.training.run_directory import read_record

FORMAT = 2
"""Raise when the tables change in meaning: they are then made again from the same measurements."""
OUTPUTS = ("results.json", "table.md", "figure.png")
_OPERATORS = ("engine.o1", "engine.o2")
_OF_RUNS: dict[str, tuple[str, ...]] = {
    "table3": ("cmlm", "engine"),
    "table4": ("teacher-greedy", "teacher-beam", "cmlm", "engine"),
    "table6": ("teacher-beam", "cmlm", "engine"),
}
"""Tables of one run, and the systems that each shows."""


def name_of(config: RunConfig) -> str | None:
    """Of the stage, and of its directory; None for a run that ends in a report."""
    return config.table or ("sweep" if config.sweep else None)


def check_table(config: RunConfig) -> None:
    """Raises ConfigError where the table asked for cannot come of this configuration."""
    if config.table in _OF_RUNS:
        _check_run(config)
    elif config.table is not None:
        _check_sweep(config)


def _check_run(config: RunConfig) -> None:
    table, settings = config.table, config.evaluate
    require(config.sweep is None, "table", table, "no sweep: it shows the systems of one run", "Take `sweep:` out.")
    names = {system.name for system in systems_of(settings)}
    for name in _OF_RUNS[str(table)]:
        require(name in names, "evaluate.systems", settings.systems, f"{name} among them for {table}")
    if table == "table3":
        for student in ("cmlm", "engine"):
            kind = getattr(config, student).architecture.kind
            require(
                kind != "bilstm", f"{student}.architecture.kind", kind,
                "a student that refines its output for table3: transformer", "A BiLSTM has one pass: see table5.",
            )  # fmt: skip
        require(
            1 in settings.iterations and len(set(settings.iterations)) > 1, "evaluate.iterations", settings.iterations,
            "1 and at least one number more for table3 (the paper: 1 and 10)",
        )  # fmt: skip


def _check_sweep(config: RunConfig) -> None:
    table, sweep = config.table, config.sweep
    require(sweep is not None, "sweep", None, f"the trials that {table} compares", f"See configs/tables/{table}*.")
    assert sweep is not None
    trials = trials_of(sweep)
    if table == "table2":
        others = {key for trial in trials for key in trial.values if not is_seed(key)} - {*_OPERATORS}
        complete = all(key in trial.values for trial in trials for key in _OPERATORS)
        require(
            complete and not others, "sweep", sorted(others) or list(sweep.grid),
            "engine.o1 and engine.o2 in each trial of table2, and engine.seed or cmlm.seed, but nothing else",
        )  # fmt: skip
        pairs = {tuple(trial.values[key] for key in _OPERATORS) for trial in trials}
        groups = {trial.group for trial in trials}
        require(len(groups) == len(pairs), "sweep", sorted(groups), "each pair of operators once in table2")
    else:
        names = {trial.name for trial in trials}
        require(names == set(ROLES5), "sweep.trials", sorted(names), f"trials called {', '.join(ROLES5)} for table5")
        others = {key for key in sweep.grid if not is_seed(key)}
        require(not others, "sweep.grid", sorted(others), "seeds alone in the grid of table5")
    for trial in trials:
        settings = trial_config(config, trial)
        # a student that does not refine is measured with one pass, whatever the iterations
        refine = all(student.architecture.kind != "bilstm" for student in (settings.cmlm, settings.engine))
        found = [system.label for system in systems_of(settings.evaluate, refine=refine)]
        require(
            len(found) == 1, f"sweep, trial {trial.label}: evaluate.systems", found, f"one system for {table}",
            "Set evaluate.systems to one of them and evaluate.iterations to one number.",
        )  # fmt: skip


def upstream_of(label: str) -> str:
    """What a trial is called among the upstream of the table's stage, whose own name it must not be."""
    return f"trials/{label}"


def run_stage(config: RunConfig, out: Path) -> Stage:
    """Of tables 3, 4 and 6: from the evaluation of one run."""
    assert config.table is not None

    def make(directory: Path) -> None:
        results = read_results(out / "evaluate" / "results.json")
        table = _TABLES_OF_RUNS[str(config.table)](results, out / "evaluate" / "outputs")
        # the evaluation may be that of another table under the same --out
        _write(directory, table, {**results, "name": config.name, "config": _tree(config)})

    return Stage(config.table, ("evaluate",), {"format": FORMAT}, OUTPUTS, make, directory=out / config.table)


def sweep_stage(config: RunConfig, out: Path, trials: Sequence[tuple[Trial, Mapping[str, Path]]]) -> Stage:
    """Of a sweep: from the evaluations of its trials, each with the directories of its stages."""
    name = name_of(config)
    assert name is not None

    def make(directory: Path) -> None:
        # where a seed changes nothing, trials share one evaluation: that is no repetition
        distinct: dict[tuple[str, Path], tuple[Trial, Mapping[str, Path]]] = {}
        for trial, places in trials:
            distinct.setdefault((trial.group, places["evaluate"]), (trial, places))
        measured = [
            Measured(trial, read_results(places["evaluate"] / "results.json"), _best_update(places))
            for trial, places in distinct.values()
        ]
        table = _table_of_sweep(config, measured)
        _write(directory, table, _together(config, measured))

    settings = {"format": FORMAT, "trials": [[trial.label, trial.values, trial.group] for trial, _ in trials]}
    upstream = tuple(upstream_of(trial.label) for trial, _ in trials)
    return Stage(name, upstream, settings, OUTPUTS, make, directory=out / name)


def _best_update(places: Mapping[str, Path]) -> int | None:
    """Of the ENGINE student, if there is one."""
    return read_record(places["engine"]).get("best_update") if "engine" in places else None


def _tree(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_none=True)


def _table_of_sweep(config: RunConfig, measured: Sequence[Measured]) -> PaperTable:
    if config.table == "table2":
        return table2(measured, half="lstm" if config.teacher.architecture.kind == "lstm" else "transformer")
    return table5(measured) if config.table == "table5" else any_sweep(measured)


def _together(config: RunConfig, measured: Sequence[Measured]) -> dict[str, Any]:
    """One results.json of all trials': each row says which it comes from; what they share is said once."""
    first = measured[0].results
    return {
        **{key: first[key] for key in ("references", "baseline", "split", "signature", "seed", "versions", "machine")},
        "name": config.name,
        "systems": [{"trial": each.trial.label, **row} for each in measured for row in each.results["systems"]],
        "num_seeds": max(sum(1 for other in measured if other.trial.group == each.trial.group) for each in measured),
        "config": _tree(config),
        "corpus": first["corpus"],
        "seconds": _seconds(measured),
        "hashes": {each.trial.label: each.results["hashes"] for each in measured},
    }


def _seconds(measured: Sequence[Measured]) -> dict[str, float]:
    """Stage -> seconds, and trial/stage -> seconds of what is not the same in all of them; each once."""
    owners: dict[tuple[str, str], list[Measured]] = {}
    for each in measured:
        for stage in each.results["seconds"]:
            owners.setdefault((stage, each.results["hashes"][f"{stage} outputs"]), []).append(each)
    return {
        stage if len(those) == len(measured) else f"{those[0].trial.label}/{stage}": those[0].results["seconds"][stage]
        for (stage, _), those in owners.items()
    }


def _write(directory: Path, table: PaperTable, results: Mapping[str, Any]) -> None:
    tree = {**results, "table": table.as_json()}
    write_atomic(directory / "table.md", markdown(table, tree))
    write_atomic(directory / "figure.png", picture(table))
    write_json(directory / "results.json", tree)


def _table6(results: dict[str, Any], outputs: Path) -> PaperTable:
    texts = {path.stem: _lines(path) for path in outputs.glob("*.txt")}
    references = [texts[name] for name in sorted(texts) if name.startswith("reference-")]
    return table6(results, texts, references)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]


_TABLES_OF_RUNS = {
    "table3": lambda results, _: table3(results),
    "table4": lambda results, _: table4(results),
    "table6": _table6,
}
