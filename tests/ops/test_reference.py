"""The plain definitions, and the fused operators, against the closed forms of docs/architecture.md, in float64."""

import pytest
import torch

from engine_fast import ops
from engine_fast.errors import ConfigError
from engine_fast.operators import OPERATORS, Operator, gumbel_noise

SHAPES = [(1, 1), (3, 7), (4, 15), (4, 17), (41, 127)]
both = pytest.mark.parametrize("module", [ops.reference, ops], ids=["reference", "fused"])


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
@both
def test_energy_and_its_gradients_are_the_closed_form(module, shape, name, temperature):
    z, s, noise = draw(shape)
    upstream = torch.linspace(0.5, 2.0, shape[0], dtype=torch.float64)
    energy = module.energy(z, s, name, noise=noise, temperature=temperature)
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
@both
def test_soft_embedding_and_its_gradients_are_the_closed_form(module, shape, name, temperature):
    z, _, noise = draw(shape, seed=1)
    table = torch.randn(shape[1], 5, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(shape[0], 5, dtype=torch.float64)
    x = module.soft_embedding(z, table, name, noise=noise, temperature=temperature)
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
@both
def test_soft_operators_pass_gradcheck(module, name):
    z, s, noise = draw((3, 7), seed=2)
    table = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: module.energy(a, b, name, noise=noise), (z, s))
    assert torch.autograd.gradcheck(lambda a, b: module.soft_embedding(a, b, name, noise=noise), (z, table))


@pytest.mark.parametrize("name", OPERATORS)
@both
def test_linear_forms_are_the_heads_followed_by_the_operation(module, name):
    torch.manual_seed(4)
    h_student, h_teacher, w_student, w_teacher, table = (torch.randn(n, 6) for n in (5, 5, 11, 11, 11))
    bias, noise = torch.randn(11), torch.randn(5, 11)
    z, s = h_student @ w_student.T + bias, h_teacher @ w_teacher.T
    got = module.linear_energy(h_student, w_student, h_teacher, w_teacher, name, bias_student=bias, noise=noise)
    energies = module.energy(z, s, name, noise=noise)
    torch.testing.assert_close(got, energies)
    total = module.linear_energy(
        h_student, w_student, h_teacher, w_teacher, name, bias_student=bias, noise=noise, reduction="sum"
    )
    torch.testing.assert_close(total, energies.sum())
    torch.testing.assert_close(module.teacher_energy(z, h_teacher, w_teacher, name, noise=noise), energies)
    shifted = module.teacher_energy(z, h_teacher, w_teacher, name, bias_teacher=2 * bias, noise=noise)
    torch.testing.assert_close(shifted, module.energy(z, s + 2 * bias, name, noise=noise))
    got = module.linear_soft_embedding(h_student, w_student, table, name, bias_student=bias, noise=noise)
    embedded = module.soft_embedding(z, table, name, noise=noise)
    torch.testing.assert_close(got, embedded)
    x, logits = module.linear_soft_embedding_and_logits(
        h_student, w_student, table, name, bias_student=bias, noise=noise
    )
    torch.testing.assert_close(x, embedded)
    torch.testing.assert_close(logits, z)


@pytest.mark.parametrize("name", OPERATORS)
@both
def test_weights_multiply_energies_and_gradients(module, name):
    z, s, noise = draw((5, 19), seed=6)
    weight = torch.tensor([0.5, -2.0, 0.0, 3.0, 1.0], dtype=torch.float64)
    plain = module.energy(z, s, name, noise=noise)
    wanted = torch.autograd.grad(plain, (z, s), weight)
    weighted = module.energy(z, s, name, noise=noise, weight=weight)
    torch.testing.assert_close(weighted, weight * plain)
    got = torch.autograd.grad(weighted.sum(), (z, s))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPERATORS)
@both
def test_ignored_rows_are_as_if_they_were_not_there(module, name):
    z, s, noise = draw((5, 19), seed=7)
    ignore = torch.tensor([False, True, False, False, True])
    keep = ~ignore
    upstream = torch.linspace(0.5, 2.0, 5, dtype=torch.float64)
    got = module.energy(z, s, name, noise=noise, ignore=ignore)
    gradients = torch.autograd.grad(got, (z, s), upstream)
    wanted = module.energy(z[keep], s[keep], name, noise=noise[keep])
    torch.testing.assert_close(got[keep], wanted)
    for gradient, want in zip(gradients, torch.autograd.grad(wanted, (z, s), upstream[keep]), strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-12, atol=1e-12)
        assert gradient[ignore].abs().max() == 0.0
    assert got[ignore].abs().max() == 0.0
    table = torch.randn(19, 4, dtype=torch.float64, requires_grad=True)
    x = module.soft_embedding(z, table, name, noise=noise, ignore=ignore)
    alone = module.soft_embedding(z[keep], table, name, noise=noise[keep])
    torch.testing.assert_close(x[keep], alone)
    assert x[ignore].abs().max() == 0.0
    torch.testing.assert_close(
        torch.autograd.grad(x.sum(), table), torch.autograd.grad(alone.sum(), table), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", ["SG", "GX"])
def test_a_seed_of_the_definition_is_gumbel_noise_of_that_seed(name):
    z, s, _ = draw((5, 19), seed=8)
    noise = gumbel_noise((5, 19), seed=-3)
    assert torch.equal(ops.reference.energy(z, s, name, seed=-3), ops.reference.energy(z, s, name, noise=noise))
    assert torch.equal(
        ops.reference.energy(z, s, name, seed=torch.tensor(-3)), ops.reference.energy(z, s, name, noise=noise)
    )
    x = torch.eye(19, dtype=torch.float64)
    assert torch.equal(
        ops.reference.soft_embedding(z, x, name, seed=-3), ops.reference.relax(z, name, noise=noise.double())
    )


def test_teacher_weights_may_be_trained_as_well():
    """The plain way then: the same numbers and every gradient."""
    torch.manual_seed(9)
    z, h, w = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((5, 11), (5, 6), (11, 6)))
    got = torch.autograd.grad(ops.teacher_energy(z, h, w, "ST").sum(), (z, h, w))
    wanted = torch.autograd.grad(ops.energy(z, h @ w.T, "ST").sum(), (z, h, w))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


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
