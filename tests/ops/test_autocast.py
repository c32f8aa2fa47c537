"""Under autocast the heads and the table are rounded, as torch's own products round; logits that exist are not."""

from __future__ import annotations

import pytest
import torch

from engine_fast import ops
from tests.ops.cases import CASES, draw, ramp

BF16 = torch.bfloat16


def leaves(name: str, shape: tuple[int, int], device: str) -> dict[str, torch.Tensor]:
    case = CASES[name]
    drawn = draw(case, shape, dtypes=(torch.float32, torch.float32), device=device)
    return {key: tensor.requires_grad_(key in case.trained) for key, tensor in drawn.items()}


@pytest.mark.parametrize("operator", ["SX", "ST", "STL"])
def test_o1_chooses_the_words_of_the_logits_as_they_came(operator: str, device: str):
    """Rounded to bfloat16, many of these would tie."""
    z = 1.0 + 1e-4 * torch.randn(64, 500, device=device)
    table = torch.randn(500, 7, device=device)
    with torch.autocast(torch.device(device).type, dtype=BF16):
        got, wanted = (module.soft_embedding(z, table, operator) for module in (ops, ops.reference))
    assert got.dtype == wanted.dtype == BF16
    torch.testing.assert_close(got.float(), wanted.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", [(5, 19), (300, 65536)], ids=["one tile", "several"])
@pytest.mark.parametrize("name", ["linear_energy", "linear_soft_embedding"])
def test_a_backward_pass_inside_autocast_computes_what_the_forward_pass_began(
    name: str, shape: tuple[int, int], device: str
):
    gradients = []
    for inside in (False, True):
        given = leaves(name, shape, device)
        returned = getattr(ops, CASES[name].function)(**given, operator="SX", **CASES[name].fixed)
        with torch.autocast(torch.device(device).type, dtype=BF16, enabled=inside):
            returned.backward(ramp(returned))
        gradients.append([leaf.grad for leaf in given.values() if leaf.grad is not None])
    for outer, inner in zip(*gradients, strict=True):
        torch.testing.assert_close(inner, outer, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["teacher_energy", "linear_energy_sum"])
def test_gradients_of_many_upstreams_at_once(name: str, device: str):
    """Vectorised: nothing may be overwritten for the first of them."""
    case, given = CASES[name], leaves(name, (4, 9), device)
    value = getattr(ops, case.function)(**given, operator="SX", **case.fixed)
    upstreams = torch.stack([torch.full_like(value, factor) for factor in (1.0, -2.0, 0.5)])
    trained = [given[key] for key in case.trained]
    together = torch.autograd.grad(value, trained, upstreams, is_grads_batched=True, retain_graph=True)
    for i, upstream in enumerate(upstreams):
        alone = torch.autograd.grad(value, trained, upstream, retain_graph=True)
        for one, all_ in zip(alone, together, strict=True):
            torch.testing.assert_close(all_[i], one)


@pytest.mark.parametrize("operator", ["SX", "ST"])
def test_an_ignored_rows_upstream_never_reaches_the_table(operator: str, device: str):
    given = leaves("soft_embedding", (5, 19), device)
    ignore = torch.tensor([True, False, False, False, False], device=device)
    x = ops.soft_embedding(**given, operator=operator, ignore=ignore)
    upstream = ramp(x)
    upstream[0] = float("inf")
    x.backward(upstream)
    assert all(leaf.grad.isfinite().all() for leaf in given.values() if leaf.grad is not None)
