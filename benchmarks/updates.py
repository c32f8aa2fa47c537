"""Real training updates on synthetic batches, for bench_plan, bench_scaling and bench_zero.

The engine, objectives and precision are those of `engine-fast train`; only corpus, schedule and logging are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from engine_fast.config import RunConfig, TrainConfig
from engine_fast.data.batching import Batch
from engine_fast.data.symbols import EOS, NUM_SPECIAL
from engine_fast.distributed import Engine, World, shard_frozen
from engine_fast.models import CMLM, Transformer, freeze
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


def build(config: RunConfig, work: Work, world: World) -> Engine:
    """Fresh models under the engine, as training.stages builds them."""
    settings: TrainConfig = getattr(config, work.stage)
    torch.manual_seed(config.seed)
    size = work.vocabulary
    objective: nn.Module
    trained: Transformer | CMLM
    if work.stage == "teacher":
        trained = Transformer(settings.architecture, size, size)
        objective = TeacherObjective(trained, config.teacher)
    elif work.stage == "cmlm":
        trained = CMLM(settings.architecture, size, size)
        objective = CMLMObjective(trained, config.cmlm)
    else:
        precision = config.engine.teacher_precision or config.engine.precision
        teacher = Transformer(config.teacher.architecture, size, size).to(world.device)
        freeze(teacher, dtype=DTYPES[precision], dropout=config.engine.teacher_dropout)
        teacher.activation_checkpointing = config.engine.teacher_checkpointing
        within = None
        if config.engine.teacher_placement == "sharded":
            within = shard_frozen(teacher, extra=config.deepspeed)
            teacher.train(config.engine.teacher_dropout)
        if config.engine.teacher_compile:
            teacher.compile_stacks()
        trained = CMLM(architecture_of(config, "engine"), size, size)
        objective = EngineObjective(trained, teacher, config.engine, within=within)
    trained.activation_checkpointing = settings.activation_checkpointing
    if settings.compile:
        trained.compile_stacks()
    return Engine(objective, trained, settings, extra=config.deepspeed, world=world)


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
    engine.prepare(batches)
    for each, batch in zip(numbers, batches, strict=True):
        torch.manual_seed(each)
        loss += engine.backward(batch, num_target_tokens=tokens)["loss"] / tokens
    engine.step(lr)
    return float(world.all_reduce_sum(loss))
