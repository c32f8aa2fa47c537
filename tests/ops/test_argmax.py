"""linear_argmax: the definition, whatever the tiles, and only one tile of logits in memory."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from engine_fast import ops
from engine_fast.errors import ConfigError
from tests.ops.cases import raw
from tests.ops.test_memory import MIB, peak_bytes

SHAPES = [(0, 5), (1, 1), (3, 7), (4, 15), (4, 17), (41, 1271), (5, 2049), (2, 32000)]
WIDTH = 6


def draw(
    shape: tuple[int, int], dtype: torch.dtype = torch.float64, device: str = "cpu", bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(shape[0] + shape[1])
    num_rows, num_words = shape
    h, w, b = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in
               ((num_rows, WIDTH), (num_words, WIDTH), (num_words,)))  # fmt: skip
    return 2 * h.to(device, dtype), w.to(device, dtype), b.to(device, dtype) if bias else None


def some_of(num_words: int) -> list[Sequence[int]]:
    """Nothing; two runs out of order with one word twice; the first and the last."""
    return [(), (4, 0, 1, 2, 1), (num_words - 1, 0)] if num_words > 5 else [()]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_definition(shape: tuple[int, int], bias: bool, device: str):
    given = draw(shape, device=device, bias=bias)
    for forbidden in some_of(shape[1]):
        value, word = ops.linear_argmax(*given, forbidden=forbidden)
        wanted, wanted_word = ops.reference.linear_argmax(*given, forbidden=forbidden)
        assert word.dtype == torch.int64
        assert torch.equal(word, wanted_word)
        assert not set(word.tolist()) & set(forbidden)
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_good_as_plain_torch(shape: tuple[int, int], dtype: torch.dtype, device: str):
    given = draw(shape, dtype, device)
    for forbidden in some_of(shape[1]):
        value, word = ops.linear_argmax(*given, forbidden=forbidden)
        plain, plain_word = ops.reference.linear_argmax(*given, forbidden=forbidden)
        truth, _ = ops.reference.linear_argmax(*(x.double() for x in given), forbidden=forbidden)
        assert value.dtype == torch.float32
        assert torch.equal(word, plain_word)  # of the same rounded logits
        if shape[0]:
            allowed = 2 * (plain - truth).abs().max() + 1e-6 * truth.abs().max().clamp_min(1)
            assert (value - truth).abs().max() <= allowed


def test_the_probabilities_are_the_models_own(device: str):
    """All words but one forbidden: the value stays that word's probability among all."""
    h, w, _ = draw((7, 11), device=device)
    value, word = ops.linear_argmax(h, w, forbidden=[i for i in range(11) if i != 3])
    assert word.tolist() == [3] * 7
    torch.testing.assert_close(value, (h @ w.T).log_softmax(-1)[:, 3], rtol=1e-12, atol=1e-12)


def test_a_forbidden_word_may_hold_nearly_everything(device: str):
    """exp(1000) is no float, its logarithm is."""
    h, w = torch.ones(1, 1, device=device), torch.tensor([[1000.0], [0.0], [1.0]], device=device)
    value, word = ops.linear_argmax(h, w, forbidden=[0])
    assert (value.item(), word.item()) == (-999.0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_lowest_among_equals(dtype: torch.dtype, device: str):
    w = torch.zeros(5000, 1, device=device, dtype=dtype)
    w[[17, 2040, 2048, 4999]] = 2.0
    h = torch.ones(3, 1, device=device, dtype=dtype)
    assert ops.linear_argmax(h, w)[1].tolist() == [17] * 3
    assert ops.linear_argmax(h, w, forbidden=[17])[1].tolist() == [2040] * 3
    assert ops.linear_argmax(h, w, forbidden=[17, 2040])[1].tolist() == [2048] * 3
    assert ops.linear_argmax(0 * h, w)[1].tolist() == [0] * 3


def test_rows_that_mean_nothing(device: str):
    w = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], device=device)
    h = torch.tensor([[float("nan"), 0.0], [float("inf"), 1.0], [1.0, 2.0]], device=device)
    for module in (ops, ops.reference):
        value, word = module.linear_argmax(h, w)
        assert value.isnan().tolist() == [True, True, False], module
        assert word[2].item() == 2
        assert ((word >= 0) & (word < 3)).all()
        nothing, anything = module.linear_argmax(h[2:], w, forbidden=[0, 1, 2])
        assert nothing.tolist() == [float("-inf")]
        assert 0 <= anything.item() < 3


def test_several_tiles_are_one(device: str):
    """16 MiB are 32 rows of this vocabulary: four tiles."""
    h, w, b = draw((101, 2**16), device=device)
    value, word = ops.linear_argmax(h, w, b, forbidden=[0, 1, 2, 4])
    wanted, wanted_word = ops.reference.linear_argmax(h, w, b, forbidden=[0, 1, 2, 4])
    assert torch.equal(word, wanted_word)
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)


def test_no_table_of_logits_is_allocated(device: str):
    """256 MiB of logits and as many of log-probabilities; the peak is one tile."""
    h, w, b = draw((2048, 2**15), torch.float32, device)
    peak = peak_bytes(lambda: ops.linear_argmax(h, w, b, forbidden=[0, 1, 2, 4]), device)
    assert 8 * MIB <= peak <= 24 * MIB, f"{peak / MIB:.0f} MiB"
    assert peak_bytes(lambda: ops.reference.linear_argmax(h, w, b), device) > 400 * MIB


def test_gives_no_gradient_and_says_so(device: str):
    h, w, _ = draw((3, 7), device=device)
    for module in (ops, ops.reference):
        value, word = module.linear_argmax(h.requires_grad_(), w.requires_grad_())
        assert not value.requires_grad
        assert not word.requires_grad


def test_compiles(device: str):
    h, w, b = draw((4, 17), torch.float32, device)
    compiled = torch.compile(lambda h, w, b: ops.linear_argmax(h + 1, w, b, forbidden=[1])[0].exp(), fullgraph=True)
    torch.testing.assert_close(compiled(h, w, b), ops.linear_argmax(h + 1, w, b, forbidden=[1])[0].exp())


def test_autocast_rounds_as_torch_does(device: str):
    h, w, b = draw((5, 31), torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        value, word = ops.linear_argmax(h, w, b)
    wanted, wanted_word = ops.linear_argmax(h.bfloat16(), w.bfloat16(), b.bfloat16())
    assert torch.equal(word, wanted_word)
    assert torch.equal(value, wanted)


def test_wrong_arguments_are_named():
    h, w, b = draw((3, 7), torch.float32)
    wrong = [
        ((h[0], w, b), {}, "linear_argmax: h"),
        ((h, w[:, 1:], b), {}, "linear_argmax: h"),
        ((h, w.double(), b), {}, "weight is torch.float64"),
        ((h, w, b[1:]), {}, "bias"),
        ((h, w, b), {"forbidden": [7]}, "forbidden holds 7, expected ids from 0 to 6"),
        ((h, w, b), {"forbidden": [-1]}, "forbidden holds -1"),
        ((h, w[:0], None), {}, "V = 0"),
        ((h, torch.empty(0), None), {}, "sharded by ZeRO-3"),
    ]
    for given, options, message in wrong:
        for module in (ops, ops.reference):
            with pytest.raises(ConfigError, match=message):
                module.linear_argmax(*given, **options)


def test_the_raw_operator_checks_what_its_safety_needs():
    h, w, b = draw((3, 7), torch.float32)
    wrong = [
        ((h, w[:, 1:], b, []), "w = "),
        ((h, w, b[1:], []), "bias = "),
        ((h, w.double(), b, []), "w = Double"),
        ((h, w, b, [7]), "forbidden = 7, expected words from 0 to 6"),
        ((h, w, b, [0, -2]), "forbidden = -2"),
    ]
    for given, message in wrong:
        with pytest.raises((ValueError, RuntimeError), match=message):
            raw("linear_argmax")(*given)
