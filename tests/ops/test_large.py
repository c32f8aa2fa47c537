"""More than 2^31 elements: offsets that do not fit 32 bits. Rows are shared storage where that saves memory."""

from __future__ import annotations

import pytest
import torch

from engine_fast import ops

V = 32768
N = 2**31 // V + 5  # of which the last rows lie beyond


@pytest.mark.slow
def test_more_than_two_to_the_31_elements_in_shared_rows(device: str):
    """Stride 0: no memory, but every row and element counts."""
    generator = torch.Generator().manual_seed(0)
    z, s = (torch.randn(1, V, generator=generator).bfloat16().to(device) for _ in range(2))
    weight = torch.arange(1.0, N + 1, device=device)
    got = ops.energy(z.expand(N, V), s.expand(N, V), "ST", weight=weight)
    one = ops.energy(z, s, "ST")
    assert torch.equal(got, one * weight)


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["SX", "ST"])
def test_rows_that_lie_beyond_two_to_the_31_elements(operator: str, device: str):
    """Few rows far apart, in 4.3 GiB of bfloat16 of which only their pages are touched."""
    stride = 2**29 + 7
    storage = torch.empty(4 * stride + 1001, dtype=torch.bfloat16, device=device)
    z = storage.as_strided((5, 1001), (stride, 1))
    assert 4 * stride > 2**31
    generator = torch.Generator().manual_seed(0)
    values, s = (torch.randn(5, 1001, generator=generator).bfloat16().to(device) for _ in range(2))
    z.copy_(values)
    gradients = []
    for logits in (z, values):
        leaf = logits.detach().requires_grad_()
        e = ops.energy(leaf, s, operator)
        gradients.append((e.detach(), *torch.autograd.grad(e.sum(), leaf)))
    for far, near in zip(*gradients, strict=True):
        assert torch.equal(far, near)


@pytest.mark.slow
def test_a_gradient_of_more_than_two_to_the_31_elements(device: str):
    """The in-place backward pass over 4.3 GiB: the last rows get their gradient, at their place."""
    z = torch.zeros(1, dtype=torch.bfloat16, device=device).repeat(N * V).view(N, V)
    s = torch.linspace(-1, 1, V).bfloat16().to(device)[None].expand(N, V)
    leaf = z.requires_grad_()
    e = ops.energy(leaf, s, "SX", overwrite=True)
    (dz,) = torch.autograd.grad(e.sum(), leaf)
    assert dz.data_ptr() == z.data_ptr()
    assert torch.equal(dz[0], dz[-1])
    assert dz[-1].abs().max() > 0
    assert torch.equal(e[0], e[-1])


@pytest.mark.parametrize("num_words", [2**18, 2**24])
def test_the_largest_vocabularies(num_words: int, device: str):
    """float32 holds the index of the last word exactly."""
    z = torch.zeros(1, num_words, dtype=torch.bfloat16, device=device)
    z[0, -1] = 1.0
    table = torch.zeros(num_words, 1, dtype=torch.float32, device=device)
    table[-1] = 3.0
    assert ops.soft_embedding(z, table, "ST").item() == 3.0
    e = ops.energy(z, z, "SX")
    torch.testing.assert_close(e, torch.full_like(e, float(torch.tensor(float(num_words)).log())), rtol=1e-5, atol=1e-5)
