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


def gumbel_noise(
    shape: torch.Size | tuple[int, ...], *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """g = -log(-log u), u uniform on (0, 1), float32, drawn from `generator` (default: torch's own)."""
    u = torch.rand(shape, generator=generator, device=device, dtype=torch.float32)
    tiny = torch.finfo(torch.float32).tiny
    return -(-u.clamp_min(tiny).log()).clamp_min(tiny).log()
