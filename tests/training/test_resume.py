"""Going on with other ranks, at another ZeRO stage, in another precision: the same state, the same order of data."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine_fast.config import dump_config
from engine_fast.distributed.engine import Engine
from engine_fast.errors import CheckpointError, ConfigError
from engine_fast.training import Interrupted, train_cmlm, train_engine, train_teacher

from . import resume_worker
from .conftest import lines_of, make_config, stop_at, weights_of

WORKER = Path(resume_worker.__file__)
PLAIN = {
    "teacher__max_updates": 9,
    "teacher__valid_bleu_sentences": 0,
    "teacher__batch": {"max_tokens": 100, "micro_batches": 4},
}


class Parts:
    """One stage in one directory, a few updates at a time."""

    def __init__(self, root, data_dir):
        self.directory, self._root, self._data = root / "teacher", root, data_dir

    def alone(self, stop, **settings):
        return resume_worker.main(make_config(**{**PLAIN, **settings}), self._data, self.directory, stop)

    def ranks(self, ranks, stop, environment=None, **settings):
        path = self._root / "config.yaml"
        path.write_text(dump_config(make_config(**{**PLAIN, **settings})))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(WORKER)]
        command += [str(path), str(self._data), str(self.directory), str(stop)]
        environment = {**os.environ, **(environment or {})}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
        assert done.returncode == 0, done.stderr[:3000]
        line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
        return json.loads(line.removeprefix("RESULT "))


@pytest.fixture
def parts(tmp_path, data_dir):
    return Parts(tmp_path, data_dir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir):
    """The same stage on one rank, uninterrupted."""
    parts = Parts(tmp_path_factory.mktemp("whole"), data_dir)
    return parts.alone(99), parts.directory


def agree(parts, seen, whole, kinds=("train", "valid")):
    """Every update got the sentences it would have got, and the losses are those of one rank within rounding."""
    assert [update for part in seen for update in part["sentences"]] == whole[0]["sentences"]
    assert {epoch for epoch, _ in whole[0]["sentences"]} == {0, 1}
    for kind in kinds:
        one, other = lines_of(parts.directory, kind), lines_of(whole[1], kind)
        assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in other], rel=1e-5)
        assert [line["update"] for line in one] == [line["update"] for line in other]


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))])
def test_two_ranks_then_one_then_two(parts, whole, stage):
    settings = {"teacher__zero_stage": stage, "teacher__ema_decay": 0.5}
    seen = [parts.ranks(2, 2, **settings), parts.alone(5, **settings), parts.ranks(2, 99, **settings)]
    assert seen[0]["saved"] == seen[1]["loaded"]
    assert seen[1]["saved"] == seen[2]["loaded"]
    assert seen[0]["loaded"] is None
    assert seen[0]["saved"]["step"] == "2.0"
    assert seen[1]["saved"] != seen[1]["loaded"]
    agree(parts, seen, whole, kinds=("train",))


@pytest.mark.parametrize(("before", "after"), [(a, b) for a in range(4) for b in range(4) if a != b])
def test_another_stage(parts, whole, before, after):
    seen = [parts.alone(4, teacher__zero_stage=before), parts.alone(99, teacher__zero_stage=after)]
    assert seen[0]["saved"] == seen[1]["loaded"]
    agree(parts, seen, whole)


@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_another_precision(parts, before, after):
    """The float32 master weights are kept; what bf16 rounds for the forward pass is made anew."""
    seen = [
        parts.alone(4, teacher__precision=before, teacher__ema_decay=0.5),
        parts.alone(99, teacher__precision=after, teacher__ema_decay=0.5, teacher__zero_stage=3),
    ]
    assert seen[0]["saved"] == seen[1]["loaded"]


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, True), (1, False)), ((2, True), (1, False)), ((3, False), (3, True)), ((3, True), (0, False))],
)
def test_with_and_without_offload(parts, before, after):
    settings = [
        {"teacher__zero_stage": stage, "teacher__offload": {"optimizer": offload, "parameters": offload and stage == 3}}
        for stage, offload in (before, after)
    ]
    seen = [parts.alone(4, **settings[0]), parts.alone(99, **settings[1])]
    assert seen[0]["saved"] == seen[1]["loaded"]


def test_a_state_before_the_first_update_has_moments_too(parts):
    seen = [parts.alone(0, teacher__zero_stage=2), parts.alone(99, teacher__zero_stage=3)]
    assert seen[0]["saved"] == seen[1]["loaded"]
    assert seen[1]["loaded"]["step"] == "0.0"


def test_the_conversion_never_changes_the_checkpoint_and_leaves_nothing(parts):
    parts.alone(4, teacher__zero_stage=1)
    checkpoints = parts.directory / "checkpoints"

    def content():
        return {path: path.read_bytes() for path in (checkpoints / "update-00000004").rglob("*") if path.is_file()}

    before = content()
    parts.alone(5, teacher__zero_stage=2, teacher__keep_last=3)
    assert content() == before
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "best-00000004", "latest", "update-00000004", "update-00000005",
    ]  # fmt: skip


def test_a_conversion_that_fails_names_what_can_be_done(parts, monkeypatch):
    parts.alone(4, teacher__zero_stage=1)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine_fast.distributed.universal.convert", fail)
    with pytest.raises(CheckpointError, match=r"could not be converted .*No space left.* Continue with those that"):
        parts.alone(99, teacher__zero_stage=2)
    assert not list((parts.directory / "checkpoints").glob(".*"))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_settings_of_the_optimizer_are_the_runs_own_and_not_the_checkpoints(parts, monkeypatch, stage):
    parts.alone(4, teacher__zero_stage=stage)
    loaded = []
    real = Engine.load

    def load(self, directory):
        real(self, directory)
        loaded.append(self._engine.optimizer)

    monkeypatch.setattr(Engine, "load", load)
    optim = {**make_config().teacher.optim.model_dump(), "weight_decay": 0.25, "betas": (0.5, 0.75), "clip_norm": 0.125}
    parts.alone(99, teacher__zero_stage=stage, teacher__optim=optim)
    group = loaded[0].param_groups[0]
    assert (group["weight_decay"], tuple(group["betas"])) == (0.25, (0.5, 0.75))
    if stage:
        assert loaded[0].clip_grad == 0.125


def test_micro_batches_and_accumulate_exclude_each_other():
    with pytest.raises(ConfigError, match=r"micro_batches = 4 already says .*leave accumulate at 1, got 2"):
        make_config(teacher__batch={"max_tokens": 100, "micro_batches": 4, "accumulate": 2})


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_disk_is_full_stops_both(parts, rank):
    """DeepSpeed's save has barriers, in which the other rank would wait for good."""
    parts.ranks(2, 2, teacher__zero_stage=1)
    seen = parts.ranks(2, 4, environment={"FULL_DISK_ON_RANK": str(rank)}, teacher__zero_stage=1)
    assert "update-00000004 could not be written ([Errno 28] No space left on device)" in seen["error"]
    assert "last good checkpoint is update-00000002" in seen["error"]
    assert not list((parts.directory / "checkpoints").glob(".*"))


# ---------------------------------------------------------------- no state of a generator, no teacher


@pytest.fixture
def student(prepared, plain_teacher, cmlm):
    """Train an ENGINE student whose every part draws: dropout on both sides, masks, Gumbel noise."""

    def train(directory, teacher=plain_teacher, **settings):
        noise = {"engine__o1": "GX", "engine__o2": "SG", "engine__teacher_dropout": True, "engine__max_updates": 8}
        train_engine(
            make_config(**{**noise, **settings}), prepared, prepared.split("train"), directory,
            valid_corpus=prepared.split("valid"), teacher_dir=teacher, cmlm_dir=cmlm,
        )  # fmt: skip
        return directory

    return train


def test_noise_and_dropout_go_on_as_if_nothing_had_been(student, tmp_path, monkeypatch):
    whole = student(tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Interrupted):
            student(tmp_path / "parts")
    torch.manual_seed(99)  # a new process has another state
    parts = student(tmp_path / "parts")
    assert weights_of(parts) == weights_of(whole)
    assert lines_of(parts, "train") == lines_of(whole, "train")


def test_masks_go_on_as_if_nothing_had_been(prepared, tmp_path, monkeypatch):
    def train(name):
        corpus, valid = prepared.split("train"), prepared.split("valid")
        train_cmlm(make_config(cmlm__max_updates=8), prepared, corpus, tmp_path / name, valid_corpus=valid)
        return tmp_path / name

    whole = train("whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Interrupted):
            train("parts")
    torch.manual_seed(99)
    assert weights_of(train("parts")) == weights_of(whole)


@pytest.mark.parametrize("stage", [0, 3])
def test_no_file_of_a_checkpoint_holds_the_teacher(student, plain_teacher, tmp_path, monkeypatch, stage):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Interrupted):
            student(tmp_path / "engine", engine__zero_stage=stage)
    snapshot = tmp_path / "engine" / "checkpoints" / "update-00000002"
    files = {path: path.read_bytes() for path in snapshot.rglob("*") if path.is_file()}
    frozen = load_file(plain_teacher / "model" / "model.safetensors")
    own = load_file(snapshot / "weights.safetensors")
    assert len(files) >= 4
    assert any(own[name].numpy().tobytes() in content for name in own for content in files.values())
    for name, tensor in frozen.items():
        if tensor.unique().numel() > 2:  # not an untrained bias or gain, which any model has
            assert not [path for path, content in files.items() if tensor.numpy().tobytes()[:256] in content], name
    assert not [path for path, content in files.items() if b"teacher." in content]
    state = json.loads(files[snapshot / "state.json"])
    assert state["teacher"] == json.loads((tmp_path / "engine" / "run.json").read_text())["inputs"]["teacher model"]


def test_a_checkpoint_of_another_teacher_is_refused(student, prepared, plain_teacher, tmp_path, monkeypatch):
    train_teacher(make_config(teacher__max_updates=2), prepared, tmp_path / "other")
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        for name, teacher in (("one", plain_teacher), ("two", tmp_path / "other")):
            with pytest.raises(Interrupted):
                student(tmp_path / name, teacher=teacher)
    shutil.rmtree(tmp_path / "two" / "checkpoints")
    shutil.copytree(tmp_path / "one" / "checkpoints", tmp_path / "two" / "checkpoints")
    hashes = [
        json.loads((tmp_path / name / "run.json").read_text())["inputs"]["teacher model"][:12]
        for name in ("one", "two")
    ]
    with pytest.raises(CheckpointError, match=f"written with teacher = {hashes[0]}, this run has {hashes[1]}"):
        student(tmp_path / "two", teacher=tmp_path / "other")
