"""The five relaxation operators of ENGINE (paper, Table 1), as data.

z are the student's logits of one position, g = -log(-log u) Gumbel noise with u uniform on (0, 1):

    name   forward O(z)                  Jacobian used in the backward pass
    SX     softmax(z)                    exact
    STL    onehot(argmax z)              identity
    SG     onehot(argmax softmax(z+g))   of softmax(z+g)
    ST     onehot(argmax softmax(z))     of softmax(z)
    GX     softmax(z+g)                  exact

With a temperature t, (z+g)/t replaces z+g; STL has no softmax and ignores it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine_fast.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Operator:
    """One row of the table above."""

    name: str
    hard: bool
    """The forward value is the one-hot argmax rather than the softmax."""
    gumbel: bool
    """z is perturbed by Gumbel noise before both forward and backward."""
    jacobian: Literal["softmax", "identity"]
    """What the backward pass differentiates."""


OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        Operator("SX", hard=False, gumbel=False, jacobian="softmax"),
        Operator("STL", hard=True, gumbel=False, jacobian="identity"),
        Operator("SG", hard=True, gumbel=True, jacobian="softmax"),
        Operator("ST", hard=True, gumbel=False, jacobian="softmax"),
        Operator("GX", hard=False, gumbel=True, jacobian="softmax"),
    )
}


def get_operator(operator: str | Operator) -> Operator:
    """The Operator of that name. Raises ConfigError that lists the names and the nearest one."""
    if isinstance(operator, Operator):
        return operator
    if operator in OPERATORS:
        return OPERATORS[operator]
    near = difflib.get_close_matches(str(operator).upper(), OPERATORS, n=1, cutoff=0.3)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"operator = {operator!r}, expected one of {', '.join(OPERATORS)}.{hint}")


def draw_seed(device: torch.device | str = "cpu") -> Tensor:
    """() int64 on `device`, drawn from torch's own generator there: the key of one draw of Gumbel noise."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def gumbel_noise(
    shape: torch.Size | tuple[int, int], *, seed: int | Tensor | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """g[n, v] = -log(-log u(seed, n, v)), (N, V) float32: the definition of what the kernels make on the fly.

    u = (k + 1/2) / 2^23 with k the upper 23 bits of word v % 4 of Philox4x32-10 (Salmon et al., SC 2011), key = seed
    and counter = (v / 4, n, 0, 0); here the logarithms are taken in float64, in the kernels within 2 ulp of float32.

    seed: default: drawn from torch's generator.
    """
    rows, columns = shape
    seed = draw_seed(device) if seed is None else torch.as_tensor(seed, dtype=torch.int64, device=device)
    blocks = torch.arange((columns + 3) // 4, device=device).expand(rows, -1)
    row = torch.arange(rows, device=device)[:, None].expand(blocks.shape)
    words = _philox(seed, [blocks, row & _WORD, row >> 32, torch.zeros_like(row)])
    u = ((torch.stack(words, dim=-1).flatten(1)[:, :columns] >> 9).double() + 0.5) * 2.0**-23
    return -(-u.log()).log().float()


_WORD = 0xFFFFFFFF


def _philox(seed: Tensor, counter: list[Tensor]) -> list[Tensor]:
    """Ten rounds on 32-bit words held in int64."""
    x0, x1, x2, x3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        high0, low0 = _multiply(x0, 0xD2511F53)
        high1, low1 = _multiply(x2, 0xCD9E8D57)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [x0, x1, x2, x3]


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """(high, low) words of a 32-bit product, by halves: int64 has no room for it."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _WORD
