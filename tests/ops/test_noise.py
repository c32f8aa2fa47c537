"""Gumbel noise: made in the kernels from a key and a position, equal to its definition, made again in the backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine_fast import ops
from engine_fast.operators import gumbel_noise
from tests.ops.cases import CASES, assert_same, draw, kernel_noise, run

SEEDS = [0, 1, -1, 2**31, -(2**63), 2**63 - 1, 0x0123456789ABCDEF]
WITHIN = 4 * 2.0**-23  # of the larger of 1 and |g|: two logarithms of 2 ulp each


def philox(key: int, counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x32-10 in Python's integers, written from Salmon et al. and not from the code under test."""
    x, k = list(counter), [key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        first, second = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(second >> 32) ^ x[1] ^ k[0], second & 0xFFFFFFFF, (first >> 32) ^ x[3] ^ k[1], first & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return x


def test_philox_of_this_test_gives_the_published_answers():
    """kat_vectors of Random123, the authors' own library."""
    assert philox(0, (0, 0, 0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert philox(2**64 - 1, (ones,) * 4) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox(0x299F31D0A4093822, pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def expected(seed: int, row: int, column: int) -> float:
    word = philox(seed % 2**64, (column // 4, row % 2**32, row >> 32, 0))[column % 4]
    return -np.log(-np.log(((word >> 9) + 0.5) / 2**23))


def assert_close_to_definition(noise: torch.Tensor, wanted: torch.Tensor) -> None:
    error = (noise.double() - wanted.double()).abs() / wanted.double().abs().clamp_min(1.0)
    assert error.max() <= WITHIN, f"{error.max():.2e}"


@pytest.mark.parametrize("seed", SEEDS)
def test_definition_and_kernel_are_philox_of_the_position(seed: int, device: str):
    shape = (3, 11)
    wanted = torch.tensor([[expected(seed, row, column) for column in range(11)] for row in range(3)], device=device)
    assert torch.equal(gumbel_noise(shape, seed=seed, device=device), wanted.float())
    assert_close_to_definition(kernel_noise(shape, seed, device), wanted)


def test_known_answers(device: str):
    """Of the published vector for key 0 and counter 0; may never change, or saved runs cannot be repeated."""
    constants = torch.tensor([[0.0848202781, 2.06166096, 1.18118308, 0.689691621]], device=device)
    assert_close_to_definition(kernel_noise((1, 4), 0, device), constants)
    torch.testing.assert_close(gumbel_noise((1, 4), seed=0, device=device), constants, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4097), (41, 1271), (5, 63), (5, 65)])
def test_kernel_noise_is_the_definition_at_any_size(shape: tuple[int, int], device: str):
    noise = kernel_noise(shape, 5, device)
    assert_close_to_definition(noise, gumbel_noise(shape, seed=5, device=device))
    assert torch.allclose(noise, noise.float().double(), rtol=1e-9, atol=1e-9), "float32 bits, whatever the logits"


def test_moments_and_tails(device: str):
    noise = kernel_noise((64, 4096), 3, device)
    count = noise.numel()
    assert abs(noise.mean().item() - 0.57721566) < 5 * (torch.pi / 6**0.5) / count**0.5
    assert noise.var().item() == pytest.approx(torch.pi**2 / 6, rel=0.02)
    for quantile in (0.01, 0.5, 0.99):
        level = -np.log(-np.log(quantile))
        assert (noise < level).double().mean().item() == pytest.approx(quantile, abs=5 * 0.5 / count**0.5)
    rows, columns = noise[1:] - noise.mean(), noise[:, 1:] - noise.mean()
    assert abs((rows * (noise[:-1] - noise.mean())).mean()) < 0.02, "neighbouring rows are alike"
    assert abs((columns * (noise[:, :-1] - noise.mean())).mean()) < 0.02, "neighbouring columns are alike"


def test_seeds_differ_and_may_be_tensors(device: str):
    z = torch.zeros(3, 50, device=device)
    energies = [ops.energy(z, z + torch.arange(50.0, device=device), "GX", seed=seed) for seed in SEEDS]
    for index, one in enumerate(energies):
        assert torch.equal(one, ops.energy(z, z + torch.arange(50.0, device=device), "GX", seed=SEEDS[index]))
        assert not any(torch.equal(one, other) for other in energies[index + 1 :])
    for form in (torch.tensor(7, device=device), torch.tensor([7], device=device), torch.tensor([[7]])):
        assert torch.equal(ops.energy(z, z, "GX", seed=form), ops.energy(z, z, "GX", seed=7))


@pytest.mark.parametrize("operator", ["SX", "ST", "STL"])
@pytest.mark.parametrize("name", CASES)
def test_an_operator_without_noise_ignores_it(name: str, operator: str, device: str):
    case = CASES[name]
    tensors = draw(case, (3, 17), device=device)
    bare = run(ops, case, tensors, operator)
    assert_same(run(ops, case, tensors, operator, seed=3), bare, 0.0)
    assert_same(run(ops, case, tensors, operator, noise=torch.full((3, 17), torch.nan, device=device)), bare, 0.0)


@pytest.mark.parametrize("name", CASES)
def test_manual_seed_reproduces_a_drawn_key(name: str, device: str):
    case = CASES[name]
    tensors = draw(case, (3, 17), device=device)
    results = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        results.append(run(ops, case, tensors, "GX"))
    assert torch.equal(results[0]["out0"], results[1]["out0"])
    assert not torch.equal(results[0]["out0"], results[2]["out0"])
    again = run(ops, case, tensors, "GX")
    assert not torch.equal(results[2]["out0"], again["out0"]), "two draws of one run are the same"


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_make_the_same_noise(name: str, device: str):
    """Against explicit noise that both certainly share, bit by bit."""
    case = CASES[name]
    for dtype in (torch.float32, torch.bfloat16):
        tensors = draw(case, (6, 4100), dtypes=(dtype, dtype), device=device)
        noise = kernel_noise((6, 4100), 11, device).float()
        for operator in ("SG", "GX"):
            given, made = (run(ops, case, tensors, operator, **o) for o in ({"noise": noise}, {"seed": 11}))
            for key, value in given.items():
                assert value is None or torch.equal(value, made[key]), (key, operator, dtype)
