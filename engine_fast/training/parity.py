"""The parity gate: ten training steps with the compiled operators beside the same ten with the plain definitions.

A fused path that changed the objective would show here before it shows in a result. All start each step from the same
weights, for a hard operator turns the smallest difference into another word sooner or later; the truth is the plain
path in float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from engine_fast import ops
from engine_fast.config import Architecture, EngineConfig
from engine_fast.data.batching import Batch
from engine_fast.data.symbols import EOS, NUM_SPECIAL, PAD
from engine_fast.energies import TeacherEnergy
from engine_fast.models import CMLM, Transformer, freeze
from engine_fast.training.objectives import EngineObjective

STEPS = 10
FACTOR, FLOOR = 2.0, 1e-6
_VOCABULARY, _SENTENCES, _LONGEST = 211, 6, 9  # no multiple of a vector's width
_SMALL = Architecture(
    width=32, ffn_width=48, heads=2, encoder_layers=1, decoder_layers=2, max_positions=16, dropout=0.0
)


@dataclass(frozen=True, slots=True)
class Parity:
    """The largest relative error of ten steps' energies and gradients, with either implementation."""

    o1: str
    o2: str
    head_memory: str
    plain_error: float
    fused_error: float

    @property
    def agrees(self) -> bool:
        """The fused path errs at most FACTOR times as much as the plain one, plus FLOOR; both are finite."""
        return math.isfinite(self.plain_error) and self.fused_error <= FACTOR * self.plain_error + FLOOR

    def __str__(self) -> str:
        return (
            f"{self.o1}/{self.o2}, {self.head_memory}: fused {self.fused_error:.1e} from the truth, "
            f"plain {self.plain_error:.1e}"
        )


def check_parity(
    o1: str = "SX",
    o2: str = "ST",
    head_memory: str = "keep",
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Parity:
    """Ten updates of a small student, every step's energy and gradient computed three times."""
    config = EngineConfig.model_validate({"o1": o1, "o2": o2, "head_memory": head_memory})
    with torch.random.fork_rng(devices=[device] if device != "cpu" else []), _one_thread():
        torch.manual_seed(1)
        student, teacher = CMLM(_SMALL, _VOCABULARY, _VOCABULARY), Transformer(_SMALL, _VOCABULARY, _VOCABULARY)
        with torch.no_grad():  # sharper than fresh weights, so that no softmax is flat
            for model in (student, teacher):
                model.output.weight.mul_(2)
        student, teacher = student.to(device, dtype), freeze(teacher, dtype=dtype).to(device)
        exact_student, exact_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
        objective, exact = (
            EngineObjective(student, TeacherEnergy(teacher), config),
            EngineObjective(exact_student, TeacherEnergy(exact_teacher), config),
        )
        optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
        batch, plain_error, fused_error = _batch(device), 0.0, 0.0
        for step in range(STEPS):
            exact_student.load_state_dict(student.state_dict())
            truth = _step(exact, batch, step, "reference")
            fused_error = _worst(fused_error, _distance(_step(objective, batch, step, "fused"), truth))
            plain_error = _worst(plain_error, _distance(_step(objective, batch, step, "reference"), truth))
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
    return Parity(o1, o2, head_memory, plain_error, fused_error)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Where cores are busy a pool of threads takes a hundred times as long over tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _step(
    objective: EngineObjective, batch: Batch, step: int, implementation: ops.Implementation
) -> tuple[Tensor, Tensor]:
    """(loss (1,), gradient of all weights), float64; the gradient stays in the student too."""
    torch.manual_seed(2 + step)  # the keys of Gumbel noise
    objective.zero_grad()
    with ops.using(implementation):
        loss = objective(batch).total
        loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in objective.trained.parameters() if p.grad is not None])
    return loss.detach().double()[None], gradient.double()


def _distance(got: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> float:
    return _worst(*(float((a - b).norm() / b.norm()) for a, b in zip(got, truth, strict=True)))


def _worst(*errors: float) -> float:
    """The largest, infinite as soon as one is no number: max() would lose a NaN."""
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def _batch(device: str) -> Batch:
    lengths = torch.randint(3, _LONGEST, (2, _SENTENCES))
    sides = []
    for side in lengths:
        ids = torch.full((_SENTENCES, int(side.max())), PAD)
        for i, length in enumerate(side.tolist()):
            ids[i, : length - 1] = torch.randint(NUM_SPECIAL, _VOCABULARY, (length - 1,))
            ids[i, length - 1] = EOS
        sides.append(ids.to(device))
    return Batch(sides[0], sides[1], torch.arange(_SENTENCES))
