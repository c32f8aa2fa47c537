"""Real training updates on synthetic batches, for bench_plan, bench_scaling and bench_zero.

The engine, objectives and precision are those of `engine-fast train`; only corpus, schedule and logging are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from engine_fast.config import RunConfig, TrainConfig
from engine_fast.data.batching import Batch
from engine_fast.data.symbols import EOS, NUM_SPECIAL
from engine_fast.distributed import Engine, World, shard_frozen
from engine_fast.energies import TeacherEnergy
from engine_fast.models import Student, Teacher, freeze
from engine_fast.models.store import new_network
from engine_fast.training.averaging import ExponentialAverage
from engine_fast.training.objectives import CMLMObjective, EngineObjective, TeacherObjective
from engine_fast.training.plan.memory import architecture_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Work:
    """A stage and the shape of its micro-batches, none of it padded."""

    stage: str
    vocabulary: int
    sentences: int
    source: int
    target: int
    accumulate: int = 1


@dataclass
class Training:
    """A stage's engine, and its objective of a model."""

    engine: Engine
    objective_of: Callable[[nn.Module], nn.Module]
    average: ExponentialAverage | None

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint collects, as training.loop does."""
        if self.average is None:
            return self.engine.weights()
        with self.average.in_place_of(self.engine.shards()):
            return self.engine.weights()

    @torch.no_grad()
    def validate(self, batch: Batch) -> None:
        """One batch as training.validation measures it."""
        with self.engine.showing(None if self.average is None else self.weights()) as model:
            objective = self.objective_of(model).eval()
            (getattr(objective, "evaluate", None) or objective)(batch)


def build(config: RunConfig, work: Work, world: World) -> Training:
    """Fresh models under the engine, as training.stages builds them."""
    settings: TrainConfig = getattr(config, work.stage)
    torch.manual_seed(config.seed)
    size = work.vocabulary
    trained: Teacher | Student
    objective_of: Callable[[nn.Module], nn.Module]
    if work.stage == "teacher":
        trained = new_network("teacher", settings.architecture, size, size)
        objective_of = lambda module: TeacherObjective(cast(Teacher, module), config.teacher)  # noqa: E731
    elif work.stage == "cmlm":
        trained = new_network("student", settings.architecture, size, size)
        objective_of = lambda module: CMLMObjective(cast(Student, module), config.cmlm)  # noqa: E731
    else:
        teacher, within = frozen_teacher(config, work, world)
        trained = new_network("student", architecture_of(config, "engine"), size, size)
        energy = TeacherEnergy(teacher)
        objective_of = lambda module: EngineObjective(cast(Student, module), energy, config.engine, within=within)  # noqa: E731
    trained.activation_checkpointing = settings.activation_checkpointing
    if settings.compile:
        trained.compile_stacks()
    engine = Engine(objective_of(trained), trained, settings, extra=config.deepspeed, world=world)
    average = ExponentialAverage(engine.shards(), settings.ema_decay) if settings.ema_decay else None
    return Training(engine, objective_of, average)


def frozen_teacher(config: RunConfig, work: Work, world: World) -> tuple[Teacher, Any]:
    """A fresh one of the configured precision and placement, and the `within` of a sharded one."""
    settings, size = config.engine, work.vocabulary
    teacher = cast(Teacher, new_network("teacher", config.teacher.architecture, size, size))
    freeze(teacher, dtype=DTYPES[settings.teacher_precision or settings.precision], dropout=settings.teacher_dropout)
    teacher.activation_checkpointing = settings.teacher_checkpointing
    within = None
    if settings.teacher_placement == "sharded":
        within = shard_frozen(teacher, device=world.device, extra=config.deepspeed)
        teacher.train(settings.teacher_dropout)
    else:
        teacher.to(world.device)
    if settings.teacher_compile:
        teacher.compile_stacks()
    return teacher, within


def micro_batch(work: Work, number: int) -> Batch:
    """Global micro-batch `number`; the same whoever computes it."""
    generator = torch.Generator().manual_seed(number)

    def side(length: int) -> torch.Tensor:
        ids = torch.randint(NUM_SPECIAL, work.vocabulary, (work.sentences, length), generator=generator)
        ids[:, -1] = EOS
        return ids

    return Batch(side(work.source), side(work.target), torch.arange(work.sentences))


def update(engine: Engine, work: Work, number: int, *, lr: float = 1e-4) -> float:
    """One update of accumulate * world.size micro-batches; this rank's share of the mean loss a token."""
    world, per_update = engine.world, work.accumulate * engine.world.size
    tokens = per_update * work.sentences * work.target
    loss = torch.zeros((), device=world.device)
    numbers = [number * per_update + index * world.size + world.rank for index in range(work.accumulate)]
    batches = [micro_batch(work, each).to(world.device) for each in numbers]
    engine.prepare(batches, done=0.0)
    for each, batch in zip(numbers, batches, strict=True):
        torch.manual_seed(each)
        loss += engine.backward(batch, num_target_tokens=tokens)["loss"] / tokens
    engine.step(lr)
    return float(world.all_reduce_sum(loss))
