"""torch.ops.engine_fast called directly, past the facade: bad arguments are refused before a pointer is followed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.ops.cases import raw

Z, S, W, H, TABLE = torch.randn(3, 7), torch.randn(3, 7), torch.randn(7, 4), torch.randn(3, 4), torch.randn(7, 5)
U, X = torch.ones(3), torch.ones(3, 5)
WEIGHTED, OPTIONS = (None, None, None, None, False, False, 1.0), (None, None, None, False, False, 1.0)
STATS, SOFT_STATS = torch.ones(3, 6), torch.ones(3, 3)
HEADS = (H, W, None, H, W, None)


def call(name: str, *arguments: object) -> Callable[[], object]:
    return lambda: raw(name)(*arguments)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "rank": (call("energy", Z[0], S[0], *WEIGHTED, False), r"energy: z = \(7,\)"),
    "shape": (call("energy", Z, S[:2], *WEIGHTED, False), r"energy: s = \(2, 7\), expected the shape of z"),
    "integers": (call("energy", Z.int(), S.int(), *WEIGHTED, False), "energy: z = Int, expected float32"),
    "half on a cpu": (call("energy", Z.half(), S.half(), *WEIGHTED, False), "energy: z = Half"),
    "pair of dtypes": (call("energy", Z, S.double(), *WEIGHTED, False), "energy: s = Double, expected the dtype of z"),
    "no words": (call("energy", Z[:, :0], S[:, :0], *WEIGHTED, False), "energy: V = 0"),
    "vocabulary": (
        call("energy", Z[:, :1].expand(3, 2**24 + 1), Z[:, :1].expand(3, 2**24 + 1), *WEIGHTED, False), "energy: V = ",
    ),
    "noise shape": (call("energy", Z, S, Z[:, :3], *WEIGHTED[1:], False), r"noise = \(3, 3\)"),
    "noise beside seed": (call("energy", Z, S, Z, torch.tensor(1), *WEIGHTED[2:], False), "seed = given beside noise"),
    "seed dtype": (call("energy", Z, S, None, torch.tensor(1.0), *WEIGHTED[2:], False), "seed = Float, expected Long"),
    "weight shape": (call("energy", Z, S, None, None, U[:2], *WEIGHTED[3:], False), r"weight = \(2,\)"),
    "ignore shape": (call("energy", Z, S, None, None, None, U[:2] > 0, *WEIGHTED[4:], False), r"ignore = \(2,\)"),
    "ignore dtype": (call("energy", Z, S, None, None, None, U, *WEIGHTED[4:], False), "ignore = Float, expected bool"),
    "temperature": (call("energy", Z, S, *WEIGHTED[:-1], 0.0, False), "temperature = 0"),
    "soft identity": (call("energy", Z, S, *WEIGHTED[:-2], True, 1.0, False), "identity = true"),
    "gradient shape": (call("energy_backward", U[:2], Z, S, STATS, *WEIGHTED, True, True), r"grad = \(2,\)"),
    "stats shape": (call("energy_backward", U, Z, S, STATS[:, :3], *WEIGHTED, True, True), r"stats = \(3, 3\)"),
    "target shape": (call("energy_backward_", U, Z, S, STATS, *WEIGHTED, Z[:2], None), r"dz = \(2, 7\)"),
    "target dtype": (call("energy_backward_", U, Z, S, STATS, *WEIGHTED, None, S.double()), "ds = "),
    "target stride": (call("energy_backward_", U, Z, S, STATS, *WEIGHTED, torch.ones(7, 3).t(), None), "dz = "),
    "table rows": (call("soft_embedding", Z, TABLE[:5], *OPTIONS), r"table = \(5, 5\)"),
    "table rank": (call("soft_embedding", Z, TABLE[:, 0], *OPTIONS), r"table = \(7,\)"),
    "soft stats": (call("soft_embedding_backward", X, Z, TABLE, STATS, *OPTIONS, True, True), r"stats = \(3, 6\)"),
    "soft gradient": (call("soft_embedding_backward", U, Z, TABLE, SOFT_STATS, *OPTIONS, True, True), "grad = "),
    "head width": (call("linear_energy", H, W[:, :3], None, *HEADS[3:], *WEIGHTED), r"w_student = \(7, 3\)"),
    "head bias": (call("linear_energy", H, W, U, *HEADS[3:], *WEIGHTED), "bias_student = "),
    "teacher rows": (call("linear_energy", *HEADS[:3], H[:2], W, None, *WEIGHTED), "h_teacher = "),
    "teacher words": (call("linear_energy", *HEADS[:3], H, W[:5], None, *WEIGHTED), "w_teacher = "),
    "rankless": (call("linear_energy_sum", torch.tensor(1.0), *HEADS[1:], *WEIGHTED, [True] * 6, False), "h_student"),
    "few needs": (call("linear_energy_gradients", U, *HEADS, *WEIGHTED, [True]), "needs = 1 flags, expected 6"),
    "few needs of a sum": (call("linear_energy_sum", *HEADS, *WEIGHTED, [True] * 7, False), "needs = 7 flags"),
    "few needs of an embedding": (
        call("linear_soft_embedding_backward", X, None, H, W, None, TABLE, None, *OPTIONS, [True]),
        "needs = 1 flags",
    ),
    "logits of the teacher's energy": (call("teacher_energy", Z[:2], *HEADS[3:], *WEIGHTED, True, True, False), "z = "),
    "gradient of the logits": (
        call("linear_soft_embedding_backward", X, Z[:2], H, W, None, TABLE, None, *OPTIONS, [True] * 4), "grad_z = ",
    ),
    "kept logits": (
        call("linear_soft_embedding_backward", X, None, H, W, None, TABLE, Z[:2], *OPTIONS, [True] * 4),
        r"z = \(2, 7\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_a_name(what: str):
    function, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        function()


def test_an_argmax_beyond_the_row_is_the_first_word():
    stats = STATS.clone()
    stats[:, 2] = 0
    hard = (None, None, None, None, True, False, 1.0, True, True)
    first = raw("energy_backward")(U, Z, S, stats, *hard)
    for index in (7.0, 1e9, -1.0, float("nan")):
        stats[:, 2] = index
        for got, expected in zip(raw("energy_backward")(U, Z, S, stats, *hard), first, strict=True):
            assert torch.equal(got, expected)


# What today reads or writes beyond a buffer runs in a process of its own.
UNSAFE = {
    "statistics of another dtype": "o.energy_backward(U, Z.double(), S.double(), STATS, *WEIGHTED, True, True)",
    "soft statistics of another dtype": (
        "o.soft_embedding_backward(X.double(), Z.double(), TABLE.double(), SOFT_STATS, *OPTIONS, True, True)"
    ),
    "a gradient of the logits of another dtype": (
        "o.linear_soft_embedding_backward(X.double(), Z, H.double(), W.double(), None, TABLE.double(),"
        " None, *OPTIONS,"
        " [True] * 4)"
    ),
    "logits kept in another dtype": (
        "o.linear_soft_embedding_backward(X.double(), None, H.double(), W.double(), None, TABLE.double(),"
        " Z, *OPTIONS,"
        " [True] * 4)"
    ),
    "targets that overlap": "o.energy_backward_(U, Z, S, STATS, *WEIGHTED, Z[:1].expand(3, 7), None)",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", UNSAFE)
def test_refused_before_memory_is_touched(what: str, root: Path):
    script = f"""
        from tests.ops.test_raw_operators import *
        import engine_fast.ops
        o = torch.ops.engine_fast
        try:
            {UNSAFE[what]}
        except ValueError as error:
            print("refused:", error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "refused:" in done.stdout
