"""overwrite=True: gradients where the logits stood, where nobody reads those again; and never other numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine_fast import ops
from engine_fast.operators import OPERATORS
from tests.ops.cases import CASES, clear_noise, draw, ramp, row_options

N, V = 9, 70
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


def prepared(device: str, dtypes: tuple[torch.dtype, torch.dtype] = DTYPES[0]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits that are no leaves, in storage of their own, and every option."""
    z, s = draw(CASES["energy"], (N, V), dtypes=dtypes, device=device).values()
    options = {"noise": clear_noise({"z": z}), "temperature": 0.7, **row_options(CASES["energy"], N, device)}
    return z.requires_grad_() * 1.0, s.requires_grad_() * 1.0, options


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("frozen", ["neither", "z", "s"])
def test_the_same_numbers_in_the_logits_own_storage(
    frozen: str, operator: str, dtypes: tuple[torch.dtype, torch.dtype], device: str
):
    gradients = []
    for overwrite in (False, True):
        z, s, options = prepared(device, dtypes)
        given = {"z": z.detach() if frozen == "z" else z, "s": s.detach() if frozen == "s" else s}
        before = {key: tensor.detach().clone() for key, tensor in given.items()}
        trained = [key for key in given if key != frozen]
        e = ops.energy(**given, operator=operator, overwrite=overwrite, **options)
        got = torch.autograd.grad(e, [given[key] for key in trained], ramp(e))
        for key, gradient in zip(trained, got, strict=True):
            assert (gradient.data_ptr() == given[key].data_ptr()) == overwrite
        for key, tensor in given.items():
            if key == frozen or not overwrite:
                assert torch.equal(tensor, before[key]), "what is frozen, or not to be overwritten, was written to"
        gradients.append(got)
    for fresh, reused in zip(*gradients, strict=True):
        assert torch.equal(fresh, reused)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_graph_that_is_retained_keeps_its_logits(operator: str, device: str):
    z, s, options = prepared(device)
    before = z.detach().clone(), s.detach().clone()
    e = ops.energy(z, s, operator, overwrite=True, **options)
    first = torch.autograd.grad(e, (z, s), ramp(e), retain_graph=True)
    assert torch.equal(z, before[0])
    assert torch.equal(s, before[1])
    second = torch.autograd.grad(e, (z, s), ramp(e))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert second[0].data_ptr() == z.data_ptr()


@pytest.mark.parametrize("name", ["teacher_energy", "linear_energy_sum", "linear_soft_embedding_and_logits"])
def test_what_was_made_ahead_survives_a_retained_graph(name: str, device: str):
    """These reuse their own buffers in a last backward pass, and only there."""
    case = CASES[name]
    leaves = {key: t.requires_grad_(key in case.trained) for key, t in draw(case, (N, V), device=device).items()}
    returned = getattr(ops, case.function)(**leaves, **case.fixed)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    upstream = [3.0 * ramp(output) for output in outputs]
    trained = [leaves[key] for key in case.trained if key != "table"]

    def gradients(keep: bool) -> list[Tensor]:
        """Copies: a buffer that was handed out must not change with a later pass."""
        return [g.clone() for g in torch.autograd.grad(outputs, trained, upstream, retain_graph=keep)]

    passes = [gradients(keep) for keep in (True, True, False)]
    for first, second, third in zip(*passes, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, third, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operator", ["SX", "STL", "ST"])
def test_through_the_heads_that_made_the_logits(operator: str, device: str):
    """F.linear saves its inputs and not its outputs, so its gradients do not see what became of the logits."""
    gradients = []
    for overwrite in (False, True):
        generator = torch.Generator().manual_seed(1)
        leaves = [torch.randn(size, 6, generator=generator).to(device).requires_grad_() for size in (N, V, N, V)]
        z, s = F.linear(leaves[0], leaves[1]), F.linear(leaves[2], leaves[3])
        e = ops.energy(z, s, operator, overwrite=overwrite)
        e.backward(ramp(e))
        gradients.append([leaf.grad for leaf in leaves])
    for fresh, reused in zip(*gradients, strict=True):
        assert torch.equal(fresh, reused)


STRIDED = {
    "expanded rows": lambda x: x[:1].expand(N, V),
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "rows with a gap": lambda x: torch.cat([x, x], 1)[:, :V],
    "overlapping rows": lambda x: x.flatten().as_strided((N, V), (3, 1)),
}


@pytest.mark.parametrize("side", ["z", "s"])
@pytest.mark.parametrize("layout", STRIDED)
def test_logits_of_any_layout(layout: str, side: str, device: str):
    """Where the storage cannot take a gradient (elements shared or apart) a fresh tensor has to."""
    gradients = []
    for overwrite in (False, True):
        leaves = {key: t.requires_grad_() for key, t in draw(CASES["energy"], (N, V), device=device).items()}
        logits = {key: 1.0 * t for key, t in leaves.items()}
        logits[side] = STRIDED[layout](logits[side])
        e = ops.energy(**logits, operator="SX", overwrite=overwrite)
        e.backward(ramp(e))
        gradients.append([leaf.grad for leaf in leaves.values()])
    for fresh, reused in zip(*gradients, strict=True):
        torch.testing.assert_close(reused, fresh, rtol=1e-12, atol=1e-12)


def test_one_tensor_on_both_sides(device: str):
    """The student scored by itself: dz and ds cannot both stand in its place."""
    gradients = []
    for overwrite in (False, True):
        leaf = draw(CASES["energy"], (N, V), device=device)["z"].requires_grad_()
        logits = 1.0 * leaf
        e = ops.energy(logits, logits, "SX", overwrite=overwrite)
        e.backward(ramp(e))
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


def test_another_reader_of_the_logits_is_not_served_wrong_numbers(device: str):
    """Documented as a mistake; torch's version counter must turn it into an error rather than a wrong gradient."""
    z, s, options = prepared(device)
    penalty = (z**2).sum()  # saves z
    e = ops.energy(z, s, "SX", overwrite=True, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (e.sum() + penalty).backward()
