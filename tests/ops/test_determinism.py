"""The same call gives the same bits; on another number of threads too, as far as torch's own products do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine_fast import ops
from engine_fast.operators import OPERATORS
from tests.ops.cases import CASES, assert_identical, assert_same, draw, row_options, run

N, V = 50, 2101  # several rows for each of two threads, several blocks of columns
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def _restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_restored_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", CASES)
def test_bitwise_equal_again(name: str, operator: str, dtype: torch.dtype, device: str):
    case = CASES[name]
    tensors = draw(case, (N, V), dtypes=(dtype, dtype), device=device)
    options = {"seed": 9, **row_options(case, N, device)}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.get_num_threads() == threads
        first = run(ops, case, tensors, operator, **options)
        for _ in range(2):
            assert_identical(run(ops, case, tensors, operator, **options), first)


@pytest.mark.usefixtures("_restored_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_energy_does_not_depend_on_the_number_of_threads(operator: str, dtype: torch.dtype, device: str):
    tensors = draw(CASES["energy"], (N, V), dtypes=(dtype, dtype), device=device)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(ops, CASES["energy"], tensors, operator, seed=9))
    assert_identical(results[1], results[0])


@pytest.mark.usefixtures("_restored_threads")
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", CASES)
def test_matrix_products_differ_between_threads_by_rounding_at_most(name: str, operator: str, device: str):
    """torch's own products split their sums by the number of threads; float64 tells rounding from a race."""
    tensors = draw(CASES[name], (N, V), device=device)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(ops, CASES[name], tensors, operator, seed=9, **row_options(CASES[name], N, device)))
    assert_same(results[1], results[0], 1e-13)


@pytest.mark.usefixtures("_restored_threads")
def test_an_index_that_many_rows_share_is_added_up_in_one_order(device: str):
    """dtable of a hard operator: every row looks the same word up."""
    z = torch.zeros(4000, 11, device=device)
    z[:, 5] = 1.0
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(4000, 16, generator=generator).to(device)
    gradients = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        table = torch.randn(11, 16, generator=generator.manual_seed(1)).to(device).requires_grad_()
        ops.soft_embedding(z, table, "ST").backward(upstream)
        gradients.append(table.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
    assert gradients[0][4].abs().max() == 0.0
