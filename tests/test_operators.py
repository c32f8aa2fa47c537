import pytest
import torch

from engine_fast.errors import ConfigError
from engine_fast.operators import OPERATORS, get_operator, gumbel_noise


def test_the_table_has_five_rows_under_their_own_names():
    assert list(OPERATORS) == ["SX", "STL", "SG", "ST", "GX"]
    assert all(name == operator.name for name, operator in OPERATORS.items())


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'STX', expected one of SX, STL, SG, ST, GX. Did you mean 'S"):
        get_operator("STX")


def test_gumbel_noise_has_the_moments_of_the_gumbel_distribution():
    noise = gumbel_noise((200, 1000), seed=3)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert noise.var().item() == pytest.approx(torch.pi**2 / 6, rel=0.03)
    assert noise.isfinite().all()


def test_gumbel_noise_follows_its_seed():
    draws = [gumbel_noise((3, 5), seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
