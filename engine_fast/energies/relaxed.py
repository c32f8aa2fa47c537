"""The energy of a student's relaxed output (paper, equations 1 to 3).

B sentences, T target positions, M rows that the student fills (all real positions but each sentence's last,
which is the end symbol), V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from engine_fast import ops
from engine_fast.data.symbols import EOS, PAD
from engine_fast.models import Teacher, Through, reverse_words

Reduction = Literal["none", "sum"]


@dataclass(frozen=True, slots=True)
class Relaxation:
    """How student logits become what the teacher reads (o1) and what it is asked for (o2)."""

    o1: str = "SX"
    o2: str = "ST"
    temperature: float = 1.0
    """Divides logits and noise under both operators' softmax."""
    o1_temperature: float | None = None
    """O1's alone; None: as o2."""
    stl_logits: Literal["logits", "log_probabilities"] = "logits"
    """What STL's identity Jacobian refers to; no other operator can tell the two apart."""

    @property
    def temperature_of_o1(self) -> float:
        return self.temperature if self.o1_temperature is None else self.o1_temperature


def inner_positions(target_BT: Tensor) -> Tensor:
    """(B, T) bool: real positions but each sentence's last; the M rows are its True entries in row-major order."""
    return F.pad(target_BT[:, 1:] != PAD, (0, 1), value=False)


class HasHead(Protocol):
    """A student, as far as its logits go."""

    def project_through(self, hidden: Tensor, through: Through) -> Any: ...


class Logits(Protocol):
    """The student's logits of the M rows, as relaxed_energy needs them: first embedded, then scored."""

    def embed(self, teacher: Teacher, operator: str, **options: Any) -> Tensor:
        """(M, D) = O(z) @ the teacher's input embeddings."""
        ...

    def energy(
        self, hidden_MD: Tensor, teacher: Teacher, operator: str, reduction: Reduction, **options: Any
    ) -> Tensor:
        """(M,) energies, or their sum, of z against the teacher's logits of hidden_MD."""
        ...


@dataclass(slots=True)
class GivenLogits:
    """Logits that exist, (M, V)."""

    z_MV: Tensor

    def embed(self, teacher: Teacher, operator: str, **options: Any) -> Tensor:
        x_MD: Tensor = teacher.embed_through(
            self.z_MV, lambda z_MV, table_VD: ops.soft_embedding(z_MV, table_VD, operator, **options)
        )
        return x_MD

    def energy(
        self, hidden_MD: Tensor, teacher: Teacher, operator: str, reduction: Reduction, **options: Any
    ) -> Tensor:
        def of_teacher(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return ops.teacher_energy(self.z_MV, hidden, weight, operator, bias_teacher=bias, **options)

        e_M: Tensor = teacher.project_through(hidden_MD, of_teacher)
        return e_M.sum() if reduction == "sum" else e_M


class KeptLogits:
    """The student's head and O1 in one; the logits are computed once and kept, (M, V), until they are scored."""

    def __init__(self, student: HasHead, hidden_MD: Tensor) -> None:
        self._student, self._hidden_MD = student, hidden_MD
        self._given: GivenLogits | None = None

    @property
    def z_MV(self) -> Tensor:
        """What embed() has kept."""
        assert self._given is not None, "embed() comes first"
        return self._given.z_MV

    def embed(self, teacher: Teacher, operator: str, **options: Any) -> Tensor:
        def of_student(hidden: Tensor, weight: Tensor, bias: Tensor | None, table_VD: Tensor) -> tuple[Tensor, Tensor]:
            return ops.linear_soft_embedding_and_logits(
                hidden, weight, table_VD, operator, bias_student=bias, **options
            )

        x_MD, z_MV = _through_both(self._student, self._hidden_MD, teacher, of_student)
        self._given = GivenLogits(z_MV)
        return cast(Tensor, x_MD)

    def energy(
        self, hidden_MD: Tensor, teacher: Teacher, operator: str, reduction: Reduction, **options: Any
    ) -> Tensor:
        return GivenLogits(self.z_MV).energy(hidden_MD, teacher, operator, reduction, **options)


@dataclass(slots=True)
class RecomputedLogits:
    """The student's head fused into both uses: logits exist for a tile of rows at a time, and are computed again."""

    student: HasHead
    hidden_MD: Tensor

    def embed(self, teacher: Teacher, operator: str, **options: Any) -> Tensor:
        def of_student(hidden: Tensor, weight: Tensor, bias: Tensor | None, table_VD: Tensor) -> Tensor:
            return ops.linear_soft_embedding(hidden, weight, table_VD, operator, bias_student=bias, **options)

        x_MD: Tensor = _through_both(self.student, self.hidden_MD, teacher, of_student)
        return x_MD

    def energy(
        self, hidden_MD: Tensor, teacher: Teacher, operator: str, reduction: Reduction, **options: Any
    ) -> Tensor:
        def of_student(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            def of_both(teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Tensor | None) -> Tensor:
                return ops.linear_energy(
                    hidden, weight, teacher_hidden, teacher_weight, operator,
                    bias_student=bias, bias_teacher=teacher_bias, reduction=reduction, **options,
                )  # fmt: skip

            return teacher.project_through(hidden_MD, of_both)

        e: Tensor = self.student.project_through(self.hidden_MD, of_student)
        return e


def _through_both(
    student: HasHead, hidden_MD: Tensor, teacher: Teacher, make: Callable[[Tensor, Tensor, Tensor | None, Tensor], Any]
) -> Any:
    """make(hidden, the student's head, its bias, the teacher's input embeddings), where all are whole."""
    return student.project_through(
        hidden_MD,
        lambda hidden, weight, bias: teacher.embed_through(hidden, lambda h, table: make(h, weight, bias, table)),
    )


def relaxed_energy(
    teacher: Teacher,
    memory: Any,
    student: Tensor | Logits,
    target_BT: Tensor,
    relaxation: Relaxation,
    *,
    noise: tuple[Tensor | None, Tensor | None] = (None, None),
    reduction: Reduction = "none",
) -> Tensor:
    """E[b] = sum_t -O2(z_t)' log p(. | O1(z_0) .. O1(z_{t-1}), x) - log p(end | O1(z_0) ..), in nats.

    The teacher's decoder reads its start symbol's embedding, then O1(z_t) times its table; the last slot of each
    sentence is scored against the end symbol itself. A right-to-left teacher reads and scores the other slots from
    the last to the first: O1(z_{t+1}) .. stand in the condition.

    Args:
        memory: the teacher's encoder states.
        student: logits (M, V) of the rows inner_positions(target_BT), or one of the forms above.
        target_BT: only its padding is read: it says how long each sentence is.
        noise: (M, V) Gumbel noise of o1 and of o2, or a () int64 seed of it; drawn independently when needed and not
            given.
        reduction: "sum" adds the sentences up, ().
    Returns: (B,) float32 (float64 for float64 logits).
    Gradients: to the student through both operators; to the teacher's weights only if they require one.
    """
    real_BT, inner_BT = target_BT != PAD, inner_positions(target_BT)
    end_BT = real_BT & ~inner_BT
    logits: Logits = GivenLogits(student) if isinstance(student, Tensor) else student
    if relaxation.stl_logits == "log_probabilities" and "STL" in (relaxation.o1, relaxation.o2):
        if not isinstance(logits, GivenLogits):
            raise TypeError("stl_logits = 'log_probabilities' needs logits that exist: give a tensor")
        z_MV = logits.z_MV
        logits = GivenLogits(z_MV.log_softmax(-1) if z_MV.dtype == torch.float64 else z_MV.float().log_softmax(-1))

    # In this order: ZeRO-3 frees a table after the backward pass of its last call only.
    start_B1D = teacher.embed(target_BT.new_full((target_BT.shape[0], 1), teacher.start))
    x_MD = logits.embed(teacher, relaxation.o1, temperature=relaxation.temperature_of_o1, **_noise(noise[0]))
    turned_M = _turned(inner_BT, real_BT) if teacher.right_to_left else None
    x_MD = x_MD if turned_M is None else x_MD[turned_M]
    rest_BTD = x_MD.new_zeros(target_BT.shape[0], target_BT.shape[1] - 1, x_MD.shape[1])
    rest_BTD = rest_BTD.masked_scatter(inner_BT[:, :-1, None], x_MD)
    hidden_BTD = teacher.forward_embedded(memory, torch.cat([start_B1D, rest_BTD], dim=1))

    hidden_MD = hidden_BTD[inner_BT]
    hidden_MD = hidden_MD if turned_M is None else hidden_MD[turned_M]
    e = logits.energy(
        hidden_MD, teacher, relaxation.o2, reduction, temperature=relaxation.temperature, **_noise(noise[1])
    )
    s_BV = teacher.project(hidden_BTD[end_BT])
    s_BV = s_BV if s_BV.dtype == torch.float64 else s_BV.float()
    end_B = F.cross_entropy(s_BV, target_BT.new_full((len(s_BV),), EOS), reduction="none")
    if reduction == "sum":
        return e + end_B.sum()
    energy_BT = e.new_zeros(target_BT.shape).masked_scatter(inner_BT, e).masked_scatter(end_BT, end_B.to(e.dtype))
    return energy_BT.sum(-1)


def _turned(inner_BT: Tensor, real_BT: Tensor) -> Tensor:
    """(M,) places of the rows when each sentence's stand in the opposite order."""
    numbers_BT = torch.zeros(inner_BT.shape, dtype=torch.long, device=inner_BT.device)
    numbers_BT[inner_BT] = torch.arange(int(inner_BT.sum()), device=inner_BT.device)
    return reverse_words(numbers_BT, real_BT)[inner_BT]


def _noise(given: Tensor | None) -> dict[str, Tensor | None]:
    return {"seed": given} if given is not None and given.ndim == 0 else {"noise": given}
