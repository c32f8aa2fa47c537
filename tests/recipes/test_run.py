"""The whole graph, for real, at a size of seconds."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine_fast.config import load_config
from engine_fast.errors import CheckpointError, ConfigError, DataError
from engine_fast.recipes.demo import demo_config
from engine_fast.recipes.run import run
from tests.distributed.torchrun import torchrun
from tests.recipes.micro import STAGES, micro_config

TIMES = {"sentences_per_second", "latency_ms", "num_ranks"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished micro run; tests copy it before they change anything."""
    out = tmp_path_factory.mktemp("micro") / "run"
    run(micro_config(), out, say=lambda line: None)
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def _run(out: Path, **sections: dict[str, Any]) -> list[str]:
    said: list[str] = []
    run(micro_config(**sections), out, say=said.append)
    return said


def test_recurrent_networks_pass_through_every_stage(tmp_path: Path) -> None:
    teacher = {"kind": "lstm", "embedding_width": 16, "encoder_width": 16, "decoder_width": 24, "max_positions": 32}
    tagger = {"kind": "bilstm", "embedding_width": 16, "width": 16, "max_positions": 32}
    out = tmp_path / "run"
    _run(
        out, teacher={"architecture": teacher}, cmlm={"architecture": tagger}, engine={"architecture": tagger},
        evaluate={"oracle_lengths": False, "rerank": False},
    )  # fmt: skip
    assert (out / "report.html").is_file()
    rows = json.loads((out / "results.json").read_text())["systems"]
    labels = ["teacher-greedy", "teacher-beam", "cmlm.i1.k5", "cmlm.i1.k1", "engine.i1.k3", "engine.i1.k1"]
    assert [row["label"] for row in rows] == labels  # more passes would change nothing
    assert all(math.isfinite(row["energy"]) for row in rows)


TAGGER = {"kind": "bilstm", "embedding_width": 16, "width": 16, "max_positions": 32}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"engine": {"architecture": TAGGER}}, r"engine\.architecture\.kind = 'bilstm', expected the CMLM's, 'trans"),
        ({"engine": {"architecture": {"width": 8}}}, r"engine\.architecture\.width = 8, expected the CMLM's, 16"),
        ({"cmlm": {"architecture": TAGGER, "from_teacher": True}}, r"cmlm\.from_teacher = True, expected false"),
        (
            {"data": {"vocabulary": {"size": 64, "joint": False}}},
            r"teacher\.architecture\.tie = 'all', expected decoder",
        ),
    ],
)
def test_networks_that_do_not_fit_are_found_before_any_is_trained(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _run(tmp_path / "run", **sections)
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()]


def test_a_text_that_is_not_there_is_named_and_costs_nothing(copied: Path, tmp_path: Path) -> None:
    """Nor does another setting that cannot be used: the stage that was finished is there when it is taken out."""
    missing = {"source": str(tmp_path / "none"), "target": str(tmp_path / "none")}
    data = {"synthetic": None, "train": missing, "valid": missing, "test": missing}
    with pytest.raises(DataError, match=r"none: cannot be read \(No such file or directory\)"):
        _run(copied, data=data)
    with pytest.raises(CheckpointError, match="holds a cmlm model, expected a teacher model"):
        _run(copied, teacher={"pretrained": {"path": str(copied / "cmlm")}})
    assert all(line.endswith("done before, inputs unchanged") for line in _run(copied))


def test_a_place_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"x: cannot be made \(File name too long\)\. Choose another --out"):
        _run(tmp_path / ("x" * 300))


def test_a_student_with_an_architecture_of_its_own_can_be_evaluated_again(tmp_path: Path) -> None:
    """From the configuration that the run has written down."""
    out = tmp_path / "run"
    engine = micro_config().engine.architecture.model_dump(exclude_unset=True) | {"dropout": 0.2}
    _run(out, engine=micro_config().engine.model_dump(exclude_unset=True) | {"architecture": engine})
    written = load_config(out / "config.yaml", ["evaluate.iterations=[1]"])
    said: list[str] = []
    assert run(written, out, say=said.append, only=("evaluate", "report")) is not None
    assert [line for line in said if "running again" in line] != []
    assert load_config(out / "config.yaml").engine.architecture.dropout == 0.2


def test_results_have_the_agreed_shape(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert {"systems", "signature", "config", "versions"} <= results.keys()
    names = {row["system"] for row in results["systems"]}
    assert names == {
        "teacher-greedy", "teacher-beam",
        "cmlm", "cmlm-rerank", "cmlm-oracle", "engine", "engine-rerank", "engine-oracle",
    }  # fmt: skip
    for row in results["systems"]:
        for key in ("bleu", "chrf", "energy", "valid", "repetition", "sentences_per_second", "latency_ms"):
            assert math.isfinite(row[key]), (row["label"], key)
        student = not row["system"].startswith("teacher")
        assert (row["iterations"] is not None) == student
        assert (row["length_beam"] is not None) == student
        if row["oracle_length"]:
            assert row["length_accuracy"] == 1.0
    engine = [row for row in results["systems"] if row["system"] == "engine" and row["iterations"] == 1]
    assert [row["length_beam"] for row in engine] == [3, 1]  # the student's own first
    assert results["references"]["energy"] > 0
    assert "nrefs:2" in results["signature"]["bleu"]
    assert "tok:none" in results["signature"]["bleu"]
    assert results["versions"]["torch"]
    assert results["config"] == yaml.safe_load((finished / "config.yaml").read_text())
    assert load_config(finished / "config.yaml") == micro_config()


def test_outputs_are_text_one_line_a_source(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    outputs = finished / "evaluate" / "outputs"
    for name in ("source", "reference-0", "reference-1", *(row["label"] for row in results["systems"])):
        assert len((outputs / f"{name}.txt").read_text().splitlines()) == 12


def test_report_is_written(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert "engine-rerank" in page
    assert "http" not in page


def test_everything_is_skipped_the_second_time(copied: Path) -> None:
    before = {path: path.stat().st_mtime_ns for stage in STAGES for path in (copied / stage).rglob("*")}
    assert _run(copied) == [f"{stage}: done before, inputs unchanged" for stage in STAGES]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_changed_student_leaves_its_teacher_alone(copied: Path) -> None:
    said = _run(copied, evaluate={"iterations": [1], "beam": 2, "oracle_lengths": False})
    assert [line for line in said if "done before" in line] == [
        f"{stage}: done before, inputs unchanged" for stage in STAGES[:5]
    ]
    assert any(line.startswith("evaluate: running again because evaluate.") for line in said)
    rows = json.loads((copied / "results.json").read_text())["systems"]
    assert {row["iterations"] for row in rows} == {None, 1}
    assert "cmlm-oracle" not in (copied / "report.html").read_text()


def test_settings_without_effect_rerun_nothing(copied: Path) -> None:
    said = _run(copied, runtime={"device": "cpu", "threads": 1})
    assert all("done before" in line for line in said)


def test_evaluate_refuses_to_train_and_keeps_the_configuration(copied: Path) -> None:
    before = (copied / "config.yaml").read_text()
    with pytest.raises(CheckpointError, match=r"stage distill is not done .* \(distill.beam was 2, is 3\)"):
        run(micro_config(distill={"beam": 3}), copied, say=print, redo=("evaluate",), only=("evaluate", "report"))
    assert (copied / "config.yaml").read_text() == before
    shutil.rmtree(copied / "engine")
    with pytest.raises(CheckpointError, match="stage engine is not done"):
        run(micro_config(), copied, say=print, redo=("evaluate",), only=("evaluate", "report"))


def test_two_runs_never_share_a_directory(copied: Path) -> None:
    import fcntl

    with (copied / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another engine-fast works here"):
            _run(copied)


def test_references_only_needs_no_distillation(tmp_path: Path) -> None:
    from engine_fast.distributed import start
    from engine_fast.recipes.stages import build_stages

    config = micro_config()
    config = config.model_copy(
        update={name: getattr(config, name).model_copy(update={"data": "references"}) for name in ("cmlm", "engine")}
    )
    stages = build_stages(config, tmp_path, world=start(config.runtime), say=print)
    assert [stage.name for stage in stages] == [name for name in STAGES if name != "distill"]
    assert all("distill" not in stage.upstream for stage in stages)


def test_demo_takes_its_seed_and_overrides() -> None:
    config = demo_config(7, ["engine.max_updates=5"])
    assert (config.seed, config.engine.max_updates) == (7, 5)
    assert config.data.synthetic is not None


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert config.engine.architecture.model_copy(update={"dropout": 0.0}) == (
        config.cmlm.architecture.model_copy(update={"dropout": 0.0})
    )


def test_kill_9_in_every_stage_changes_nothing(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    command = [sys.executable, "-m", "tests.recipes.micro", str(out)]
    for stage in STAGES:
        dead = subprocess.run([*command, stage], env=environment, check=False, capture_output=True)
        assert dead.returncode == -signal.SIGKILL, dead.stderr.decode()
        assert (out / stage / "begun.json").exists()
        assert not (out / stage / "stage.json").exists()
    last = subprocess.run(command, env=environment, check=True, capture_output=True)
    assert b"report: was interrupted, continuing" in last.stdout
    for stage in STAGES[:5]:
        ours, theirs = (json.loads((run / stage / "stage.json").read_text()) for run in (out, finished))
        assert ours["outputs"] == theirs["outputs"], stage
    for path in (finished / "evaluate" / "outputs").iterdir():
        assert (out / "evaluate" / "outputs" / path.name).read_bytes() == path.read_bytes()
    ours, theirs = (json.loads((run / "results.json").read_text()) for run in (out, finished))
    for one, other in zip(ours["systems"], theirs["systems"], strict=True):
        assert {k: v for k, v in one.items() if k not in TIMES} == {k: v for k, v in other.items() if k not in TIMES}


def _evaluated(out: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What an evaluation found, but for times, and its texts."""
    results = json.loads((out / "results.json").read_text())
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in results["systems"]]
    texts = {path.name: path.read_bytes() for path in (out / "evaluate" / "outputs").iterdir()}
    kept = {
        key: results[key] for key in ("references", "baseline", "split", "lengths", "signature", "hashes", "config")
    }
    return {**kept, "systems": rows}, texts


def test_two_launched_ranks_evaluate_as_one_does(copied: Path, tmp_path: Path) -> None:
    batches_of_a_few = ["--set", "evaluate.max_tokens=60"]
    two = Path(shutil.copytree(copied, tmp_path / "two"))
    done = torchrun(2, "engine_fast.cli.main", "evaluate", two, *batches_of_a_few)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("teacher-greedy ") == 1, "rank 0 alone speaks"
    _run(copied, evaluate={**micro_config().evaluate.model_dump(), "max_tokens": 60})
    assert _evaluated(two) == _evaluated(copied)
    assert {row["num_ranks"] for row in json.loads((two / "results.json").read_text())["systems"]} == {2}


@pytest.mark.slow
def test_launched_ranks_killed_in_an_evaluation_go_on(copied: Path, tmp_path: Path) -> None:
    shutil.rmtree(copied / "evaluate")
    two = Path(shutil.copytree(copied, tmp_path / "two"))
    for doomed, kept in (("evaluate", 3), ("evaluate-follower", 5)):
        dead = torchrun(2, "tests.recipes.micro", two, doomed)
        assert dead.returncode != 0
        assert len(list((two / "evaluate" / "systems").iterdir())) == kept
        assert not (two / "evaluate" / "stage.json").exists()
    last = torchrun(2, "tests.recipes.micro", two)
    assert last.returncode == 0, last.stderr[-3000:]
    assert last.stdout.count("(measured before)") == 5
    _run(copied)
    assert _evaluated(two) == _evaluated(copied)


@pytest.mark.slow
def test_a_rank_that_no_launcher_watches_ends_after_rank_0_was_killed(tmp_path: Path) -> None:
    """As on another host than rank 0's: nobody ends it, and the stage has no collective that could fail."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path]),
        "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.recipes.micro", str(tmp_path / "run")]
    first, second = (
        subprocess.Popen([*command, *doomed], env={**shared, "RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank, doomed in (("0", ["prepare"]), ("1", []))
    )
    try:
        first.communicate(timeout=120)
        assert first.returncode == -signal.SIGKILL
        _, stderr = second.communicate(timeout=120)
    finally:
        second.kill()
    assert second.returncode == 1
    assert "stage prepare: rank 0 is gone without a word" in stderr
