"""The plain definitions against the closed forms of docs/architecture.md, in float64."""

import pytest
import torch

from engine_fast import ops
from engine_fast.errors import ConfigError
from engine_fast.operators import OPERATORS, Operator, gumbel_noise

SHAPES = [(1, 1), (3, 7), (4, 15), (4, 17), (41, 127)]


def draw(shape, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    z, s = (scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return z.requires_grad_(), s.requires_grad_(), gumbel_noise(shape, seed=seed).double()


def soft_and_value(z: torch.Tensor, op: Operator, noise: torch.Tensor, temperature: float):
    """(q^, q): the softmax that the Jacobian is of, and the forward value."""
    perturbed = z + noise if op.gumbel else z
    soft = (perturbed / temperature).softmax(-1)
    return soft, torch.eye(z.shape[1], dtype=z.dtype)[perturbed.argmax(-1)] if op.hard else soft


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_energy_and_its_gradients_are_the_closed_form(shape, name, temperature):
    z, s, noise = draw(shape)
    upstream = torch.linspace(0.5, 2.0, shape[0], dtype=torch.float64)
    energy = ops.energy(z, s, name, noise=noise, temperature=temperature)
    energy.backward(upstream)

    op = OPERATORS[name]
    with torch.no_grad():
        soft, q = soft_and_value(z, op, noise, temperature)
        lse = s.logsumexp(-1, keepdim=True)
        ds = upstream[:, None] * (s.softmax(-1) - q)
        dz = soft * ((soft * s).sum(-1, keepdim=True) - s) / temperature if op.jacobian == "softmax" else lse - s
    torch.testing.assert_close(energy, (lse.squeeze(-1) - (q * s).sum(-1)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(s.grad, ds, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(z.grad, upstream[:, None] * dz, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_soft_embedding_and_its_gradients_are_the_closed_form(shape, name, temperature):
    z, _, noise = draw(shape, seed=1)
    table = torch.randn(shape[1], 5, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(shape[0], 5, dtype=torch.float64)
    x = ops.soft_embedding(z, table, name, noise=noise, temperature=temperature)
    x.backward(upstream)

    op = OPERATORS[name]
    with torch.no_grad():
        soft, q = soft_and_value(z, op, noise, temperature)
        do = upstream @ table.T
        dz = soft * (do - (soft * do).sum(-1, keepdim=True)) / temperature if op.jacobian == "softmax" else do
    torch.testing.assert_close(x, q @ table, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(table.grad, q.T @ upstream, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(z.grad, dz, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["SX", "GX"])
def test_soft_operators_pass_gradcheck(name):
    z, s, noise = draw((3, 7), seed=2)
    table = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: ops.energy(a, b, name, noise=noise), (z, s))
    assert torch.autograd.gradcheck(lambda a, b: ops.soft_embedding(a, b, name, noise=noise), (z, table))


@pytest.mark.parametrize("name", ["SX", "ST", "SG"])
def test_linear_forms_are_the_heads_followed_by_the_operation(name):
    torch.manual_seed(4)
    h_student, h_teacher, w_student, w_teacher, table = (torch.randn(n, 6) for n in (5, 5, 11, 11, 11))
    bias, noise = torch.randn(11), torch.randn(5, 11)
    z, s = h_student @ w_student.T + bias, h_teacher @ w_teacher.T
    got = ops.linear_energy(h_student, w_student, h_teacher, w_teacher, name, bias_student=bias, noise=noise)
    torch.testing.assert_close(got, ops.energy(z, s, name, noise=noise))
    got = ops.linear_soft_embedding(h_student, w_student, table, name, bias_student=bias, noise=noise)
    torch.testing.assert_close(got, ops.soft_embedding(z, table, name, noise=noise))


def test_ties_go_to_the_lowest_index():
    z = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    assert ops.soft_embedding(z, torch.arange(4.0)[:, None], "ST").item() == 1.0


def test_gumbel_operators_draw_their_own_noise_each_time():
    torch.manual_seed(5)
    z = torch.zeros(1, 1000)
    draws = {ops.soft_embedding(z, torch.arange(1000.0)[:, None], "SG").item() for _ in range(8)}
    assert len(draws) > 4


def test_bfloat16_logits_are_summed_in_float32():
    z, s, _ = draw((8, 4096), scale=1.0)
    z, s = z.detach().bfloat16(), s.detach().bfloat16()
    energy = ops.energy(z, s, "SX")
    assert energy.dtype == torch.float32
    torch.testing.assert_close(energy, ops.energy(z.double(), s.double(), "SX").float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.energy(torch.ones(2, 3), torch.ones(2, 4)), r"z \(2, 3\), s \(2, 4\)"),
        (lambda: ops.energy(torch.ones(3), torch.ones(3)), r"two equal \(N, V\)"),
        (lambda: ops.soft_embedding(torch.ones(2, 3), torch.ones(4, 5)), r"table \(4, 5\)"),
        (lambda: ops.energy(torch.ones(2, 3), torch.ones(2, 3), "GX", noise=torch.ones(2, 1)), r"noise \(2, 1\)"),
        (lambda: ops.energy(torch.ones(2, 3), torch.ones(2, 3), "XS"), "expected one of"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
