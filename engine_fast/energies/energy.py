"""What a student is trained to minimise: one interface, a teacher or several of them.

B sentences, S source positions, T target positions, M rows that the student fills, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine_fast.decoding import Hypothesis, MaxLength, generate
from engine_fast.energies.relaxed import GivenLogits, KeptLogits, Logits, Reduction, Relaxation, relaxed_energy
from engine_fast.energies.score import token_energies
from engine_fast.models import Teacher
from engine_fast.operators import draw_seed, get_operator


class Energy(Protocol):
    """E(x, y) of words and of relaxed words, and what has little of it. Its weights are never trained through it."""

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        """The networks behind it, the leading one first."""
        ...

    def encode(self, source_BS: Tensor) -> Any:
        """What of the energy depends on the source alone."""
        ...

    def score_relaxed(
        self,
        memory: Any,
        student: Tensor | Logits,
        target_BT: Tensor,
        relaxation: Relaxation,
        *,
        noise: tuple[Tensor | None, Tensor | None] = (None, None),
        reduction: Reduction = "none",
    ) -> Tensor:
        """(B,) energies of relaxed words, or their sum, in nats: see relaxed_energy."""
        ...

    def score(self, memory: Any, target_BT: Tensor, *, real_BT: Tensor | None = None) -> Tensor:
        """(B, T) energies of words in nats, 0 at padding: see token_energies."""
        ...

    def generate(
        self,
        source_BS: Tensor,
        *,
        beam: int = 5,
        n_best: int = 1,
        length_penalty: float = 1.0,
        max_length: MaxLength = (1.2, 10.0),
    ) -> list[list[Hypothesis]]:
        """Translations of low energy, best first: see decoding.generate."""
        ...


@dataclass(frozen=True, slots=True)
class TeacherEnergy:
    """E(x, y) = -log p(y | x) of one teacher (paper, section 3.1)."""

    teacher: Teacher

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        return (self.teacher,)

    def encode(self, source_BS: Tensor) -> Any:
        return self.teacher.encode(source_BS)

    def score_relaxed(
        self,
        memory: Any,
        student: Tensor | Logits,
        target_BT: Tensor,
        relaxation: Relaxation,
        *,
        noise: tuple[Tensor | None, Tensor | None] = (None, None),
        reduction: Reduction = "none",
    ) -> Tensor:
        return relaxed_energy(self.teacher, memory, student, target_BT, relaxation, noise=noise, reduction=reduction)

    def score(self, memory: Any, target_BT: Tensor, *, real_BT: Tensor | None = None) -> Tensor:
        return token_energies(self.teacher, memory, target_BT, real_BT=real_BT)

    def generate(
        self,
        source_BS: Tensor,
        *,
        beam: int = 5,
        n_best: int = 1,
        length_penalty: float = 1.0,
        max_length: MaxLength = (1.2, 10.0),
    ) -> list[list[Hypothesis]]:
        return generate(
            self.teacher, source_BS, beam=beam, n_best=n_best, length_penalty=length_penalty, max_length=max_length
        )


@dataclass(frozen=True, slots=True)
class EnsembleEnergy:
    """sum_k w_k E_k(x, y): a product of experts, such as a left-to-right and a right-to-left teacher.

    All members read the same relaxed words: Gumbel noise is drawn once. generate() is the first member's.
    """

    members: Sequence[Energy]
    weights: Sequence[float]

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        return tuple(teacher for member in self.members for teacher in member.teachers)

    def encode(self, source_BS: Tensor) -> Any:
        return [member.encode(source_BS) for member in self.members]

    def score_relaxed(
        self,
        memory: Any,
        student: Tensor | Logits,
        target_BT: Tensor,
        relaxation: Relaxation,
        *,
        noise: tuple[Tensor | None, Tensor | None] = (None, None),
        reduction: Reduction = "none",
    ) -> Tensor:
        device = target_BT.device
        noise = (_drawn(relaxation.o1, noise[0], device), _drawn(relaxation.o2, noise[1], device))
        total: Tensor | None = None
        for member, weight, own in zip(self.members, self.weights, memory, strict=True):
            energy = weight * member.score_relaxed(
                own, student, target_BT, relaxation, noise=noise, reduction=reduction
            )
            total = energy if total is None else total + energy
            if isinstance(student, KeptLogits):  # the head has been computed, and is not to be computed again
                student = GivenLogits(student.z_MV)
        assert total is not None, "an ensemble of no energies"
        return total

    def score(self, memory: Any, target_BT: Tensor, *, real_BT: Tensor | None = None) -> Tensor:
        parts = [
            weight * member.score(own, target_BT, real_BT=real_BT)
            for member, weight, own in zip(self.members, self.weights, memory, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def generate(
        self,
        source_BS: Tensor,
        *,
        beam: int = 5,
        n_best: int = 1,
        length_penalty: float = 1.0,
        max_length: MaxLength = (1.2, 10.0),
    ) -> list[list[Hypothesis]]:
        return self.members[0].generate(
            source_BS, beam=beam, n_best=n_best, length_penalty=length_penalty, max_length=max_length
        )


def _drawn(operator: str, noise: Tensor | None, device: torch.device) -> Tensor | None:
    """The given noise, or a seed of it for an operator that needs some."""
    return draw_seed(device) if noise is None and get_operator(operator).gumbel else noise
