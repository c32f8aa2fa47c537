"""Real training updates on synthetic batches, and the peak of memory in each of their phases.

Used by bench_plan, bench_scaling and gpu/zero.sh. The engine, objectives and precision are those of `engine-fast train`;
only the corpus, the schedule and the logging are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.profiler import record_function

from engine_fast.config import Architecture, RunConfig, TrainConfig
from engine_fast.data.batching import Batch
from engine_fast.data.symbols import EOS, NUM_SPECIAL
from engine_fast.distributed import Engine, World
from engine_fast.models import CMLM, Transformer, freeze
from engine_fast.training.objectives import CMLMObjective, EngineObjective, TeacherObjective

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PHASES = ("build", "forward", "backward", "step")


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
        trained = CMLM(student_architecture(config), size, size)
        objective = EngineObjective(trained, teacher, config.engine)
    trained.activation_checkpointing = settings.activation_checkpointing
    return Engine(objective, trained, settings, extra=config.deepspeed, world=world)


def student_architecture(config: RunConfig) -> Architecture:
    return config.engine.architecture if "architecture" in config.engine.model_fields_set else config.cmlm.architecture


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
    for index in range(work.accumulate):
        global_number = number * per_update + index * world.size + world.rank
        torch.manual_seed(global_number)
        batch = micro_batch(work, global_number).to(world.device)
        loss += engine.backward(batch, num_target_tokens=tokens)["loss"] / tokens
    engine.step(lr)
    return float(world.all_reduce_sum(loss))


@contextmanager
def phases(engine: Engine) -> Iterator[None]:
    """Name forward, backward and step to the profiler, outermost first."""
    inner = engine._engine

    def named(name: str, function):  # type: ignore[no-untyped-def]
        def wrapped(*args, **kwargs):  # type: ignore[no-untyped-def]
            with record_function(f"phase.{name}"):
                return function(*args, **kwargs)

        return wrapped

    saved = inner.forward, inner.backward, inner.step
    inner.forward, inner.backward, inner.step = (named(n, f) for n, f in zip(PHASES[1:], saved, strict=True))
    try:
        yield
    finally:
        del inner.forward, inner.backward, inner.step
