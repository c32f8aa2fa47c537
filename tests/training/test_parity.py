"""The gate that keeps a fused path from changing the objective."""

import pytest
import torch

from engine_fast import ops
from engine_fast.operators import OPERATORS
from engine_fast.ops import linear
from engine_fast.training.parity import check_parity

PAIRS = [(o1, o2) for o1 in OPERATORS for o2 in OPERATORS]


@pytest.mark.parametrize("head_memory", ["keep", "recompute"])
@pytest.mark.parametrize(("o1", "o2"), PAIRS)
def test_ten_steps_agree(o1, o2, head_memory):
    parity = check_parity(o1, o2, head_memory)
    assert parity.agrees, parity


@pytest.mark.parametrize("head_memory", ["keep", "recompute"])
def test_ten_steps_agree_in_bfloat16(head_memory):
    parity = check_parity("SX", "SX", head_memory, dtype=torch.bfloat16)
    assert parity.agrees, parity
    assert parity.fused_error < 0.2


@pytest.mark.parametrize(
    ("head_memory", "operator"),
    [
        ("keep", "_teacher_energy"),
        ("keep", "_linear_soft_embedding"),
        ("recompute", "_linear_energy_sum"),
        ("recompute", "_linear_soft_embedding"),
    ],
)
def test_a_slightly_wrong_operator_is_found(monkeypatch, head_memory, operator):
    right = getattr(linear, operator)

    def wrong(*arguments):
        first, *rest = right(*arguments)
        return first * 1.001, *rest

    monkeypatch.setattr(linear, operator, wrong)
    parity = check_parity("SX", "ST", head_memory)
    assert not parity.agrees, parity


@pytest.mark.parametrize("side", ["value", "gradient"])
def test_nan_is_found(monkeypatch, side):
    right = linear._teacher_energy

    def poisoned(*arguments):
        first, *rest = right(*arguments)
        if side == "value":
            return first * torch.nan, *rest
        first.register_hook(lambda gradient: gradient * torch.nan)
        return first, *rest

    monkeypatch.setattr(linear, "_teacher_energy", poisoned)
    parity = check_parity()
    assert not parity.agrees, parity


def test_the_reference_uses_no_compiled_operator(monkeypatch):
    """Otherwise the gate would compare a thing with itself."""

    def refuse(*arguments):
        raise AssertionError("the plain path called a compiled operator")

    for name in ("_linear_energy", "_linear_energy_sum", "_teacher_energy", "_linear_soft_embedding"):
        monkeypatch.setattr(linear, name, refuse)
    arguments = [torch.ones(rows, 3) for rows in (2, 5, 2, 5)]
    with pytest.raises(AssertionError, match="compiled operator"):
        ops.linear_energy(*arguments)
    with ops.using("reference"):
        ops.linear_energy(*arguments)
