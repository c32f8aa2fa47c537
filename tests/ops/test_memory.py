"""What is kept between forward and backward, and how much scratch the linear forms take: a tile, never (N, V)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_fast import ops
from engine_fast.operators import OPERATORS
from tests.ops.cases import CASES, DEVICES, draw, ramp

N, V = 40, 300
MIB = 2**20


def saved_by(function: Callable[[], Any]) -> list[Tensor]:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return kept


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", CASES)
def test_no_table_of_probabilities_is_kept(name: str, operator: str, device: str):
    """Nothing of N * V elements is saved but the inputs themselves and what is documented."""
    case = CASES[name]
    tensors = draw(case, (N, V), device=device)
    leaves = {key: tensor.requires_grad_(key in case.trained) for key, tensor in tensors.items()}
    returned: list[Any] = []
    kept = saved_by(lambda: returned.append(getattr(ops, case.function)(**leaves, operator=operator, **case.fixed)))
    assert kept, "nothing was saved: was this the fused path?"
    inputs = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}
    large = [t for t in kept if t.numel() >= N * V and t.untyped_storage().data_ptr() not in inputs]
    # teacher_energy keeps the teacher's logits once; the twin that returns the student's logits keeps those.
    allowed = 1 if name in ("teacher_energy", "linear_soft_embedding_and_logits") else 0
    assert len(large) == allowed, [tuple(t.shape) for t in large]
    scalars = sum(t.numel() for t in kept if t.untyped_storage().data_ptr() not in inputs) - allowed * N * V
    trained = sum(leaf.numel() for leaf in leaves.values() if leaf.requires_grad)
    # Ready gradients: of everything for "sum", of the hidden states for the teacher's energy.
    ready = {"linear_energy_sum": trained, "teacher_energy": leaves.get("h_teacher", torch.empty(0)).numel()}
    assert scalars <= 6 * N + 1 + ready.get(name, 0)


def test_the_reference_would_fail_the_test_above():
    """The bound above means something: the definition keeps several (N, V) tensors."""
    tensors = {key: tensor.requires_grad_() for key, tensor in draw(CASES["energy"], (N, V)).items()}
    kept = saved_by(lambda: ops.reference.energy(**tensors, operator="SX"))
    inputs = {leaf.untyped_storage().data_ptr() for leaf in tensors.values()}
    assert sum(t.numel() >= N * V and t.untyped_storage().data_ptr() not in inputs for t in kept) >= 3


def peak_bytes(function: Callable[[], Any], device: str) -> int:
    """Largest sum of allocations above those at the start."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def test_peak_bytes_counts_what_is_allocated(device: str):
    def function():
        a = torch.empty(3 * MIB, dtype=torch.uint8, device=device)
        del a
        return torch.empty(2 * MIB, dtype=torch.uint8, device=device)

    assert 3 * MIB <= peak_bytes(function, device) < 3.5 * MIB


BUDGET = {"cpu": 128 * MIB, "cuda": 64 * MIB}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ["linear_energy", "linear_energy_sum", "linear_soft_embedding"])
def test_the_linear_forms_take_one_tile(name: str, backward: bool, device: str):
    """2 x 256 MiB of logits, and a peak of one tile's budget besides the gradients themselves."""
    case = CASES[name]
    shape = (512, 2**17)
    tensors = draw(case, shape, dtypes=(torch.float32, torch.float32), device=device)
    leaves = {key: tensor.requires_grad_(backward) for key, tensor in tensors.items()}
    outputs: list[Tensor] = []

    def function() -> None:
        with torch.set_grad_enabled(backward):
            outputs.append(getattr(ops, case.function)(**leaves, operator="ST", **case.fixed))
        if backward:
            outputs[0].backward(ramp(outputs[0]))

    peak = peak_bytes(function, device)
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves.values() if leaf.requires_grad)
    assert peak <= BUDGET[device] + gradients + 8 * MIB, f"{peak / MIB:.0f} MiB"
    assert peak >= BUDGET[device] / 2, f"{peak / MIB:.0f} MiB: the measurement sees nothing"


@pytest.mark.parametrize("device", DEVICES)
def test_soft_embedding_keeps_a_million_elements_of_its_softmax(device: str):
    tensors = draw(CASES["soft_embedding"], (512, 2**15), dtypes=(torch.float32, torch.float32), device=device)
    with torch.no_grad():
        peak = peak_bytes(lambda: ops.soft_embedding(**tensors), device)
    assert peak <= 6 * MIB, f"{peak / MIB:.1f} MiB"  # the softmax alone is 64 MiB
