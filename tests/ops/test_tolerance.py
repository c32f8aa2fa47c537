"""float32 and the half precisions, alone and mixed: no further from the truth than STYLE.md 12 lets them be."""

from __future__ import annotations

import itertools

import pytest
import torch

from engine_fast import ops
from engine_fast.operators import OPERATORS
from tests.ops.cases import (
    CASES,
    DEVICES,
    assert_as_good_as_plain,
    clear_noise,
    draw,
    errors,
    kernel_noise,
    row_options,
    run,
)

SHAPES = [(1, 1), (3, 7), (4, 15), (4, 17), (41, 1271), (2, 32000)]
_32, _B16, _F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {"cpu": [(_32, _32), (_B16, _B16), (_32, _B16), (_B16, _32)]}
DTYPES["cuda"] = [*DTYPES["cpu"], (_F16, _F16), (_32, _F16), (_F16, _32)]
KINDS = [
    pytest.param(device, dtypes, id=f"{device}-" + "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes))
    for device in DEVICES
    for dtypes in DTYPES[device]
]


@pytest.mark.parametrize(("device", "dtypes"), KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_no_worse_than_twice_plain_torch(
    name: str, shape: tuple[int, int], device: str, dtypes: tuple[torch.dtype, torch.dtype]
):
    case = CASES[name]
    options = row_options(case, shape[0], device)
    found = []
    draws = 1 if shape[1] > 1000 else 4
    for operator, seed in itertools.product(OPERATORS, range(draws)):
        tensors = draw(case, shape, dtypes=dtypes, device=device, seed=seed)
        found.append(errors(case, tensors, operator, noise=clear_noise(tensors), temperature=0.7, **options))
    assert_as_good_as_plain(found)


@pytest.mark.parametrize(("device", "dtypes"), KINDS)
@pytest.mark.parametrize("name", CASES)
def test_noise_from_a_seed_is_as_good_as_noise_given(name: str, device: str, dtypes: tuple[torch.dtype, torch.dtype]):
    """Each dtype makes the same noise: that of a float64 kernel, given, is an equal."""
    case = CASES[name]
    tensors = draw(case, (41, 1271), dtypes=dtypes, device=device)
    noise = kernel_noise((41, 1271), -7, device).float()
    given = run(ops, case, tensors, "GX", noise=noise)
    made = run(ops, case, tensors, "GX", seed=-7)
    for key, value in given.items():
        if value is not None:
            assert torch.equal(value, made[key]), key


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_bfloat16_energies_are_summed_in_float32(scale: float, device: str):
    """The definition in float64 of the same rounded logits, to float32's precision: nothing is rounded on the way."""
    generator = torch.Generator().manual_seed(0)
    z, s = (scale * torch.randn(8, 4096, generator=generator) for _ in range(2))
    z, s = z.bfloat16().to(device), s.bfloat16().to(device)
    got = ops.energy(z, s, "SX")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), ops.reference.energy(z.double(), s.double(), "SX"), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_have_the_dtypes_of_their_inputs(device: str):
    for name, case in CASES.items():
        tensors = draw(case, (3, 7), dtypes=(_32, _B16), device=device)
        for input, gradient in run(ops, case, tensors, "SX").items():
            if input in case.trained:
                assert gradient.dtype == tensors[input].dtype, (name, input)


@pytest.mark.parametrize("device", DEVICES)
def test_a_long_sum_over_rows_is_rounded_once(device: str):
    """dW, db and dtable in bfloat16 over 3000 rows: a bfloat16 running sum would lose most of its small terms."""
    for name in ("linear_energy", "linear_energy_sum", "linear_soft_embedding", "soft_embedding"):
        draws = [draw(CASES[name], (3000, 33), dtypes=(_B16, _B16), device=device, seed=seed) for seed in range(8)]
        assert_as_good_as_plain([errors(CASES[name], tensors, "SX") for tensors in draws])
