"""Which weights a stage keeps and exports: the best, the mean of the last, or the moving average."""

import json

import pytest
import torch
from safetensors.torch import load_file

from engine_fast.models import load_model
from engine_fast.training import Interrupted, loop
from engine_fast.training.averaging import mean_of

from .conftest import checkpoints, lines_of, stop_at, weights_of


def test_checkpoints_keep_the_last_and_the_best(plain_teacher):
    assert [name for name in checkpoints(plain_teacher) if name.startswith("update")] == [
        "update-00000008", "update-00000012",
    ]  # fmt: skip
    assert (plain_teacher / "checkpoints" / "latest").read_text() == "update-00000012\n"
    best = load_file(plain_teacher / "checkpoints" / "best-00000012" / "weights.safetensors")
    exported = load_file(plain_teacher / "model" / "model.safetensors")
    assert best.keys() == exported.keys()
    assert all(torch.equal(best[name], exported[name]) for name in best)


def test_early_stopping_counts_validations_without_improvement(teach):
    directory = teach(teacher__optim__lr=1e-12, teacher__early_stop__metric="bleu", teacher__early_stop__patience=1)
    record = json.loads((directory / "run.json").read_text())
    assert (record["updates"], record["best_update"]) == (8, 4)
    assert "best-00000004" in checkpoints(directory)


def test_averages_of_the_last_checkpoints_are_exported(teach):
    directory = teach(teacher__average_last=2)
    parts = [
        load_file(directory / "checkpoints" / f"update-{update:08d}" / "weights.safetensors") for update in (8, 12)
    ]
    exported = load_file(directory / "model" / "model.safetensors")
    expected = mean_of(parts)
    assert all(torch.equal(expected[name], exported[name]) for name in exported)


def test_the_exponential_average_is_what_is_validated_and_exported(teach, plain_teacher):
    """decay 0.5 over raw weights that are those of the run without an average."""
    snapshots = []
    real = loop.ExponentialAverage.update

    def recording(self, shards):
        real(self, shards)
        snapshots.append([shard.clone() for shard in shards])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.ExponentialAverage, "update", recording)
        directory = teach(teacher__ema_decay=0.5)
    assert [line["loss"] for line in lines_of(directory, "train")] == [
        line["loss"] for line in lines_of(plain_teacher, "train")
    ]
    assert lines_of(directory, "valid")[0]["loss"] > lines_of(plain_teacher, "valid")[0]["loss"]
    last = sum(0.5 ** (k + 1) * snapshots[-1 - k][0].double() for k in range(11))
    exported = next(
        tensor for tensor in load_file(directory / "model" / "model.safetensors").values()
        if tensor.shape == snapshots[-1][0].shape
    )  # fmt: skip
    assert (exported - last).abs().max() < 0.5**11


def test_a_snapshot_of_an_interruption_is_no_part_of_the_average(teach, monkeypatch):
    whole = teach("whole", teacher__average_last=2)
    with monkeypatch.context() as patch:
        stop_at(patch, 10)
        with pytest.raises(Interrupted):
            teach("cut", teacher__average_last=2)
    cut = teach("cut", teacher__average_last=2)
    assert weights_of(cut) == weights_of(whole)
    assert checkpoints(cut) == checkpoints(whole)


def test_the_best_by_one_figure_is_not_the_best_by_another(teach, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(Interrupted):
            teach()
    directory = teach(teacher__early_stop__metric="bleu")
    assert "the best by loss was update 4; by bleu it is chosen anew" in capfd.readouterr().err
    later = [line for line in lines_of(directory, "valid") if line["update"] > 4]
    card = load_model(directory / "model", kind="transformer").card
    assert card["bleu"] == max(line["bleu"] for line in later)
    assert card["best_update"] in [line["update"] for line in later]
