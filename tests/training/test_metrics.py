"""What is written, what is dropped, and what the averages divide by."""

import json

import torch

from engine_fast.distributed import World
from engine_fast.training.metrics import MetricsLog, Sums, read_metrics, shared_out

WORLD = World(0, 1, torch.device("cpu"))


def stats(**values):
    return {name: torch.tensor(float(value)) for name, value in values.items()}


def test_averages_divide_each_sum_by_its_own_count():
    sums = Sums(WORLD.device)
    sums.add(stats(loss=30, nll=8, tokens=10, sentences=2, energy=6, length_loss=4, length_correct=1, masked_tokens=4))
    sums.add(
        stats(
            loss=10, nll=8, tokens=10, sentences=2, energy=2, length_loss=0, length_correct=2, masked_tokens=4,
            repetition=8,
        )
    )  # fmt: skip
    assert sums.averages(WORLD) == {
        "tokens": 20, "sentences": 4, "loss": 2, "nll": 2, "energy": 2, "length_loss": 1, "length_accuracy": 0.75,
        "repetition": 2,
    }  # fmt: skip


def test_sums_of_other_ranks_are_kept_whole():
    states = [{"loss": 3.0, "tokens": 2.0}, {"loss": 5.0, "tokens": 1.0, "nll": 4.0}]
    assert shared_out(states, 2) is states
    for size in (1, 3):
        parts = shared_out(states, size)
        assert parts == [{"loss": 8.0, "tokens": 3.0, "nll": 4.0}, *({} for _ in range(size - 1))]
    sums = Sums(WORLD.device)
    sums.load(shared_out(states, 1)[0])
    assert sums.averages(WORLD)["loss"] == 8.0 / 3.0


def test_only_what_was_seen_is_reported_and_state_is_exact():
    sums, other = Sums(WORLD.device), Sums(WORLD.device)
    sums.add(stats(loss=1 / 3, nll=0.1, tokens=3, sentences=1))
    other.load(json.loads(json.dumps(sums.state())))
    assert other.averages(WORLD) == sums.averages(WORLD)
    assert "energy" not in other.averages(WORLD)


def write(directory, updates, **start):
    log = MetricsLog(directory, tensorboard=False, **{"update": -1, "validated": -1, **start})
    for update in updates:
        log.write("train", update, {"loss": 1.0})
        if update % 10 == 0:
            log.write("valid", update, {"loss": 2.0})
    log.close()


def updates(directory, kind):
    return [line["update"] for line in read_metrics(directory / "metrics.jsonl") if line["kind"] == kind]


def test_resuming_drops_the_lost_continuation(tmp_path):
    write(tmp_path, [5, 10, 15, 20, 25])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "upd')  # cut off by a kill
    write(tmp_path, [20, 25], update=15, validated=10)
    assert updates(tmp_path, "train") == [5, 10, 15, 20, 25]
    assert updates(tmp_path, "valid") == [10, 20]


def test_a_validation_that_will_be_repeated_is_dropped(tmp_path):
    write(tmp_path, [10, 20])
    write(tmp_path, [], update=20, validated=10)
    assert updates(tmp_path, "train") == [10, 20]
    assert updates(tmp_path, "valid") == [10]


def test_a_fresh_start_leaves_nothing_old(tmp_path):
    write(tmp_path, [5])
    write(tmp_path, [])
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_infinite_values_do_not_make_invalid_json(tmp_path):
    log = MetricsLog(tmp_path, update=-1, validated=-1, tensorboard=False)
    log.write("train", 1, {"loss": 1.0, "grad_norm": float("inf")})
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"kind": "train", "update": 1, "loss": 1.0}]


def test_tensorboard_gets_the_same_scalars(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator

    log = MetricsLog(tmp_path, update=-1, validated=-1, tensorboard=True)
    log.write("train", 3, {"loss": 0.5})
    log.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 0.5)]
