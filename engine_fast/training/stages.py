"""The three trained stages: what is trained, on what, against what; the loop is the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from engine_fast.config import RunConfig, TrainConfig
from engine_fast.data.corpus import ParallelCorpus
from engine_fast.data.prepared import Prepared
from engine_fast.decoding import generate, mask_predict
from engine_fast.distributed import World, shard_frozen
from engine_fast.energies import Energy, EnsembleEnergy, TeacherEnergy
from engine_fast.errors import require
from engine_fast.models import Student, Teacher
from engine_fast.models.store import copy_matching, fingerprint, stage_model
from engine_fast.training.ensemble import member_directories
from engine_fast.training.job import Job
from engine_fast.training.networks import (
    fresh,
    frozen,
    is_changed,
    load,
    require_common_weights,
    require_shardable,
    student_of,
)
from engine_fast.training.objectives import CMLMObjective, EngineObjective, TeacherObjective
from engine_fast.training.pretrained import install_teacher
from engine_fast.training.reuse import Reuse

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train_teacher(config: RunConfig, prepared: Prepared, directory: Path) -> None:
    """Train the autoregressive teacher on the references, or take over teacher.pretrained; leaves directory/model.

    This and the other two: a directory that holds the finished stage is left alone, one that holds a part of it is
    continued. Raises Interrupted after a signal (state saved), DivergenceError, ConfigError, CheckpointError,
    VocabularyError, DataError.
    """
    if config.teacher.pretrained is not None:
        install_teacher(config, prepared, directory)
        return
    config = _seeded(config, config.teacher)

    def build(world: World) -> tuple[Teacher, Callable[[nn.Module], nn.Module]]:
        model = cast(Teacher, fresh("teacher", config, prepared))
        model.right_to_left = config.teacher.right_to_left
        return model, lambda module: TeacherObjective(cast(Teacher, module), config.teacher)

    def decode(model: nn.Module, source_BS: Tensor) -> list[list[int]]:
        return [found[0].tokens for found in generate(cast(Teacher, model), source_BS)]

    corpora = prepared.split("train"), prepared.split("valid")
    Job("teacher", config, config.teacher, prepared, corpora, build, decode, models={}).run(directory)


def train_cmlm(
    config: RunConfig,
    prepared: Prepared,
    corpus: ParallelCorpus,
    directory: Path,
    *,
    valid_corpus: ParallelCorpus,
    teacher_dir: Path | None = None,
) -> None:
    """Train the baseline, CMLM or BiLSTM, by cross-entropy on `corpus`, distilled or not; leaves directory/model.

    teacher_dir: model directory, or the stage directory around one; needed only by cmlm.from_teacher.
    """
    require(
        teacher_dir is not None or not config.cmlm.from_teacher,
        "cmlm.from_teacher", True, "false when there is no teacher", "Give the teacher's directory.",
    )  # fmt: skip
    models = {"teacher": teacher_dir} if teacher_dir is not None and config.cmlm.from_teacher else {}
    config = _seeded(config, config.cmlm)

    def build(world: World) -> tuple[Student, Callable[[nn.Module], nn.Module]]:
        model = cast(Student, fresh("cmlm", config, prepared))
        if "teacher" in models:
            teacher = load(models["teacher"], "teacher", prepared).model
            require_common_weights(teacher.architecture.kind, model.architecture.kind)
            copy_matching(model, teacher)
        return model, lambda module: CMLMObjective(cast(Student, module), config.cmlm)

    Job("cmlm", config, config.cmlm, prepared, (corpus, valid_corpus), build, _one_pass, models=models).run(directory)


def train_engine(
    config: RunConfig,
    prepared: Prepared,
    corpus: ParallelCorpus,
    directory: Path,
    *,
    valid_corpus: ParallelCorpus,
    teacher_dir: Path,
    cmlm_dir: Path,
    reuse: Reuse | None = None,
) -> None:
    """Train the student from the CMLM's weights on the frozen teacher's energy; leaves directory/model.

    teacher_dir, cmlm_dir: model directories, or the stage directories around them. The student has the CMLM's
    architecture; engine.architecture, if given, sets its dropout and must otherwise agree. reuse: what earlier calls
    in this process have left; without effect on a teacher that is sharded, compiled or keeps its dropout.
    """
    config = _seeded(config, config.engine)

    def build(world: World) -> tuple[Student, Callable[[nn.Module], nn.Module]]:
        student = student_of(cast(Student, load(cmlm_dir, "student", prepared).model), config)
        precision = config.engine.teacher_precision or config.engine.precision
        require(
            precision != "fp16" or world.device.type == "cuda",
            "engine.teacher_precision", precision, "bf16 or fp32 on a CPU",
        )  # fmt: skip
        require(
            {precision, config.engine.precision} != {"bf16", "fp16"},
            "engine.teacher_precision", precision, f"{config.engine.precision}, the student's, or fp32",
        )  # fmt: skip
        kept = None if is_changed(config.engine) else reuse
        origin = (
            precision,
            config.engine.teacher_checkpointing,
            *(fingerprint(stage_model(models[name])) for name in names),
        )
        teachers = []
        for name in names:
            loading = partial(frozen, models[name], config.engine, _DTYPES[precision], prepared)
            teachers.append(loading() if kept is None else kept.teacher((name, *origin), loading))
        within = None
        if config.engine.teacher_placement == "sharded":
            require_shardable(teachers[0], "engine.teacher_placement", "sharded", "replicated")
            within = shard_frozen(teachers[0], device=world.device, extra=config.deepspeed)
            teachers[0].train(config.engine.teacher_dropout)  # DeepSpeed has put it in training mode
        else:
            for teacher in teachers:
                teacher.to(world.device)
        if config.engine.teacher_compile:
            for teacher in teachers:
                teacher.compile_stacks()
        energy: Energy = TeacherEnergy(teachers[0])
        if config.engine.ensemble:
            weights = [1.0, *(member.weight for member in config.engine.ensemble)]
            energy = EnsembleEnergy([TeacherEnergy(teacher) for teacher in teachers], weights)
        encode = None if kept is None else partial(kept.encoded, origin, encode=energy.encode)
        return student, lambda module: EngineObjective(
            cast(Student, module), energy, config.engine, within=within, encode=encode
        )

    models = {"teacher": teacher_dir} | {
        f"teacher {number}": path for number, path in enumerate(member_directories(config.engine), start=2)
    }
    names = list(models)
    models["cmlm"] = cmlm_dir
    Job("engine", config, config.engine, prepared, (corpus, valid_corpus), build, _one_pass, models=models).run(
        directory
    )


def _seeded(config: RunConfig, settings: TrainConfig) -> RunConfig:
    """With the stage's seed, if it has one, as the run's."""
    return config if settings.seed is None else config.model_copy(update={"seed": settings.seed})


def _one_pass(model: nn.Module, source_BS: Tensor) -> list[list[int]]:
    return [hypothesis.tokens for hypothesis in mask_predict(cast(Student, model), source_BS)]
