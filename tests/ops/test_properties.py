"""Any shape, layout, dtype and scale: the fused operators against their definition, and identities that must hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine_fast import ops
from engine_fast.operators import OPERATORS, gumbel_noise
from tests.ops.cases import CASES, DEVICES, assert_same, draw, run

modest = settings(deadline=None, max_examples=60, derandomize=True)
operators = st.sampled_from(list(OPERATORS))
shapes = st.tuples(st.integers(1, 6), st.integers(1, 300))
devices = st.sampled_from(DEVICES)


def fill(shape: tuple[int, ...], seed: int, scale: float, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


@st.composite
def matrices(draw: st.DrawFn, num_rows: int, num_columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(num_rows, num_columns) in one of the layouts that reach a kernel in practice."""
    seed, scale = draw(st.integers(0, 10**6)), draw(st.sampled_from([1e-3, 0.3, 3.0, 30.0, 1e3]))
    layout = draw(st.sampled_from(["plain", "transposed", "columns", "row gap", "expanded", "offset", "reversed rows"]))
    if layout == "transposed":
        return fill((num_columns, num_rows), seed, scale, dtype).t()
    if layout == "columns":
        step = draw(st.integers(2, 3))
        return fill((num_rows, num_columns * step), seed, scale, dtype)[:, ::step]
    if layout == "row gap":
        gap = draw(st.integers(1, 9))
        return fill((num_rows, num_columns + gap), seed, scale, dtype)[:, gap:]
    if layout == "expanded":
        return fill((1, num_columns), seed, scale, dtype).expand(num_rows, num_columns)
    if layout == "offset":  # off every vector boundary
        start = draw(st.integers(1, 15))
        return fill((num_rows * num_columns + start,), seed, scale, dtype)[start:].view(num_rows, num_columns)
    if layout == "reversed rows":
        return fill((2 * num_rows, num_columns), seed, scale, dtype)[::2]
    return fill((num_rows, num_columns), seed, scale, dtype)


def place(tensors: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """On the CPU as they are; a copy to a GPU keeps the strides of dense tensors only."""
    return {key: tensor if device == "cpu" else tensor.to(device) for key, tensor in tensors.items()}


@modest
@given(data=st.data(), shape=shapes, operator=operators, device=devices)
@pytest.mark.parametrize("name", ["energy", "soft_embedding"])
def test_logits_of_any_layout_and_scale(name: str, data: Any, shape: tuple[int, int], operator: str, device: str):
    case, (num_rows, num_words) = CASES[name], shape
    second = (num_rows, num_words) if name == "energy" else (num_words, data.draw(st.integers(0, 5)))
    tensors = place(
        {key: data.draw(matrices(*size)) for key, size in zip(case.inputs, (shape, second), strict=True)}, device
    )
    options = {
        "noise": data.draw(matrices(*shape)).to(device),
        "temperature": data.draw(st.sampled_from([0.5, 1.0, 2.0])),
        "ignore": torch.tensor(data.draw(st.lists(st.booleans(), min_size=num_rows, max_size=num_rows)), device=device),
    }
    if case.weighted:
        options["weight"] = torch.arange(2.0 * num_rows, device=device)[1::2]
    wanted = run(ops.reference, case, tensors, operator, **options)
    assert_same(run(ops, case, tensors, operator, **options), wanted, 1e-10)


@modest
@given(data=st.data(), shape=shapes, operator=operators, device=devices)
@pytest.mark.parametrize("name", ["linear_energy", "teacher_energy", "linear_soft_embedding_and_logits"])
def test_heads_of_any_layout(name: str, data: Any, shape: tuple[int, int], operator: str, device: str):
    case, tensors = CASES[name], draw(CASES[name], shape)
    for key, tensor in tensors.items():
        if tensor.ndim == 2:
            other = data.draw(matrices(*tensor.shape))
            tensors[key] = other.copy_(tensor) if other.stride(0) and tensor.shape[0] else tensor
    tensors = place(tensors, device)
    noise = gumbel_noise(shape, seed=1).to(device)
    wanted = run(ops.reference, case, tensors, operator, noise=noise)
    assert_same(run(ops, case, tensors, operator, noise=noise), wanted, 1e-10)


@modest
@given(data=st.data(), shape=shapes, operator=operators, device=devices)
def test_half_precision_of_any_layout(data: Any, shape: tuple[int, int], operator: str, device: str):
    """bfloat16 logits hold exact ties; float32 sums of them agree with float64 ones."""
    z, s = (data.draw(matrices(*shape, torch.bfloat16)) for _ in range(2))
    tensors = place({"z": z, "s": s}, device)
    got = run(ops, CASES["energy"], tensors, operator, noise=torch.zeros(shape, device=device))
    truth = run(ops.reference, CASES["energy"], {k: t.double() for k, t in tensors.items()}, operator,
                noise=torch.zeros(shape, device=device))  # fmt: skip
    scale = s.double().abs().max().item()
    torch.testing.assert_close(got["out0"].double(), truth["out0"], rtol=1e-5, atol=1e-5 * max(1.0, scale))
    for key in ("z", "s"):
        torch.testing.assert_close(got[key].double(), truth[key], rtol=2**-7, atol=1e-4 * max(1.0, scale))


@modest
@given(shape=shapes, seed=st.integers(0, 10**6), levels=st.integers(1, 3), device=devices)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ties_go_to_the_lowest_index(dtype: torch.dtype, shape: tuple[int, int], seed: int, levels: int, device: str):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(levels, shape, generator=generator).to(device=device, dtype=dtype)
    table = torch.arange(shape[1], device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    lowest = (z == z.amax(-1, keepdim=True)).double().argmax(-1)
    found = ops.soft_embedding(z, table[:, None], "ST")[:, 0]
    assert torch.equal(found.long(), lowest)
    s = table.expand(shape).clone() if dtype != torch.bfloat16 else table.float().expand(shape).clone()
    energies = ops.energy(z, s, "ST")
    torch.testing.assert_close(energies, s.logsumexp(-1) - lowest.to(s.dtype), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_words", [1, 2047, 2048, 2049, 4096, 4097, 6144, 10000])
def test_ties_across_blocks_of_columns(num_words: int, device: str):
    """The CPU visits 2048 columns at a time; equal maxima in several of them, the first not in the first."""
    z = torch.zeros(3, num_words, device=device)
    first = max(0, num_words // 2 - 1)
    z[0] = 1.0
    z[1, first:] = 1.0
    z[2, -1] = 1.0
    table = torch.arange(float(num_words), device=device)[:, None]
    assert ops.soft_embedding(z, table, "ST")[:, 0].tolist() == [0.0, float(first), float(num_words - 1)]


@modest
@given(shape=shapes, seed=st.integers(0, 10**6), shift=st.sampled_from([-1e4, -1000.0, 1000.0, 1e4]), device=devices)
@pytest.mark.parametrize("operator", ["SX", "ST", "SG", "GX"])
def test_a_shift_of_all_logits_changes_nothing(
    operator: str, shape: tuple[int, int], seed: int, shift: float, device: str
):
    tensors = place({"z": fill(shape, seed, 3.0), "s": fill(shape, seed + 1, 3.0)}, device)
    shifted = {"z": tensors["z"] + shift, "s": tensors["s"] - 2 * shift}
    noise = gumbel_noise(shape, seed=2).to(device)
    plain, moved = (run(ops, CASES["energy"], t, operator, noise=noise) for t in (tensors, shifted))
    assert_same(moved, plain, 1e-9)


@modest
@given(shape=shapes, seed=st.integers(0, 10**6), device=devices)
@pytest.mark.parametrize("name", ["energy", "soft_embedding"])
@pytest.mark.parametrize("operator", ["SX", "SG", "ST", "GX"])
def test_a_softmax_jacobian_has_rows_that_sum_to_zero(
    operator: str, name: str, shape: tuple[int, int], seed: int, device: str
):
    second = fill(shape if name == "energy" else (shape[1], 5), seed + 1, 3.0)
    tensors = place(dict(zip(CASES[name].inputs, (fill(shape, seed, 3.0), second), strict=True)), device)
    gradients = run(ops, CASES[name], tensors, operator, seed=3)
    assert gradients["z"].sum(-1).abs().max() <= 1e-12 * max(1.0, gradients["z"].abs().max().item()) * shape[1]
    if name == "energy":
        assert gradients["s"].sum(-1).abs().max() <= 1e-12 * shape[1]


@modest
@given(shape=shapes, seed=st.integers(0, 10**6), device=devices)
def test_the_energy_of_one_word_is_its_cross_entropy(shape: tuple[int, int], seed: int, device: str):
    """All of the student's mass on a word: -log p(word), whichever operator says so."""
    s = fill(shape, seed, 3.0).to(device)
    words = torch.randint(shape[1], (shape[0],), generator=torch.Generator().manual_seed(seed)).to(device)
    z = torch.nn.functional.one_hot(words, shape[1]).double() * 2000.0
    wanted = torch.nn.functional.cross_entropy(s, words, reduction="none")
    for operator in OPERATORS:
        torch.testing.assert_close(ops.energy(z, s, operator, seed=1), wanted, rtol=1e-12, atol=1e-12)


@modest
@given(shape=shapes, seed=st.integers(0, 10**6), device=devices)
def test_equal_soft_rows_give_the_entropy(shape: tuple[int, int], seed: int, device: str):
    """z = s: the cross-entropy of a distribution with itself, the least over all z, is its entropy."""
    z = fill(shape, seed, 2.0).to(device)
    p = z.softmax(-1)
    torch.testing.assert_close(ops.energy(z, z, "SX"), -(p * p.log()).sum(-1), rtol=1e-11, atol=1e-11)
