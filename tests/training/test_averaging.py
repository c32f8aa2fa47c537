"""Averages by hand."""

import torch

from engine_fast.training.averaging import ExponentialAverage, mean_of


def test_exponential_average_follows_its_recurrence():
    weights = [torch.tensor([1.0, 2.0]), torch.tensor([4.0])]
    average = ExponentialAverage(weights, 0.75)
    weights[0].copy_(torch.tensor([5.0, -2.0]))
    average.update(weights)
    torch.testing.assert_close(average.shards[0], torch.tensor([2.0, 1.0]))
    weights[1].copy_(torch.tensor([8.0]))
    average.update(weights)
    torch.testing.assert_close(average.shards[0], torch.tensor([2.75, 0.25]))
    torch.testing.assert_close(average.shards[1], torch.tensor([5.0]))


def test_exchange_is_undone_bit_by_bit():
    weights = [torch.randn(7)]
    average = ExponentialAverage([torch.randn(7)], 0.9)
    before, mean = weights[0].clone(), average.shards[0].clone()
    with average.in_place_of(weights):
        assert torch.equal(weights[0], mean)
    assert torch.equal(weights[0], before)
    assert torch.equal(average.shards[0], mean)


def test_continuing_from_weights_that_hold_the_average():
    one, other = ExponentialAverage([torch.randn(3)], 0.5), ExponentialAverage([torch.zeros(3)], 0.5)
    other.load(one.shards)
    one.shards[0].zero_()
    assert other.shards[0].count_nonzero() == 3


def test_mean_is_taken_in_double():
    sets = [{"w": torch.tensor([1e8, 1.0])}, {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([-1e8, 6.0])}]
    torch.testing.assert_close(mean_of(sets)["w"], torch.tensor([1 / 3, 3.0]))
