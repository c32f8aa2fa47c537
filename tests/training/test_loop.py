"""Whole stages on a tiny corpus: what they leave, how they continue, and how they fail."""

import errno
import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file

from engine_fast.data.prepare import Prepared, prepare
from engine_fast.distributed import sealing
from engine_fast.distributed.engine import Engine
from engine_fast.errors import CheckpointError, ConfigError, DivergenceError, VocabularyError
from engine_fast.models import load_model
from engine_fast.training import Interrupted, loop, train_cmlm, train_engine
from engine_fast.training import checkpoints as checkpoints_module

from .conftest import checkpoints, failing_after, lines_of, make_config, stop_at, weights_of


def test_a_stage_leaves_what_the_contract_says(plain_teacher):
    assert sorted(path.name for path in plain_teacher.iterdir()) == [
        "checkpoints", "config.yaml", "metrics.jsonl", "model", "run.json", "vocabulary",
    ]  # fmt: skip
    train = lines_of(plain_teacher, "train")
    assert [line["update"] for line in train] == [3, 6, 9, 12]
    assert train[0].keys() == {"kind", "update", "epoch", "loss", "nll", "lr", "grad_norm"}
    assert train[-1]["loss"] < train[0]["loss"]
    valid = lines_of(plain_teacher, "valid")
    assert [line["update"] for line in valid] == [4, 8, 12]
    assert valid[0].keys() >= {"loss", "nll", "bleu"}
    loaded = load_model(plain_teacher / "model", kind="transformer")
    assert loaded.card["best_update"] == 12
    assert loaded.card["loss"] == valid[-1]["loss"]
    record = json.loads((plain_teacher / "run.json").read_text())
    assert record["finished"]
    assert record["seed"] == 3
    assert record["versions"].keys() >= {"torch", "deepspeed"}
    assert record["inputs"]["source vocabulary"] == loaded.source_vocabulary.fingerprint


def test_a_finished_stage_is_left_alone(teach, monkeypatch):
    directory = teach()
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    monkeypatch.setattr(loop.Trainer, "train", None)
    teach()
    assert before == {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


def test_a_finished_stage_can_be_made_longer_but_not_another(teach, plain_teacher):
    directory = teach(teacher__max_updates=8)
    with pytest.raises(CheckpointError, match=r"finished with other settings \(teacher.optim.lr: 0.001 -> 0.01\)"):
        teach(teacher__optim__lr=1e-2)
    teach()
    assert weights_of(directory) == weights_of(plain_teacher)


HALF = {"teacher__precision": "bf16", "teacher__ema_decay": 0.5, "teacher__batch__accumulate": 2}


@pytest.mark.parametrize(
    ("update", "settings"),
    [
        (4, {}),
        (5, {}),
        (5, {"teacher__zero_stage": 1, "teacher__ema_decay": 0.5}),
        pytest.param(4, HALF, marks=pytest.mark.slow),
        pytest.param(5, HALF, marks=pytest.mark.slow),
        pytest.param(5, {"teacher__zero_stage": 3, "teacher__ema_decay": 0.5}, marks=pytest.mark.slow),
    ],
)
def test_interrupted_and_continued_equals_uninterrupted(teach, monkeypatch, update, settings):
    whole = teach("whole", **settings)
    with monkeypatch.context() as patch:
        stop_at(patch, update)
        with pytest.raises(Interrupted, match=f"stopped by SIGTERM after update {update}"):
            teach("parts", **settings)
    parts = teach("parts", **settings)
    assert weights_of(parts) == weights_of(whole)
    for kind in ("train", "valid"):
        assert lines_of(parts, kind) == lines_of(whole, kind)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_trains_the_same_model(teach, plain_teacher, stage):
    losses = [line["loss"] for line in lines_of(teach("zero", teacher__zero_stage=stage), "train")]
    assert losses == pytest.approx([line["loss"] for line in lines_of(plain_teacher, "train")], rel=1e-6)


def test_bf16_follows_fp32(teach, plain_teacher):
    losses = [line["loss"] for line in lines_of(teach("half", teacher__precision="bf16"), "train")]
    assert losses == pytest.approx([line["loss"] for line in lines_of(plain_teacher, "train")], rel=5e-3)


def test_accumulation_equals_one_large_batch(teach, monkeypatch):
    """Two halves of unequal numbers of tokens, against the same sentences at once: the divisor is the global count."""
    changes = {"teacher__architecture__dropout": 0.0, "teacher__valid_bleu_sentences": 0}
    halves = teach("halves", teacher__batch__accumulate=2, **changes)
    real = loop.Feeder.take

    def joined(self):
        feed = real(self)
        chosen = torch.cat([batch.indices for batch, weight in feed.batches if weight]).numpy()
        return type(feed)(
            feed.epoch,
            feed.next_epoch,
            feed.next_consumed,
            ((self._corpus.collate(chosen), 1.0),),
            feed.num_target_tokens,
            feed.digest,
        )

    monkeypatch.setattr(loop.Feeder, "take", joined)
    whole = teach("whole", teacher__batch__accumulate=2, teacher__keep_last=1, **changes)
    for name in ("loss", "grad_norm"):
        figures = [[line[name] for line in lines_of(directory, "train")] for directory in (halves, whole)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-5)


def test_activation_checkpointing_changes_nothing(teach, plain_teacher):
    again = teach("again", teacher__activation_checkpointing=True)
    assert [line["loss"] for line in lines_of(again, "train")] == pytest.approx(
        [line["loss"] for line in lines_of(plain_teacher, "train")], rel=1e-6
    )


def test_max_epochs_ends_training(teach):
    directory = teach(teacher__max_epochs=1)
    updates = json.loads((directory / "run.json").read_text())["updates"]
    assert 1 < updates < 12
    assert lines_of(directory, "valid")[-1]["update"] == updates


# ---------------------------------------------------------------- failures


def poison(monkeypatch, update):
    """From that update on a weight's gradient is NaN, as after an overflow."""
    real, count = Engine.backward, 0

    def backward(self, batch, **kwargs):
        nonlocal count
        count += 1
        weight = float("nan") if count == update else kwargs.pop("weight", 1.0)
        return real(self, batch, **{**kwargs, "weight": weight})

    monkeypatch.setattr(Engine, "backward", backward)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"teacher__zero_stage": 1},
        pytest.param({"teacher__zero_stage": 3}, marks=pytest.mark.slow),
        pytest.param({"teacher__precision": "bf16"}, marks=pytest.mark.slow),
    ],
)
def test_a_gradient_that_is_not_finite_stops_before_it_is_applied(teach, monkeypatch, settings):
    whole = teach("whole", **settings)
    with monkeypatch.context() as patch:
        poison(patch, 7)
        with pytest.raises(
            DivergenceError, match=r"teacher: .* at update 7; .*update-00000004.* Lower teacher.optim.lr"
        ):
            teach("parts", **settings)
    assert weights_of(teach("parts", **settings)) == weights_of(whole)


def test_weights_stay_as_they_were_when_a_gradient_is_not_finite(teach, monkeypatch):
    seen = []

    def step(self, lr, real=Engine.step):
        before = {name: weight.clone() for name, weight in self.weights().items()}
        result = real(self, lr)
        if not result.applied:
            seen.append(all(torch.equal(before[name], weight) for name, weight in self.weights().items()))
        return result

    monkeypatch.setattr(Engine, "step", step)
    for number, settings in enumerate(({}, {"teacher__zero_stage": 2}, {"teacher__precision": "bf16"})):
        with monkeypatch.context() as patch:
            poison(patch, 2)
            with pytest.raises(DivergenceError):
                teach(f"run{number}", **settings)
    assert seen == [True, True, True]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_a_damaged_checkpoint_falls_back_and_says_so(teach, monkeypatch, plain_teacher, capfd, damage):
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        with pytest.raises(Interrupted):
            teach()
    newest = teach._root / "teacher" / "checkpoints" / "update-00000009"
    victim = newest / "deepspeed" / "mp_rank_00_model_states.pt"
    content = victim.read_bytes()
    if damage == "truncate":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        victim.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    elif damage == "remove":
        victim.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    capfd.readouterr()
    directory = teach()
    said = capfd.readouterr().err
    assert "update-00000009" in said
    assert "falling back to checkpoint" in said
    assert "continuing after update 8" in said
    assert weights_of(directory) == weights_of(plain_teacher)
    assert lines_of(directory, "train") == lines_of(plain_teacher, "train")


def test_no_whole_checkpoint_is_an_error_not_a_fresh_start(teach, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Interrupted):
            teach()
    (teach._root / "teacher" / "checkpoints" / "update-00000002" / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        teach()


def test_a_full_disk_keeps_the_last_checkpoint_and_leaves_nothing_half(teach, monkeypatch, plain_teacher):
    full = OSError(errno.ENOSPC, "No space left on device")
    # Calls: checkpoint 4, best 4, checkpoint 8.
    with failing_after(monkeypatch, checkpoints_module, "save_file", 2, full), pytest.raises(CheckpointError) as caught:
        teach()
    assert "No space left on device" in str(caught.value)
    assert "last good checkpoint is update-00000004" in str(caught.value)
    directory = teach._root / "teacher"
    assert checkpoints(directory) == ["best-00000004", "latest", "update-00000004"]
    assert weights_of(teach()) == weights_of(plain_teacher)


@pytest.mark.parametrize(("calls", "kept"), [(1, 4), (2, 4), (5, 12)])
def test_a_disk_that_fails_in_the_background_is_told_at_the_next_save_or_the_end(
    teach, monkeypatch, plain_teacher, calls, kept
):
    """Calls: checkpoint 4, best 4, checkpoint 8, best 8, checkpoint 12, best 12."""
    failing = OSError(errno.EIO, "Input/output error")
    with failing_after(monkeypatch, sealing, "sync_and_sum", calls, failing), pytest.raises(CheckpointError) as caught:
        teach()
    assert "Input/output error" in str(caught.value)
    assert f"last good checkpoint is update-{kept:08d}" in str(caught.value)
    assert not [name for name in checkpoints(teach._root / "teacher") if name.startswith(".")]
    assert weights_of(teach()) == weights_of(plain_teacher)


def test_a_run_that_diverges_names_the_checkpoint_that_was_being_sealed(teach, monkeypatch):
    real = sealing.sync_and_sum

    def slow(directory, names):
        time.sleep(0.3)
        return real(directory, names)

    monkeypatch.setattr(sealing, "sync_and_sum", slow)
    poison(monkeypatch, 6)
    with pytest.raises(DivergenceError, match=r"last good checkpoint is .*update-00000004"):
        teach(teacher__validate_every=100)


def test_a_checkpoint_that_would_fill_the_disk_is_refused(teach, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(CheckpointError, match=r"needs about .* MB .*runtime.min_free_bytes.* but 1 MB are"):
        teach(runtime__min_free_bytes=10**6)
    assert checkpoints(teach._root / "teacher") == []


def test_a_directory_that_cannot_be_written_to_is_named(teach, monkeypatch, tmp_path):
    (tmp_path / "teacher").write_text("a file")
    with pytest.raises(CheckpointError, match=r"teacher.* cannot be written to .* Choose another"):
        teach()
    read_only = OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr("engine_fast.training.run_directory.write_atomic", lambda *_: (_ for _ in ()).throw(read_only))
    with pytest.raises(CheckpointError, match=r"Read-only file system.* Choose another"):
        teach("elsewhere")


def test_checkpoints_of_another_seed_or_average_are_refused(teach, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Interrupted):
            teach()
    with pytest.raises(CheckpointError, match="seed was 3; now it is 4"):
        teach(seed=4)
    with pytest.raises(CheckpointError, match="written with ema = False, this run has True"):
        teach(teacher__ema_decay=0.5)


def test_a_run_that_diverged_may_go_on_with_another_rate(teach, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        poison(patch, 7)
        with pytest.raises(DivergenceError):
            teach()
    teach(teacher__optim__lr=5e-4)
    assert "teacher.optim.lr: 0.001 -> 0.0005" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher__precision": "fp16"}, "precision = 'fp16', expected bf16 or fp32 on a CPU"),
        ({"teacher__early_stop__metric": "energy"}, "teacher.early_stop.metric = 'energy', expected loss or bleu"),
        (
            {"teacher__early_stop__metric": "bleu", "teacher__valid_bleu_sentences": 0},
            "expected another metric when valid_bleu_sentences = 0",
        ),
        ({"deepspeed": {"zero_optimisation": {}}}, "Did you mean 'zero_optimization'"),
        ({"deepspeed": {"gradient_clipping": 1}}, "Set, in the stage's own section, optim.clip_norm"),
    ],
)
def test_settings_that_cannot_be_met_are_named(teach, settings, message):
    with pytest.raises(ConfigError, match=message):
        teach(**settings)


# ---------------------------------------------------------------- the other stages


def test_cmlm_and_engine_train_on_what_came_before(prepared, plain_teacher, tmp_path):
    corpus, valid = prepared.split("train"), prepared.split("valid")
    config = make_config(
        cmlm__from_teacher=True,
        engine__early_stop={"metric": "energy"},
        engine__architecture={**make_config().teacher.architecture.model_dump(), "dropout": 0.0},
    )
    train_cmlm(config, prepared, corpus, tmp_path / "cmlm", valid_corpus=valid, teacher_dir=plain_teacher)
    assert lines_of(tmp_path / "cmlm", "train")[0].keys() >= {"loss", "nll", "length_loss", "length_accuracy"}

    before = weights_of(plain_teacher)
    train_engine(
        config, prepared, corpus, tmp_path / "engine", valid_corpus=valid,
        teacher_dir=plain_teacher, cmlm_dir=tmp_path / "cmlm" / "model",
    )  # fmt: skip
    assert weights_of(plain_teacher) == before
    assert lines_of(tmp_path / "engine", "train")[0]["energy"] > 0
    valid_lines = lines_of(tmp_path / "engine", "valid")
    assert [line["update"] for line in valid_lines] == [0, 4, 8, 12]
    first = valid_lines[0]
    assert first["gap"] == pytest.approx(first["energy"] - first["relaxed_energy"])
    assert valid_lines[-1]["relaxed_energy"] < first["relaxed_energy"]
    student = load_model(tmp_path / "engine" / "model", kind="cmlm")
    assert student.model.architecture.dropout == 0.0
    best = min(valid_lines, key=lambda line: line["energy"])
    assert student.card["energy"] == best["energy"]


def test_from_teacher_copies_what_fits(prepared, plain_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Trainer, "train", lambda self: self._engine.weights)
    monkeypatch.setattr("engine_fast.training.job.RunDirectory.finish", lambda *_, **__: None)
    corpus, valid = prepared.split("train"), prepared.split("valid")
    for name, copied in (("copied", True), ("fresh", False)):
        config = make_config(cmlm__from_teacher=copied)
        train_cmlm(config, prepared, corpus, tmp_path / name, valid_corpus=valid, teacher_dir=plain_teacher)
    teacher = load_file(plain_teacher / "model" / "model.safetensors")
    students = {name: load_file(tmp_path / name / "model" / "model.safetensors") for name in ("copied", "fresh")}
    shared = [name for name in teacher if name in students["copied"]]
    assert shared
    assert all(torch.equal(teacher[name], students["copied"][name]) for name in shared)
    assert not all(torch.equal(teacher[name], students["fresh"][name]) for name in shared)


def test_the_student_must_have_the_cmlms_architecture(prepared, plain_teacher, tmp_path):
    corpus, valid = prepared.split("train"), prepared.split("valid")
    train_cmlm(make_config(cmlm__max_updates=1), prepared, corpus, tmp_path / "cmlm", valid_corpus=valid)
    other = {**make_config().engine.architecture.model_dump(), "ffn_width": 64}
    with pytest.raises(ConfigError, match=r"engine.architecture.ffn_width = 64, expected the CMLM's, 32"):
        train_engine(
            make_config(engine__architecture=other), prepared, corpus, tmp_path / "engine", valid_corpus=valid,
            teacher_dir=plain_teacher, cmlm_dir=tmp_path / "cmlm",
        )  # fmt: skip


def test_another_vocabulary_is_refused(prepared, plain_teacher, tmp_path):
    data = {**make_config().data.model_dump(exclude_none=True), "vocabulary": {"size": 90}}
    config = make_config(data=data, cmlm__from_teacher=True)
    prepare(config.data, tmp_path / "data", seed=3)
    other = Prepared.open(tmp_path / "data")
    with pytest.raises(VocabularyError, match="Use the data and the models of one run"):
        train_cmlm(
            config, prepared, other.split("train"), tmp_path / "x",
            valid_corpus=prepared.split("valid"), teacher_dir=plain_teacher,
        )  # fmt: skip
    with pytest.raises(VocabularyError, match=r"its source vocabulary is .* the corpus was prepared with"):
        train_cmlm(
            config, other, other.split("train"), tmp_path / "y",
            valid_corpus=other.split("valid"), teacher_dir=plain_teacher,
        )  # fmt: skip
