"""The fused heads under ZeRO: a sharded weight is whole where an operator reads it, in both forms of the head."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine_fast import ops

from . import engine_worker
from .test_ranks import launch


def agree(one, other):
    """Not of the weights themselves: Adam makes a step of the rounding in gradients that are 0, the keys' biases."""
    for name in ("losses", "norms"):
        assert one[name] == pytest.approx(other[name], rel=2e-5), name


@pytest.fixture(scope="module")
def plain():
    """One process, nothing sharded, the definitions in plain torch."""
    with ops.using("reference"):
        return engine_worker.main(0, "keep")


@pytest.mark.parametrize("head_memory", ["keep", "recompute"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_one_process_trains_as_the_plain_definitions_do(plain, stage, head_memory):
    with ops.using("fused"):
        agree(engine_worker.main(stage, head_memory), plain)


@pytest.mark.slow
@pytest.mark.parametrize("head_memory", ["keep", "recompute"])
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_do_too(plain, stage, head_memory):
    agree(launch(2, stage, head_memory, worker=Path(engine_worker.__file__)), plain)
