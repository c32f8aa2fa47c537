"""The block-wise closed forms against the reference, and what they keep in memory."""

import pytest
import torch

from engine_fast.operators import OPERATORS
from engine_fast.ops import closed, reference

SHAPES = [(0, 5), (1, 1), (3, 7), (41, 127)]
FROZEN = ["neither", "z", "other"]


@pytest.fixture(autouse=True, params=[1, 600, 1 << 21], ids=["row", "few", "whole"])
def block(request, monkeypatch):
    monkeypatch.setattr(closed, "BLOCK_ELEMENTS", request.param)


def draw(*shape, seed, dtype=torch.float64, frozen=False):
    values = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_(not frozen)


def value_and_gradients(function, z, other, name, noise, temperature):
    z, other = (x.detach().clone().requires_grad_(x.requires_grad) for x in (z, other))
    out = function(z, other, name, noise=noise, temperature=temperature)
    ramp = torch.linspace(-1.0, 2.0, out.numel(), dtype=out.dtype).view(out.shape)
    out.backward(ramp)
    return [out.detach(), z.grad, other.grad]


def pair(kind, shape, dtype, frozen):
    z = draw(*shape, seed=1, dtype=dtype, frozen=frozen == "z")
    other = shape if kind == "energy" else (shape[1], 6)
    return z, draw(*other, seed=2, dtype=dtype, frozen=frozen == "other")


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("kind", ["energy", "soft_embedding"])
def test_values_and_gradients(kind, name, shape, frozen):
    z, other = pair(kind, shape, torch.float64, frozen)
    noise = draw(*shape, seed=3).detach()
    for temperature in (1.0, 0.6):
        ours, theirs = (
            value_and_gradients(getattr(module, kind), z, other, name, noise, temperature)
            for module in (closed, reference)
        )
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("kind", ["energy", "soft_embedding"])
def test_errs_no_more_than_the_reference(kind, name, dtype):
    z, other = pair(kind, (41, 127), dtype, "neither")
    noise = draw(41, 127, seed=3).detach().to(dtype)
    truth = value_and_gradients(getattr(reference, kind), z.double(), other.double(), name, noise.double(), 1.0)
    plain = value_and_gradients(getattr(reference, kind), z, other, name, noise, 1.0)
    ours = value_and_gradients(getattr(closed, kind), z, other, name, noise, 1.0)
    for exact, expected, got in zip(truth, plain, ours, strict=True):
        assert got.dtype == expected.dtype
        allowed = 2 * (expected.double() - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (got.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("name", OPERATORS)
def test_only_the_logits_are_kept_for_the_backward_pass(name):
    z, s, table = draw(12, 50, seed=7), draw(12, 50, seed=8), draw(50, 4, seed=9)
    inputs = {id(x) for x in (z, s, table)}
    noise = draw(12, 50, seed=10).detach()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        closed.energy(z, s, name, noise=noise)
        closed.soft_embedding(z, table, name, noise=noise)
    assert all(x is noise or id(x) in inputs for x in kept)


def test_noise_is_drawn_once_for_forward_and_backward():
    z, s = draw(9, 31, seed=11), draw(9, 31, seed=12)
    torch.manual_seed(4)
    closed.energy(z, s, "GX").sum().backward()
    ours = z.grad
    torch.manual_seed(4)
    noise = closed.gumbel_noise(z.shape)
    z.grad = None
    reference.energy(z, s, "GX", noise=noise).sum().backward()
    torch.testing.assert_close(ours, z.grad, rtol=1e-11, atol=1e-11)
