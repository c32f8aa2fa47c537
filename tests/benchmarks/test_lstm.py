"""The LSTM benchmark's two ways compute one energy and gradient."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_lstm, bench_step, harness
from engine_fast.config import LSTMArchitecture

SMALL = LSTMArchitecture(embedding_width=12, encoder_width=10, decoder_width=14, dropout=0.0)
SIZE = bench_step.Size(vocabulary=60, tokens=64, lengths=(5, 9))


@pytest.mark.parametrize("ours", [name for name in bench_lstm.PROVIDERS if name.startswith("ours")])
def test_the_direct_computation_is_ours(ours):
    relative = 2e-2 if "bf16" in ours else 1e-4
    for batch in bench_step.make_batches(SIZE):
        one, other = (
            bench_lstm.make_step(name, SMALL, SIZE.vocabulary, batch, "cpu")
            for name in (ours, ours.replace("ours", "direct"))
        )
        assert torch.equal(one.z_MV, other.z_MV)
        assert other.run().item() == pytest.approx(one.run().item(), rel=relative)
        gradient, expected = one.z_MV.grad.float(), other.z_MV.grad.float()
        assert expected.abs().sum() > 0
        assert (gradient - expected).norm() <= 3 * relative * expected.norm()


def test_every_limit_is_a_figure_that_is_reported():
    rows = {name: {"seconds_per_step": 2.0} for name in bench_lstm.PROVIDERS}
    figures = bench_lstm.ratios(rows)
    assert figures == {"fp32_time": 1.0, "bf16_time": 1.0, "feeding_fp32_time": 1.0}
    assert harness.floors("lstm").keys() <= figures.keys()
