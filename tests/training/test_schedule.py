"""Learning rates by hand."""

import math

import pytest

from engine_fast.config import OptimConfig
from engine_fast.training.schedule import learning_rate


def config(schedule, **changes):
    return OptimConfig(**{"schedule": schedule, "lr": 1e-3, "warmup_updates": 10, "warmup_lr": 1e-4, **changes})


@pytest.mark.parametrize("schedule", ["constant", "inverse_sqrt", "linear", "cosine"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule):
    rates = [learning_rate(config(schedule), update, 111) for update in range(11)]
    assert rates[0] == 1e-4
    assert rates[5] == pytest.approx(5.5e-4)
    assert rates[10] == pytest.approx(1e-3)


def test_inverse_sqrt_halves_when_updates_quadruple():
    assert learning_rate(config("inverse_sqrt"), 40, 1000) == pytest.approx(5e-4)
    assert learning_rate(config("inverse_sqrt", min_lr=7e-4), 40, 1000) == 7e-4


def test_inverse_sqrt_without_warm_up_starts_at_the_peak():
    rates = [learning_rate(config("inverse_sqrt", warmup_updates=0), update, 100) for update in (0, 1, 4)]
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4])


def test_constant_stays():
    assert learning_rate(config("constant"), 9999, 100) == 1e-3


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 5.5e-4), ("cosine", 5.5e-4)])
def test_decays_pass_the_middle_and_end_at_min_lr(schedule, middle):
    settings = config(schedule, min_lr=1e-4)
    assert learning_rate(settings, 60, 111) == pytest.approx(middle)
    assert learning_rate(settings, 110, 111) == pytest.approx(1e-4)
    assert learning_rate(settings, 500, 111) == pytest.approx(1e-4)


def test_cosine_is_a_cosine():
    quarter = 1e-3 * (1 + math.cos(math.pi / 4)) / 2
    assert learning_rate(config("cosine"), 35, 111) == pytest.approx(quarter)


def test_a_schedule_of_one_update_divides_by_nothing():
    assert learning_rate(config("cosine", warmup_updates=0), 0, 1) == 1e-3
