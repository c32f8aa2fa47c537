"""The linear forms over several tiles of rows (csrc/aten/rows.cpp): as if there were one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine_fast import ops
from tests.ops.cases import CASES, assert_as_good_as_plain, assert_same, draw, errors, ramp, row_options, run

# In float64 128 MiB are 128 rows of two sides' logits: three tiles of 96, 96 and 65 rows. On a GPU there are more.
SHAPE = (257, 2**16)


def composed(name: str, tensors: dict[str, Tensor], operator: str, **options: Any) -> dict[str, Tensor | None]:
    """The same out of F.linear and the operators on whole logits, which know no tiles of rows."""
    leaves = {key: tensor.detach().requires_grad_() for key, tensor in tensors.items()}
    if CASES[name].function == "linear_energy":
        z = F.linear(leaves["h_student"], leaves["w_student"], leaves["bias_student"])
        s = F.linear(leaves["h_teacher"], leaves["w_teacher"], leaves["bias_teacher"])
        e = ops.energy(z, s, operator, **options)
        outputs = [e.sum() if name.endswith("sum") else e]
    else:
        z = F.linear(leaves["h"], leaves["w_student"], leaves["bias_student"])
        outputs = [ops.soft_embedding(z, leaves["table"], operator, **options), z]
        outputs = outputs if name.endswith("logits") else outputs[:1]
    torch.autograd.backward(outputs, [ramp(output) for output in outputs])
    result: dict[str, Tensor | None] = {f"out{index}": output.detach() for index, output in enumerate(outputs)}
    return {**result, **{key: leaf.grad for key, leaf in leaves.items()}}


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("linear_energy", "GX"),
        ("linear_energy_sum", "SG"),
        ("linear_soft_embedding", "GX"),
        ("linear_soft_embedding_and_logits", "SG"),
    ],
)
def test_several_tiles_are_one(name: str, operator: str, device: str):
    """Noise belongs to the row and not to the tile; weights, ignored rows and gradients find their tile."""
    case = CASES[name]
    tensors = draw(case, SHAPE, device=device)
    options = {"seed": 21, "temperature": 0.9, **row_options(case, SHAPE[0], device)}
    assert_same(run(ops, case, tensors, operator, **options), composed(name, tensors, operator, **options))


def test_explicit_noise_is_cut_by_tile(device: str):
    case = CASES["linear_energy"]
    tensors = draw(case, SHAPE, device=device)
    noise = torch.rand(SHAPE[0], 1, device=device) * torch.linspace(-2, 2, SHAPE[1], device=device)
    with torch.no_grad():
        got = ops.linear_energy(**tensors, operator="GX", noise=noise)
        z = F.linear(tensors["h_student"], tensors["w_student"], tensors["bias_student"])
        s = F.linear(tensors["h_teacher"], tensors["w_teacher"], tensors["bias_teacher"])
        torch.testing.assert_close(got, ops.energy(z, s, "GX", noise=noise), rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", ["linear_energy", "linear_energy_sum", "linear_soft_embedding"])
def test_tiles_in_half_precision_are_added_up_wide(name: str, dtypes: tuple[torch.dtype, torch.dtype], device: str):
    tensors = draw(CASES[name], (1100, 2**16), dtypes=dtypes, device=device)
    # The gradients of "sum" are rounded when they are made and again when they are scaled by the upstream one.
    factor = 2.5 if name == "linear_energy_sum" else 2.0
    assert_as_good_as_plain([errors(CASES[name], tensors, "ST", temperature=0.9)], factor)
