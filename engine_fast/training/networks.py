"""The networks that a stage starts from: fresh ones, those of earlier stages, and frozen teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

import torch

from engine_fast.config import EngineConfig, RunConfig, StudentArchitecture
from engine_fast.data.prepared import Prepared
from engine_fast.errors import VocabularyError, require
from engine_fast.models import Student, Teacher, freeze, load_model
from engine_fast.models.store import LoadedModel, WithoutRandomFill, new_network, stage_model
from engine_fast.training.seeding import seed_torch

_DROPOUTS = {"dropout", "attention_dropout", "activation_dropout"}


def fresh(stage: str, config: RunConfig, prepared: Prepared) -> Teacher | Student:
    """With random weights, a function of the seed and the stage."""
    seed_torch(config.seed, stage, "init")
    role: Literal["teacher", "student"] = "teacher" if stage == "teacher" else "student"
    sizes = len(prepared.source_vocabulary), len(prepared.target_vocabulary)
    return new_network(role, getattr(config, stage).architecture, *sizes)


def load(path: Path, kind: str, prepared: Prepared) -> LoadedModel:
    """A model of `kind` whose vocabularies are the corpus's. Raises CheckpointError, VocabularyError."""
    directory = stage_model(path)
    loaded = load_model(directory, kind=kind, dtype=torch.float32)
    for side, own, wanted in (
        ("source", loaded.source_vocabulary, prepared.source_vocabulary),
        ("target", loaded.target_vocabulary, prepared.target_vocabulary),
    ):
        if own.fingerprint != wanted.fingerprint:
            raise VocabularyError(
                f"{directory}: its {side} vocabulary is {own.fingerprint[:12]}, the corpus was prepared with "
                f"{wanted.fingerprint[:12]}. Use a model and data of one run."
            )
    return loaded


def frozen(path: Path, config: EngineConfig, dtype: torch.dtype, prepared: Prepared) -> Teacher:
    """The ENGINE stage's teacher."""
    teacher = cast(Teacher, load(path, "teacher", prepared).model)
    teacher.activation_checkpointing = config.teacher_checkpointing
    return freeze(teacher, dtype=dtype, dropout=config.teacher_dropout)


def is_changed(config: EngineConfig) -> bool:
    """Whether a loaded teacher does not stay as it was loaded."""
    return config.teacher_placement == "sharded" or config.teacher_compile or config.teacher_dropout


def student_architecture(architecture: StudentArchitecture, config: RunConfig) -> StudentArchitecture:
    """The baseline's with engine.architecture's dropout. Raises ConfigError where they differ in anything else."""
    if "architecture" in config.engine.model_fields_set:
        asked = config.engine.architecture
        for name in ("kind", *sorted(asked.model_fields_set - _DROPOUTS)):
            require(
                getattr(asked, name) == getattr(architecture, name),
                f"engine.architecture.{name}", getattr(asked, name), f"the CMLM's, {getattr(architecture, name)!r}",
                "The student starts from the CMLM; only its dropout can differ.",
            )  # fmt: skip
        given = asked.model_fields_set & _DROPOUTS
        architecture = architecture.model_copy(update={name: getattr(asked, name) for name in given})
    return architecture


def require_common_weights(teacher: str, student: str) -> None:
    """Raises ConfigError for kinds of networks of which the student cannot start from the teacher's weights."""
    require(
        (teacher, student) == ("transformer", "transformer"),
        "cmlm.from_teacher", True, f"false: the teacher is a {teacher} network, the student a {student} one",
        "Only transformers have weights in common.",
    )  # fmt: skip


def student_of(baseline: Student, config: RunConfig) -> Student:
    """The baseline with engine.architecture's dropout."""
    architecture = student_architecture(baseline.architecture, config)
    with WithoutRandomFill():
        student = cast(Student, new_network("student", architecture, baseline.source_size, baseline.target_size))
    student.load_state_dict(baseline.state_dict())
    return student


def require_shardable(model: Teacher | Student, key: str, got: object, wanted: str) -> None:
    """Raises ConfigError for a network whose gathers would depend on the sentences."""
    require(
        model.shardable,
        key, got, f"{wanted} for an LSTM with input feeding",
        "It gathers weights at every position, and ranks have sentences of other lengths. Or set input_feeding: false.",
    )  # fmt: skip
