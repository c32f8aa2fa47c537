"""Every fused function against its definition, values and gradients, in float64."""

from __future__ import annotations

import pytest
import torch

from engine_fast import ops
from engine_fast.operators import OPERATORS
from tests.ops.cases import CASES, SHAPES, assert_same, clear_noise, draw, kernel_noise, row_options, run


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", CASES)
def test_equals_its_definition(name: str, operator: str, temperature: float, shape: tuple[int, int], device: str):
    case = CASES[name]
    tensors = draw(case, shape, device=device)
    options = {"noise": clear_noise(tensors), "temperature": temperature, **row_options(case, shape[0], device)}
    wanted = run(ops.reference, case, tensors, operator, **options)
    assert_same(run(ops, case, tensors, operator, **options), wanted)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", CASES)
def test_without_any_option(name: str, operator: str, device: str):
    case = CASES[name]
    tensors = draw(case, (7, 33), device=device)
    options = {"noise": clear_noise(tensors)} if OPERATORS[operator].gumbel else {}
    wanted = run(ops.reference, case, tensors, operator, **options)
    assert_same(run(ops, case, tensors, operator, **options), wanted)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("name", "trained"), [(name, subset) for name, case in CASES.items() for subset in (*case.subsets, ())]
)
def test_only_what_is_trained_gets_a_gradient(name: str, trained: tuple[str, ...], operator: str, device: str):
    case = CASES[name]
    tensors = draw(case, (5, 19), device=device)
    options = {"noise": clear_noise(tensors), "temperature": 1.3, **row_options(case, 5, device)}
    got = run(ops, case, tensors, operator, trained=trained, **options)
    assert {input for input in case.inputs if got[input] is not None} == set(trained)
    assert_same(got, run(ops.reference, case, tensors, operator, trained=trained, **options))


@pytest.mark.parametrize("without", [("bias_student",), ("bias_teacher",), ("bias_student", "bias_teacher")])
@pytest.mark.parametrize("name", [name for name in CASES if "linear" in name or "teacher" in name])
def test_a_head_may_lack_its_bias(name: str, without: tuple[str, ...], device: str):
    case = CASES[name]
    tensors = {key: tensor for key, tensor in draw(case, (5, 19), device=device).items() if key not in without}
    trained = tuple(input for input in case.trained if input in tensors)
    wanted = run(ops.reference, case, tensors, "SX", trained=trained)
    assert_same(run(ops, case, tensors, "SX", trained=trained), wanted)


@pytest.mark.parametrize("option", ["weight", "ignore"])
@pytest.mark.parametrize("name", CASES)
def test_row_options_one_at_a_time(name: str, option: str, device: str):
    case = CASES[name]
    if option == "weight" and not case.weighted:
        return
    tensors = draw(case, (5, 19), device=device)
    options = {option: row_options(case, 5, device)[option]}
    got = run(ops, case, tensors, "ST", **options)
    assert_same(got, run(ops.reference, case, tensors, "ST", **options))
    bare = run(ops, case, tensors, "ST")
    assert not torch.equal(got["out0"], bare["out0"]), "the option has no effect"


@pytest.mark.parametrize("operator", ["SG", "GX"])
@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_seed_stands_for_the_kernels_own_noise(name: str, shape: tuple[int, int], operator: str, device: str):
    case = CASES[name]
    tensors = draw(case, shape, device=device)
    noise = kernel_noise(shape, 1234, device)
    wanted = run(ops.reference, case, tensors, operator, noise=noise, temperature=0.7)
    assert_same(run(ops, case, tensors, operator, seed=1234, temperature=0.7), wanted)


@pytest.mark.parametrize("name", ["linear_energy", "linear_energy_sum", "linear_soft_embedding_and_logits"])
def test_a_tied_weight_gets_the_sum_of_its_gradients(name: str, device: str):
    """The student's head as the table, or one head for student and teacher: the same tensor given twice."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(3)
    h, w = (torch.randn(size, 6, generator=generator, dtype=torch.float64).to(device) for size in (5, 19))
    gradients = []
    for module in (ops, ops.reference):
        hidden, tied = h.detach().requires_grad_(), w.detach().requires_grad_()
        if case.function == "linear_energy":
            total = ops_sum(module.linear_energy(hidden, tied, 0.5 * hidden, tied, "SX", **case.fixed))
        else:
            x, z = module.linear_soft_embedding_and_logits(hidden, tied, tied, "SX")
            total = ops_sum(x) + ops_sum(z)
        total.backward()
        gradients.append((hidden.grad, tied.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-11, atol=1e-11)


def ops_sum(x: torch.Tensor) -> torch.Tensor:
    return (x * torch.linspace(0.5, 2.0, x.numel(), dtype=x.dtype, device=x.device).view(x.shape)).sum()


@pytest.mark.parametrize("grads", ["x", "z"])
@pytest.mark.parametrize("operator", ["SX", "STL", "SG"])
def test_embedding_and_logits_may_be_used_alone(operator: str, grads: str, device: str):
    """Backward with a gradient of only one of the two results."""
    case = CASES["linear_soft_embedding_and_logits"]
    tensors = draw(case, (5, 19), device=device)
    noise = clear_noise(tensors)
    made = []
    for module in (ops, ops.reference):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        x, z = module.linear_soft_embedding_and_logits(**leaves, operator=operator, noise=noise)
        used = (leaves["h"], leaves["w_student"], leaves["bias_student"])
        made.append(torch.autograd.grad(ops_sum(x if grads == "x" else z), used))
    torch.testing.assert_close(made[0], made[1], rtol=1e-11, atol=1e-11)
