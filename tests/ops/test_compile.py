"""torch.compile and autocast. aot_eager traces all that inductor does and compiles no C++; one test lets it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine_fast import ops
from tests.ops.cases import CASES, assert_same, clear_noise, draw, kernel_noise, ramp, row_options

_32 = (torch.float32, torch.float32)


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def loss(name: str, leaves: dict[str, Tensor], operator: str, **options: Any) -> Tensor:
    """<ramp, everything returned>, with something around the operator for the compiler to keep in order."""
    case = CASES[name]
    returned = getattr(ops, case.function)(**leaves, operator=operator, **case.fixed, **options)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    return sum(((1.0 + output) * ramp(output)).sum() for output in outputs)


def both(name: str, shape: tuple[int, int], compiled: Any, device: str, operator: str, **options: Any) -> None:
    """Values and gradients of `compiled` and of the same without a compiler."""
    results = []
    for function in (compiled, loss):
        drawn = draw(CASES[name], shape, dtypes=_32, device=device)
        leaves = {key: tensor.requires_grad_(key in CASES[name].trained) for key, tensor in drawn.items()}
        value = function(name, leaves, operator, **options)
        value.backward()
        results.append({"value": value.detach(), **{key: leaf.grad for key, leaf in leaves.items()}})
    assert_same(results[0], results[1], 1e-6)


@pytest.mark.parametrize("operator", ["SX", "STL", "ST"])
@pytest.mark.parametrize("name", CASES)
def test_one_graph_with_the_same_values_and_gradients(name: str, operator: str, device: str):
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    both(name, (5, 19), compiled, device, operator, **row_options(CASES[name], 5, device), temperature=0.7)


@pytest.mark.parametrize("noise", ["noise", "int", "tensor"])
@pytest.mark.parametrize("name", CASES)
def test_noise_and_seeds_pass_through_the_compiler(name: str, noise: str, device: str):
    given = clear_noise(draw(CASES[name], (5, 19), dtypes=_32, device=device))
    seeds: dict[str, Any] = {"int": {"seed": 77}, "tensor": {"seed": torch.tensor(77, device=device)}}
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    both(name, (5, 19), compiled, device, "GX", **seeds.get(noise, {"noise": given}))


@pytest.mark.parametrize("name", ["energy", "linear_energy"])
def test_a_drawn_seed_is_new_in_each_call_of_compiled_code(name: str, device: str):
    drawn = draw(CASES[name], (5, 19), dtypes=_32, device=device)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        first, second = (compiled(name, drawn, "GX") for _ in range(2))
    assert not torch.equal(first, second)


def test_overwrite_is_without_effect_under_the_compiler(device: str):
    """The logits are there afterwards, and the gradients are those of a plain call."""
    drawn = draw(CASES["energy"], (5, 19), dtypes=_32, device=device)
    results = []
    for overwrite in (True, False):
        leaves = {key: tensor.clone().requires_grad_() for key, tensor in drawn.items()}
        compiled = torch.compile(ops.energy, fullgraph=True, backend="aot_eager")
        e = compiled(**leaves, operator="ST", overwrite=True) if overwrite else ops.energy(**leaves, operator="ST")
        e.backward(ramp(e))
        assert all(torch.equal(leaf.detach(), drawn[key]) for key, leaf in leaves.items())
        results.append({"e": e.detach(), **{key: leaf.grad for key, leaf in leaves.items()}})
    assert_same(results[0], results[1], 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_dynamic_shapes_need_one_compilation(name: str, device: str):
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    both(name, (7, 19), compiled, device, "ST")
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in ((6, 23), (9, 40)):
            both(name, shape, compiled, device, "ST")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_inductor(name: str, device: str):
    compiled = torch.compile(loss, fullgraph=True)
    both(name, (5, 19), compiled, device, "ST", temperature=0.7)


def test_autocast_gives_heads_in_half_precision(device: str):
    """The products of a head run in bfloat16, the energies stay float32, gradients arrive in the weights' float32."""
    drawn = draw(CASES["linear_energy"], (5, 19), dtypes=_32, device=device)
    results = []
    for cast in (False, True):
        leaves = {key: tensor.detach().requires_grad_() for key, tensor in drawn.items()}
        if cast:
            with torch.autocast(device, torch.bfloat16):
                e = ops.linear_energy(**leaves)
        else:
            e = ops.linear_energy(**{key: leaf.bfloat16() for key, leaf in leaves.items()})
        e.backward(ramp(e))
        results.append({"e": e.detach(), **{key: leaf.grad for key, leaf in leaves.items()}})
    assert results[1]["e"].dtype == torch.float32
    assert results[1]["w_student"].dtype == torch.float32
    assert_same(results[1], results[0], 0.0)
    exact = ops.linear_energy(**drawn)
    assert not torch.equal(results[1]["e"], exact)


@pytest.mark.parametrize("name", ["soft_embedding", "linear_soft_embedding", "linear_soft_embedding_and_logits"])
def test_autocast_gives_embeddings_in_half_precision(name: str, device: str):
    drawn = draw(CASES[name], (5, 19), dtypes=_32, device=device)
    with torch.autocast(device, torch.bfloat16):
        returned = getattr(ops, CASES[name].function)(**drawn)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    assert [output.dtype for output in outputs] == [torch.bfloat16] * len(outputs)


@pytest.mark.parametrize("name", CASES)
def test_autocast_leaves_float64_alone(name: str, device: str):
    drawn = draw(CASES[name], (5, 19), device=device)
    with torch.autocast(device, torch.bfloat16):
        returned = getattr(ops, CASES[name].function)(**drawn, **CASES[name].fixed)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    assert [output.dtype for output in outputs] == [torch.float64] * len(outputs)


def test_autocast_accepts_a_head_of_another_dtype(device: str):
    """A bfloat16 teacher beside float32 hidden states, as torch's own linear does under autocast."""
    drawn = draw(CASES["teacher_energy"], (5, 19), dtypes=_32, device=device)
    drawn["w_teacher"], drawn["bias_teacher"] = drawn["w_teacher"].bfloat16(), drawn["bias_teacher"].bfloat16()
    with torch.autocast(device, torch.bfloat16):
        got = ops.teacher_energy(**drawn)
        wanted = ops.reference.teacher_energy(**drawn)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_noise_of_compiled_code_is_the_kernels(device: str):
    noise = kernel_noise((5, 19), 77, device).float()
    z, s = draw(CASES["energy"], (5, 19), dtypes=_32, device=device).values()
    compiled = torch.compile(lambda a, b: ops.energy(a, b, "GX", seed=77), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(z, s), ops.energy(z, s, "GX", noise=noise))
