"""Which systems a run compares, as data, and how each turns source ids into hypotheses.

B sentences, S source positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from engine_fast.config import EvaluateConfig
from engine_fast.decoding.generate import generate
from engine_fast.decoding.hypothesis import Hypothesis
from engine_fast.decoding.mask_predict import mask_predict
from engine_fast.energies import discrete_energy
from engine_fast.models import Student, Teacher

Decode = Callable[[Tensor, Tensor | None], list[Hypothesis]]
"""(source (B, S) ids, oracle target lengths (B,) or None) -> one hypothesis per sentence."""

Role = Literal["teacher", "cmlm", "engine"]


@dataclass(frozen=True, slots=True)
class System:
    """One row of the table of systems."""

    name: str
    """teacher-greedy, teacher-beam, or a student with an optional -rerank or -oracle."""
    role: Role
    """Whose weights it uses."""
    beam: int = 1
    """Teacher: hypotheses kept."""
    iterations: int | None = None
    """Student: mask-predict passes."""
    length_beam: int | None = None
    """Student: length candidates."""
    oracle_length: bool = False
    """Student: the reference's length is given."""
    rerank: bool = False
    """Student: the teacher's energy chooses among the length candidates."""

    @property
    def label(self) -> str:
        """Unique within a run; also the stem of the file with its outputs."""
        if self.iterations is None:
            return self.name
        return f"{self.name}.i{self.iterations}" + ("" if self.oracle_length else f".k{self.length_beam}")


def systems_of(config: EvaluateConfig, *, refine: bool = True) -> list[System]:
    """The systems in the table's order. For each student and number of passes: its own length beam first, then
    a single length, the teacher's choice among the candidates, and the reference's length.

    refine: whether the students have any use for more than one pass.
    """
    systems = [System("teacher-greedy", "teacher"), System("teacher-beam", "teacher", beam=config.beam)]
    students: tuple[tuple[Role, int], ...] = (("cmlm", config.cmlm_length_beam), ("engine", config.engine_length_beam))
    for role, length_beam in students:
        for iterations in dict.fromkeys(config.iterations if refine else [1]):
            systems.append(System(role, role, iterations=iterations, length_beam=length_beam))
            if length_beam > 1:
                systems.append(System(role, role, iterations=iterations, length_beam=1))
                if config.rerank:
                    systems.append(
                        System(f"{role}-rerank", role, iterations=iterations, length_beam=length_beam, rerank=True)
                    )
            if config.oracle_lengths:
                systems.append(System(f"{role}-oracle", role, iterations=iterations, length_beam=1, oracle_length=True))
    return [system for system in systems if config.systems is None or system.name in config.systems]


def roles_of(config: EvaluateConfig) -> list[Role]:
    """Whose weights an evaluation needs: the systems', and the teacher's, which scores them all."""
    roles: tuple[Role, ...] = ("teacher", "cmlm", "engine")
    used = {system.role for system in systems_of(config)}
    return [role for role in roles if role in used or role == "teacher"]


def decoder_of(system: System, model: Teacher | Student, judge: Teacher, *, length_penalty: float = 1.0) -> Decode:
    """The system as a function. `judge` is the teacher that reranks; `length_penalty` is the teacher's, too."""
    if isinstance(model, Teacher):
        teacher = model
        return lambda source_BS, _: [
            best[0] for best in generate(teacher, source_BS, beam=system.beam, length_penalty=length_penalty)
        ]
    student = model

    def energy(source_BS: Tensor, target_NT: Tensor) -> Tensor:
        with torch.no_grad():
            return discrete_energy(judge, source_BS, target_NT)

    def decode(source_BS: Tensor, lengths_B: Tensor | None) -> list[Hypothesis]:
        return mask_predict(
            student,
            source_BS,
            iterations=cast(int, system.iterations),
            length_beam=cast(int, system.length_beam),
            lengths=lengths_B if system.oracle_length else None,
            rescore=energy if system.rerank else None,
            length_penalty=length_penalty,
        )

    return decode
