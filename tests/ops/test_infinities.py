"""Forbidden words (-inf), NaN and +inf: handled in the row that holds them, unseen by every other row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine_fast import ops
from engine_fast.operators import OPERATORS, gumbel_noise
from tests.ops.cases import CASES, DEVICES, assert_same, draw, ramp, run

INF, NAN = float("inf"), float("nan")
modest = settings(deadline=None, max_examples=80, derandomize=True)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
BLOCK = 2048  # columns that csrc/cpu visits at a time


def forbid(x: Tensor, seed: int, share: float, keep: int) -> Tensor:
    """x with that share of each row at -inf, never column `keep`."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(x.shape, generator=generator) < share
    mask[:, keep] = False
    return x.masked_fill(mask.to(x.device), -INF)


@modest
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 300)),
    seed=st.integers(0, 10**6),
    share=st.sampled_from([0.05, 0.5, 0.95, 1.0]),
    operator=st.sampled_from(list(OPERATORS)),
    device=st.sampled_from(DEVICES),
)
@pytest.mark.parametrize("sides", ["z", "both"])
def test_words_forbidden_by_the_student_or_by_both(
    sides: str, shape: tuple[int, int], seed: int, share: float, operator: str, device: str
):
    """Where z forbids, s may: 0 * inf never appears. Values and gradients are the definition's, and finite."""
    tensors = draw(CASES["energy"], shape, seed=seed, device=device)
    keep = seed % shape[1]
    tensors["z"] = forbid(tensors["z"], seed, share, keep)
    if sides == "both":
        tensors["s"] = tensors["s"].masked_fill(tensors["z"] == -INF, -INF)
    noise = gumbel_noise(shape, seed=seed, device=device)
    wanted = run(ops.reference, CASES["energy"], tensors, operator, noise=noise)
    got = run(ops, CASES["energy"], tensors, operator, noise=noise)
    assert_same(got, wanted, 1e-10)
    assert all(value.isfinite().all() for value in got.values())
    assert (got["z"][tensors["z"] == -INF] == 0.0).all()


@modest
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(2, 300)),
    seed=st.integers(0, 10**6),
    operator=st.sampled_from(["SX", "ST", "STL", "SG", "GX"]),
    device=st.sampled_from(DEVICES),
)
def test_a_soft_embedding_of_allowed_words_only(shape: tuple[int, int], seed: int, operator: str, device: str):
    tensors = draw(CASES["soft_embedding"], shape, seed=seed, device=device)
    tensors["z"] = forbid(tensors["z"], seed, 0.5, seed % shape[1])
    noise = gumbel_noise(shape, seed=seed, device=device)
    wanted = run(ops.reference, CASES["soft_embedding"], tensors, operator, noise=noise)
    got = run(ops, CASES["soft_embedding"], tensors, operator, noise=noise)
    if operator == "STL":  # below
        got["z"] = wanted["z"] = None
    assert_same(got, wanted, 1e-10)
    assert all(value is None or value.isfinite().all() for value in got.values())


def test_the_identity_gives_a_forbidden_word_no_gradient(device: str):
    tensors = draw(CASES["soft_embedding"], (3, 40), device=device)
    tensors["z"] = forbid(tensors["z"], 1, 0.5, 3)
    assert_same(
        run(ops, CASES["soft_embedding"], tensors, "STL"), run(ops.reference, CASES["soft_embedding"], tensors, "STL")
    )


@pytest.mark.parametrize("num_words", [2 * BLOCK, 3 * BLOCK + 5])
@pytest.mark.parametrize("operator", OPERATORS)
def test_whole_blocks_of_columns_may_be_forbidden(operator: str, num_words: int, device: str):
    """A block without a word of its own must not leave NaN behind, wherever it stands."""
    tensors = draw(CASES["energy"], (4, num_words), device=device)
    for row, forbidden in enumerate((slice(0, BLOCK), slice(BLOCK, None), slice(0, num_words - 1), slice(1, None))):
        tensors["z"][row, forbidden] = -INF
        tensors["s"][row, forbidden] = -INF
    noise = gumbel_noise((4, num_words), seed=0, device=device)
    wanted = run(ops.reference, CASES["energy"], tensors, operator, noise=noise)
    assert_same(run(ops, CASES["energy"], tensors, operator, noise=noise), wanted)
    tensors = {"z": tensors["z"], "table": draw(CASES["soft_embedding"], (4, num_words), device=device)["table"]}
    wanted = run(ops.reference, CASES["soft_embedding"], tensors, operator, trained=("table",), noise=noise)
    assert_same(run(ops, CASES["soft_embedding"], tensors, operator, trained=("table",), noise=noise), wanted)


@pytest.mark.parametrize("num_words", [7, BLOCK + 100, 2 * BLOCK])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_word_that_only_the_teacher_forbids_costs_everything(operator: str, num_words: int, device: str):
    """Mass on it has infinite energy, and not NaN; a hard operator pays for the word it chose and for no other."""
    tensors = draw(CASES["energy"], (3, num_words), device=device)
    last = num_words - 1
    tensors["s"][:, :last] = -INF
    tensors["z"][0, 0], tensors["z"][1:, last] = 50.0, 50.0
    tensors["z"][2, :last] = -INF
    energies = ops.energy(**tensors, operator=operator, noise=torch.zeros_like(tensors["z"]))
    assert energies.tolist() == [INF, 0.0 if OPERATORS[operator].hard else INF, 0.0]


@pytest.mark.parametrize("operator", ["STL", "ST"])
def test_the_definition_says_so_too(operator: str):
    z, s = torch.tensor([[5.0, 1.0]]), torch.tensor([[0.0, -INF]])
    assert ops.reference.energy(z, s, operator).item() == 0.0


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("side", ["z", "s"])
def test_nan_in_gives_nan_out_in_that_row_only(side: str, operator: str, dtype: torch.dtype, bad: float, device: str):
    """At the first, the last and an inner column, before and behind a vector's end."""
    num_words = BLOCK + 37
    for column in (0, 5, BLOCK - 1, BLOCK, num_words - 1):
        tensors = draw(CASES["energy"], (3, num_words), dtypes=(dtype, dtype), device=device)
        noise = gumbel_noise((3, num_words), seed=0, device=device)
        clean = run(ops, CASES["energy"], tensors, operator, noise=noise)
        tensors[side][1, column] = bad
        got = run(ops, CASES["energy"], tensors, operator, noise=noise)
        assert got["out0"][1].isnan(), f"energy {got['out0'][1]} at {column}"
        for key, value in clean.items():
            assert torch.equal(got[key][[0, 2]], value[[0, 2]]), f"{key}: another row changed"
        wanted = run(ops.reference, CASES["energy"], tensors, operator, noise=noise)
        assert got["out0"].isnan().tolist() == wanted["out0"].isnan().tolist()
        own = got[side][1]
        if side == "s" or OPERATORS[operator].jacobian == "softmax":
            assert own.isnan().any(), f"d{side} hides it"
        assert wanted[side][1].isnan().any() <= own.isnan().any()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", ["soft_embedding", "linear_soft_embedding"])
def test_nan_in_an_embedding_stays_in_its_row(name: str, operator: str, bad: float, device: str):
    case = CASES[name]
    tensors = draw(case, (3, 200), device=device)
    noise = gumbel_noise((3, 200), seed=0, device=device)
    first = case.inputs[0]
    clean = run(ops, case, tensors, operator, noise=noise)
    tensors[first][1, 3] = bad
    got = run(ops, case, tensors, operator, noise=noise)
    assert got["out0"][1].isnan().all()
    for key in ("out0", first):
        torch.testing.assert_close(got[key][[0, 2]], clean[key][[0, 2]], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("side", ["z", "s"])
@pytest.mark.parametrize("num_words", [1, 17, BLOCK + 5])
def test_a_row_without_an_allowed_word_has_no_energy(
    num_words: int, side: str, operator: str, dtype: torch.dtype, device: str
):
    tensors = draw(CASES["energy"], (3, num_words), dtypes=(dtype, dtype), device=device)
    tensors[side][1] = -INF
    got = run(ops, CASES["energy"], tensors, operator, seed=1)
    assert got["out0"].isnan().tolist() == [False, True, False]
    assert all(value[[0, 2]].isfinite().all() for value in got.values())


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", CASES)
def test_ignored_rows_are_exactly_zero_whatever_they_hold(name: str, operator: str, bad: float, device: str):
    """Padding: its logits may be anything. Shared weights get nothing from it either."""
    case = CASES[name]
    tensors = draw(case, (4, 200), device=device)
    ignore = torch.tensor([False, True, False, True], device=device)
    per_row = [key for key in tensors if key[0] in "zsh"]
    clean = run(ops, case, tensors, operator, seed=1, ignore=ignore)
    logits = [key for key in per_row if key in "zs"]
    for key in logits:
        tensors[key][ignore] = bad
    got = run(ops, case, tensors, operator, seed=1, ignore=ignore)
    for key in ("out0", *per_row):
        value = got[key]
        own = key == "h" and name.endswith("logits")  # the logits themselves are not ignored
        if value is not None and value.ndim and not own:
            assert (value[ignore] == 0.0).all(), key
    assert_same(got, clean, 1e-12)


@pytest.mark.parametrize("operator", OPERATORS)
def test_ignored_rows_of_a_soft_embedding_leave_the_table_alone(operator: str, device: str):
    tensors = draw(CASES["soft_embedding"], (4, 50), device=device)
    ignore = torch.tensor([True, True, True, False], device=device)
    got = run(ops, CASES["soft_embedding"], tensors, operator, seed=1, ignore=ignore)
    noise_free = {"z": tensors["z"][3:], "table": tensors["table"]}
    if not OPERATORS[operator].gumbel:
        leaf = noise_free["table"].detach().requires_grad_()
        x = ops.soft_embedding(noise_free["z"], leaf, operator)
        x.backward(ramp(got["out0"])[3:])
        torch.testing.assert_close(got["table"], leaf.grad, rtol=1e-12, atol=1e-12)
    assert got["table"].abs().sum() > 0
