"""Sweeps at a size of seconds: what is shared is done once; trials are skipped, continued, spread, averaged."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine_fast.cli.main import app
from engine_fast.config import RunConfig, load_config
from engine_fast.config.sweep import trials_of
from engine_fast.errors import CheckpointError, ConfigError, DivergenceError, SweepError
from engine_fast.recipes import stages
from engine_fast.recipes import sweep as sweep_module
from engine_fast.recipes.run import run
from engine_fast.recipes.sweep import trial_config
from engine_fast.recipes.tables import check_table
from tests.distributed.torchrun import torchrun
from tests.recipes.micro import micro_config

MEASURED = {"split": "valid", "iterations": [1], "latency_sentences": 0, "bootstrap_samples": 0}
ONE_PASS = {**MEASURED, "systems": ["engine-oracle"]}
PAIRS = {"engine.o1": ["SX", "ST"], "engine.o2": ["ST"], "engine.seed": [1, 2]}
LABELS = [f"o1={o1},o2=ST,seed={seed}" for o1 in ("SX", "ST") for seed in (1, 2)]
TIMES = {"sentences_per_second", "latency_ms", "num_ranks"}


NETWORK = {"architecture": {"kind": "bilstm", "embedding_width": 8, "width": 8, "layers": 1, "max_positions": 32}}
TRIALS = [
    {"name": "references", "set": {"cmlm.data": "references", "evaluate.systems": ["cmlm-oracle"]}},
    {"name": "distilled", "set": {"evaluate.systems": ["cmlm-oracle"]}},
    {"name": "engine", "set": {"evaluate.systems": ["engine-oracle"]}},
]


def pairs(**sweep: Any) -> RunConfig:
    config = micro_config(sweep={"grid": PAIRS, **sweep}, evaluate=ONE_PASS)
    return config.model_copy(update={"table": "table2"})


def go(config: RunConfig, out: Path) -> list[str]:
    said: list[str] = []
    run(config, out, say=said.append)
    return said


def rows_of(out: Path) -> list[dict[str, Any]]:
    systems = json.loads((out / "results.json").read_text())["systems"]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in systems]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four trials in this process; tests copy it before they change anything."""
    out = tmp_path_factory.mktemp("sweep") / "run"
    go(pairs(), out)
    return out


@pytest.fixture
def copied(swept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(swept, tmp_path / "run"))


@pytest.fixture
def begun(copied: Path) -> Path:
    """What the trials share, and no trial."""
    for name in ("trials", "table2"):
        shutil.rmtree(copied / name)
    (copied / "results.json").unlink()
    return copied


def test_what_trials_share_is_done_once(swept: Path) -> None:
    assert {path.name for path in swept.iterdir() if path.is_dir()} == {
        "prepare", "teacher", "distill", "cmlm", "trials", "table2"
    }  # fmt: skip
    for label in LABELS:
        assert {path.name for path in (swept / "trials" / label).iterdir() if path.is_dir()} == {"engine", "evaluate"}


def test_seeds_make_a_mean_and_a_range(swept: Path) -> None:
    results = json.loads((swept / "results.json").read_text())
    assert {"systems", "signature", "config", "versions", "machine", "seconds", "seed", "references"} <= results.keys()
    assert [row["trial"] for row in results["systems"]] == LABELS
    first, _ = results["table"]["rows"]
    energies = [row["energy"] for row in results["systems"][:2]]
    assert energies[0] != energies[1], "the seeds made no difference"
    assert first["energy"] == {
        "mean": sum(energies) / 2, "range": [min(energies), max(energies)], "values": energies
    }  # fmt: skip
    assert (first["o1"], first["o2"], results["num_seeds"]) == ("SX", "ST", 2)
    text = (swept / "table2" / "table.md").read_text()
    assert "means over 2 seeds, with the range in brackets" in text
    assert "| SX | 80 (31.7) | 133 (27.8) |" in text
    assert (swept / "table2" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_finished_trials_are_skipped(copied: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (copied / "trials").rglob("*") if path.name != ".lock"}
    said = go(pairs(), copied)
    assert "sweep: 4 trials, 4 of them done before" in said
    assert not [line for line in said if line.startswith("o1=")]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_longer_sweep_runs_what_is_new(copied: Path) -> None:
    said = go(pairs(grid={**PAIRS, "engine.seed": [1, 2, 3]}), copied)
    assert {line.split(":")[0] for line in said if line.startswith("o1=")} == {
        "o1=SX,o2=ST,seed=3",
        "o1=ST,o2=ST,seed=3",
    }
    assert json.loads((copied / "results.json").read_text())["num_seeds"] == 3


def test_one_seed_grows_to_more_and_shows_no_range(copied: Path) -> None:
    """As the shipped tables do: seed 1 is in the grid, and `--set sweep.grid.engine.seed=[1, 2]` keeps it."""
    shutil.rmtree(copied / "trials" / LABELS[1])
    said = go(pairs(grid={**PAIRS, "engine.seed": [1]}), copied)
    assert "sweep: 2 trials, 2 of them done before" in said
    text = (copied / "table2" / "table.md").read_text()
    assert "seeds" not in text
    assert "[" not in text.split("## This run")[1].split("## The paper")[0]
    assert text.count("**not decided** (2 of 25 pairs)") == 2
    said = go(pairs(), copied)
    assert "sweep: 4 trials, 3 of them done before" in said
    assert {line.split(":")[0] for line in said if line.startswith("o1=")} == {LABELS[1]}


def test_pairs_that_never_improved_are_told(copied: Path) -> None:
    for label, update in zip(LABELS, (0, 3, 3, 6), strict=True):
        path = copied / "trials" / label / "engine" / "run.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "best_update": update}))
    shutil.rmtree(copied / "table2")
    go(pairs(), copied)
    text = (copied / "table2" / "table.md").read_text()
    assert "the network it started from: 1 of 2, marked with an asterisk: SX/ST (1 of 2 seeds)." in text
    assert [row["unchanged"] for row in json.loads((copied / "results.json").read_text())["table"]["rows"]] == [1, 0]


def test_a_trial_may_be_called_like_the_sweeps_stage(tmp_path: Path) -> None:
    trials = [{"name": "sweep", "set": {"evaluate.beam": 2}}]
    go(micro_config(sweep={"trials": trials}, evaluate={**MEASURED, "systems": ["teacher-greedy"]}), tmp_path)
    assert (tmp_path / "sweep" / "table.md").is_file()


def test_a_sweep_has_no_report(swept: Path) -> None:
    for command in ("report", "evaluate"):
        done = CliRunner().invoke(app, [command, str(swept)])
        assert done.exit_code == 2
        assert f"{swept}: holds a sweep, expected a single run. What it found is in {swept / 'table2'}/" in done.stderr


def test_a_full_disk_ends_the_trial_all_the_same(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stages, "train_engine", failing)
    monkeypatch.setattr(sweep_module, "write_json", failing)
    said: list[str] = []
    with pytest.raises(SweepError, match="4 of 4 trials are not done"):
        run(pairs(), begun, say=said.append)
    assert sum("failed, the other trials go on. Traceback" in line for line in said) == 4


def test_a_failed_trial_is_named_and_tried_again(swept: Path, begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = stages.train_engine

    def failing(config: RunConfig, *arguments: Any, **options: Any) -> None:
        if (config.engine.o1, config.engine.seed) == ("ST", 1):
            raise DivergenceError("engine: a loss is not finite")
        if (config.engine.o1, config.engine.seed) == ("ST", 2):
            raise ZeroDivisionError("a mistake of ours")
        train(config, *arguments, **options)

    monkeypatch.setattr(stages, "train_engine", failing)
    with pytest.raises(SweepError) as told:
        go(pairs(), begun)
    assert "2 of 4 trials are not done: o1=ST,o2=ST,seed=1 (engine: a loss is not finite); o1=ST" in str(told.value)
    assert "ZeroDivisionError: a mistake of ours" in str(told.value)
    assert not (begun / "results.json").exists()
    monkeypatch.undo()
    said = go(pairs(), begun)
    assert "sweep: 4 trials, 2 of them done before" in said
    assert "o1=ST,o2=ST,seed=1: engine: was interrupted, continuing" in said
    assert rows_of(begun) == rows_of(swept)


def test_an_interrupted_trial_continues(swept: Path, begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine_fast.training import metrics

    write = metrics.MetricsLog.write

    def interrupted(log: metrics.MetricsLog, kind: str, update: int, values: Any) -> None:
        if log.path.parent.parent.name == LABELS[1] and update == 5:
            raise KeyboardInterrupt
        write(log, kind, update, values)

    monkeypatch.setattr(metrics.MetricsLog, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go(pairs(), begun)
    monkeypatch.undo()
    said = go(pairs(), begun)
    assert f"{LABELS[1]}: engine: was interrupted, continuing" in said
    assert rows_of(begun) == rows_of(swept)


def test_two_processes_find_what_one_does(swept: Path, begun: Path) -> None:
    said = go(pairs(processes=2), begun)
    assert {line.split(":")[0] for line in said if line.startswith("o1=")} == set(LABELS)
    assert rows_of(begun) == rows_of(swept)
    assert len(list((begun / "trials").glob("worker-*.log"))) == 2


@pytest.mark.slow
def test_workers_tell_what_failed(copied: Path) -> None:
    shutil.rmtree(copied / "trials" / LABELS[0])
    shutil.rmtree(copied / "trials" / LABELS[1])
    # the students' start is gone, but its record says that it is there: both trials fail, in whichever process
    (copied / "cmlm" / "model" / "model.safetensors").write_bytes(b"")
    record = json.loads((copied / "cmlm" / "stage.json").read_text())
    record["outputs"]["model/model.safetensors"] = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    (copied / "cmlm" / "stage.json").write_text(json.dumps(record))
    with pytest.raises(SweepError, match=r"2 of 4 trials are not done: o1=SX,o2=ST,seed=1 \(.*model"):
        go(pairs(processes=2), copied)


@pytest.mark.slow
def test_an_interrupt_reaches_the_workers_and_they_save(begun: Path, tmp_path: Path) -> None:
    from engine_fast.config import dump_config

    config = micro_config(
        sweep={"grid": PAIRS, "processes": 2}, evaluate=ONE_PASS,
        engine={"max_updates": 3000, "checkpoint_every": 3000, "validate_every": 3000},
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(dump_config(config.model_copy(update={"table": "table2"})))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    command = [sys.executable, "-m", "engine_fast.cli.main", "run", str(tmp_path / "config.yaml"), "--out", str(begun)]
    run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = [begun / "trials" / label / "engine" / "metrics.jsonl" for label in LABELS[:2]]
    deadline = time.monotonic() + 240
    while not all(path.is_file() and path.stat().st_size for path in metrics):
        assert time.monotonic() < deadline, "the trials did not begin"
        assert run.poll() is None, "the sweep ended"
        time.sleep(0.5)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: the workers are not of this group
    _, told = run.communicate(timeout=120)
    assert run.returncode == 130, told[-3000:]
    for path in metrics:
        assert list((path.parent / "checkpoints").glob("update-*")), "a worker saved nothing"
        assert not (path.parent / "stage.json").exists()


@pytest.mark.slow
def test_launched_ranks_take_trials_each(swept: Path, tmp_path: Path) -> None:
    from engine_fast.config import dump_config

    (tmp_path / "config.yaml").write_text(dump_config(pairs()))
    done = torchrun(2, "engine_fast.cli.main", "run", tmp_path / "config.yaml", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    # what is shared was trained by two ranks, whose batches are twice as large; the trials by one each
    assert len(rows_of(tmp_path / "run")) == 4
    assert {row["num_ranks"] for row in json.loads((tmp_path / "run" / "results.json").read_text())["systems"]} == {1}
    assert len(list((tmp_path / "run" / "trials").glob("worker-*.log"))) == 2


def test_a_run_without_sweep_lends_its_stages(tmp_path: Path) -> None:
    """Also one that only some trials share."""
    alone = micro_config(evaluate=ONE_PASS)
    go(alone, tmp_path)
    sweep = micro_config(sweep={"grid": {"engine.o1": ["SX", "ST"]}}, evaluate=ONE_PASS)
    said = go(sweep, tmp_path)
    assert [line for line in said if line.startswith("o1=SX")] == []
    assert "sweep: 2 trials, 1 of them done before" in said
    table = json.loads((tmp_path / "results.json").read_text())["table"]
    assert table["name"] == "sweep"
    assert {row["trial"] for row in table["rows"]} == {"o1=SX", "o1=ST"}
    assert [row["energy"]["mean"] for row in table["rows"]] == sorted(row["energy"]["mean"] for row in table["rows"])
    assert "## The paper" not in (tmp_path / "sweep" / "table.md").read_text()
    with pytest.raises(ConfigError, match="sweep = 'a sweep', expected a single run here"):
        run(sweep, tmp_path, redo=("evaluate",), only=("evaluate", "report"))


def test_table5_trains_each_network_once(tmp_path: Path) -> None:
    sweep = {"trials": TRIALS, "grid": {"engine.seed": [1, 2]}}
    config = micro_config(sweep=sweep, evaluate=MEASURED, cmlm=NETWORK, engine=NETWORK)
    config = config.model_copy(update={"table": "table5"})
    go(config, tmp_path)
    made = {
        name: {path.name for path in (tmp_path / "trials" / f"{name},seed=1").iterdir() if path.is_dir()}
        for name in ("references", "distilled", "engine")
    }
    assert made == {
        "references": {"cmlm", "evaluate"}, "distilled": {"cmlm", "evaluate"}, "engine": {"engine", "evaluate"}
    }  # fmt: skip
    # the seed of ENGINE changes nothing in the other two: these are measured, and counted, once
    assert not list((tmp_path / "trials").glob("[rd]*seed=2/evaluate"))
    text = (tmp_path / "table5" / "table.md").read_text()
    assert [line.split("|")[2].strip() for line in text.splitlines() if "| baseline (ref" in line][:1] == ["1"]
    assert "means over 1 to 2 seeds" in text
    rows = json.loads((tmp_path / "results.json").read_text())["table"]["rows"]
    assert [row["training"] for row in rows] == ["references", "distilled", "engine"]
    assert [row["num_seeds"] for row in rows] == [1, 1, 2]
    assert [row["system"] for row in rows] == ["cmlm-oracle.i1", "cmlm-oracle.i1", "engine-oracle.i1"]


@pytest.mark.parametrize(
    ("table", "sections", "told"),
    [
        ("table3", {"sweep": {"grid": PAIRS}}, "table = 'table3', expected no sweep"),
        ("table3", {"evaluate": {"iterations": [1]}}, r"evaluate.iterations = \[1\], expected 1 and at least one"),
        ("table3", {"evaluate": {"iterations": [4, 10]}}, r"evaluate.iterations = \[4, 10\], expected 1 and at"),
        ("table3", {"engine": NETWORK}, "engine.architecture.kind = 'bilstm', expected a student that refines"),
        ("table2", {"sweep": {"grid": PAIRS}, "evaluate": {**ONE_PASS, "iterations": [1, 4]}}, "one system for table2"),
        (
            "table5", {"sweep": {"trials": [*TRIALS[:2], {"name": "engine", "set": {}}]}, "evaluate": MEASURED},
            "trial engine: evaluate.systems = .*, expected one system for table5",
        ),
        ("table5", {"sweep": {"trials": TRIALS, "grid": {"engine.o1": ["SX"]}}}, r"sweep.grid = \['engine.o1'\], exp"),
        ("table4", {"evaluate": {"systems": ["cmlm", "engine"]}}, "expected teacher-greedy among them for table4"),
        ("table2", {}, "sweep = None, expected the trials that table2 compares"),
        ("table2", {"sweep": {"grid": {**PAIRS, "engine.optim.lr": [1e-3]}}}, r"sweep = \['engine.optim.lr'\], exp"),
        ("table2", {"sweep": {"grid": {"engine.o1": ["SX"]}}}, "engine.o1 and engine.o2 in each trial of table2"),
        ("table5", {"sweep": {"grid": PAIRS}}, r"sweep.trials = \[''\], expected trials called references, distilled"),
        (None, {"sweep": {"grid": {"engine.o1": ["SX", "SXT"]}}}, "sweep, trial o1=SXT: engine.o1 = 'SXT', expected"),
        (None, {"sweep": {"grid": {"engine.lr": [1]}}}, "sweep, trial lr=1: engine.lr is not a known key"),
        (None, {"sweep": {"grid": {"engine.optim.lr.a": [1]}}}, "a=1: engine.optim.lr.a: lr holds 0.001, not a"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_runs(
    tmp_path: Path, table: Any, sections: dict[str, Any], told: str
) -> None:
    config = micro_config(**sections).model_copy(update={"table": table})
    with pytest.raises(ConfigError, match=told):
        go(config, tmp_path / "run")
    assert not (tmp_path / "run" / "prepare").exists()


@pytest.mark.parametrize("base", [None, *sorted(Path("configs").glob("*.yaml"))], ids=lambda path: path and path.stem)
@pytest.mark.parametrize("path", sorted(Path("configs").glob("[st]*/*.yaml")), ids=lambda path: path.stem)
def test_every_table_and_sweep_goes_with_every_corpus(path: Path, base: Path | None) -> None:
    config = load_config(path, base=base)
    check_table(config)
    assert config.name == ("demo" if base is None else base.stem)
    assert config.table == (path.stem.split("_")[0] if path.parent.name == "tables" else None)
    trials = [] if config.sweep is None else trials_of(config.sweep)
    assert len(trials) == {"table2": 25, "table5": 3, None: 18}.get(config.table, 0)
    for each in [config, *(trial_config(config, trial) for trial in trials)]:
        student, baseline = each.engine.architecture, each.cmlm.architecture
        assert student.model_copy(update={"dropout": 0.0}) == baseline.model_copy(update={"dropout": 0.0})


@pytest.mark.parametrize("half", ["lstm", "transformer"])
def test_more_seeds_keep_the_shipped_trials(half: str) -> None:
    path = Path("configs/tables") / f"table2_{half}.yaml"
    one, three = load_config(path).sweep, load_config(path, ["sweep.grid.engine.seed=[1, 2, 3]"]).sweep
    assert one is not None
    assert three is not None
    grown = {trial.label: trial for trial in trials_of(three)}
    assert len(grown) == 75
    assert all(grown[trial.label] == trial for trial in trials_of(one))


def test_a_trial_with_another_network_has_its_keys_alone() -> None:
    grid = {"teacher.architecture.embedding_width": [8], "teacher.architecture.kind": ["lstm"]}
    config = micro_config(sweep={"grid": grid})
    assert config.sweep is not None
    (trial,) = trials_of(config.sweep)
    architecture = trial_config(config, trial).teacher.architecture
    assert architecture.model_dump(exclude_unset=True) == {"kind": "lstm", "embedding_width": 8}


def test_a_student_that_nobody_measures_is_not_trained(tmp_path: Path) -> None:
    go(micro_config(evaluate={**MEASURED, "systems": ["cmlm-oracle"]}), tmp_path)
    assert (tmp_path / "cmlm").exists()
    assert not (tmp_path / "engine").exists()
    assert (tmp_path / "report.html").exists()
    with pytest.raises(ConfigError, match="systems names cmlm-oracle, which needs oracle_lengths: true"):
        micro_config(evaluate={"systems": ["cmlm-oracle"], "oracle_lengths": False})
    with pytest.raises(ConfigError, match="systems names engine-rerank, which needs rerank: true and engine_length"):
        micro_config(evaluate={"systems": ["engine-rerank"], "engine_length_beam": 1})
    with pytest.raises(CheckpointError, match="stage engine is not done"):
        run(micro_config(evaluate=MEASURED), tmp_path, redo=("evaluate",), only=("evaluate", "report"))
