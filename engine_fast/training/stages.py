"""The three trained stages: what is trained, on what, against what; the loop is the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from engine_fast import __version__, ops
from engine_fast.config import AnyArchitecture, RunConfig, TrainConfig
from engine_fast.data.corpus import ParallelCorpus
from engine_fast.data.prepared import Prepared
from engine_fast.data.shards import MANIFEST
from engine_fast.decoding import generate, mask_predict
from engine_fast.distributed import Engine, World, require_agreement, shard_frozen, start
from engine_fast.distributed.presence import beat
from engine_fast.energies import Energy, EnsembleEnergy, TeacherEnergy
from engine_fast.errors import require
from engine_fast.models import Student, Teacher, save_model
from engine_fast.models.store import copy_matching
from engine_fast.training.ensemble import member_directories
from engine_fast.training.export import assemble
from engine_fast.training.feeding import Feeder, Subset, fitting
from engine_fast.training.interrupt import catching_signals
from engine_fast.training.loop import StageName, Trainer
from engine_fast.training.networks import (
    fresh,
    frozen,
    hash_file,
    hash_of_model,
    is_changed,
    load,
    require_shardable,
    student_of,
)
from engine_fast.training.objectives import CMLMObjective, EngineObjective, TeacherObjective
from engine_fast.training.pretrained import install_teacher
from engine_fast.training.reuse import Reuse
from engine_fast.training.run_directory import RunDirectory
from engine_fast.training.seeding import derive
from engine_fast.training.validation import BleuSet, Decode, Validator

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
    _Job("teacher", config, config.teacher, prepared, corpora, build, decode, models={}).run(directory)


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
            kinds = teacher.architecture.kind, model.architecture.kind
            require(
                kinds == ("transformer", "transformer"),
                "cmlm.from_teacher", True, f"false: the teacher is a {kinds[0]} network, the student a {kinds[1]} one",
                "Only transformers have weights in common.",
            )  # fmt: skip
            copy_matching(model, teacher)
        return model, lambda module: CMLMObjective(cast(Student, module), config.cmlm)

    _Job("cmlm", config, config.cmlm, prepared, (corpus, valid_corpus), build, _one_pass, models=models).run(directory)


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
        origin = (precision, config.engine.teacher_checkpointing, *(hash_of_model(models[name]) for name in names))
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
    _Job("engine", config, config.engine, prepared, (corpus, valid_corpus), build, _one_pass, models=models).run(
        directory
    )


@dataclass
class _Job:
    """A stage with everything that differs from the others."""

    stage: StageName
    config: RunConfig
    settings: TrainConfig
    prepared: Prepared
    corpora: tuple[ParallelCorpus, ParallelCorpus]
    build: Callable[[World], tuple[Teacher | Student, Callable[[nn.Module], nn.Module]]]
    decode: Decode
    models: dict[str, Path]
    """Model directories it starts from."""

    def run(self, directory: Path) -> None:
        self._check()
        place = RunDirectory(directory, self.stage)
        inputs = self._inputs()
        world = start(self.config.runtime)
        if world.on_main(lambda: place.is_finished(self.settings, seed=self.config.seed, inputs=inputs)):
            return
        require_agreement(world, self._facts(inputs), f"{self.stage}, at its start")
        changes = world.on_main(lambda: place.begin(self.config, self.settings, inputs=inputs, world_size=world.size))
        with catching_signals() as stop:
            beat(f"{self.stage}: building the model")
            model, objective_of = self.build(world)
            if self.settings.effective_zero_stage == 3:
                require_shardable(model, f"{self.stage}.zero_stage", 3, "less than 3")
            model.activation_checkpointing = self.settings.activation_checkpointing
            limits = model.architecture
            corpus, num_dropped = self._fitting(self.corpora[0], "training corpus", limits)
            valid, num_invalid = self._fitting(self.corpora[1], "dev set", limits)
            engine = Engine(objective_of(model), model, self.settings, extra=self.config.deepspeed, world=world)
            if self.settings.compile:  # not before: the engine may have copied the model
                model.compile_stacks()
            frozen = [name for name in self.models if name != "cmlm"] if self.stage == "engine" else []
            trainer = Trainer(
                self.stage, self.settings, self.config, directory, engine=engine, world=world, stop=stop,
                teachers={name: inputs[f"{name} model"] for name in frozen},
                feeder=Feeder(corpus, self.settings.batch, seed=derive(self.config.seed, self.stage), world=world),
                validator=Validator(
                    valid, objective_of, max_tokens=self.settings.batch.max_tokens, bleu=self._bleu_set(limits),
                    seed=self.config.seed, world=world, stopping=lambda: bool(stop),
                ),
            )  # fmt: skip
            for count, what in ((num_dropped, "training pairs"), (num_invalid, "dev pairs")):
                if count:
                    trainer.say(f"{count} {what} are longer than max_positions = {limits.max_positions} and left out")
            for change in changes:
                trainer.say(f"changed since the last start: {change}")
            world.on_main(lambda: self._describe(place, model))
            weights = trainer.train()
            world.on_main(lambda: self._export(directory, place, trainer, type(model), limits, weights()))

    def _check(self) -> None:
        """What can be wrong before any work: names every setting that cannot be met."""
        metric, stop_key = self.settings.early_stop.metric, f"{self.stage}.early_stop.metric"
        known = ["loss", "bleu", "energy", "relaxed_energy"] if self.stage == "engine" else ["loss", "bleu"]
        hint = "Only the engine stage measures energies." if metric not in known else ""
        require(metric in known, stop_key, metric, " or ".join(known), hint)
        require(
            metric != "bleu" or self.settings.valid_bleu_sentences > 0,
            stop_key, metric, "another metric when valid_bleu_sentences = 0",
        )  # fmt: skip
        for corpus in self.corpora:
            corpus.require_vocabularies(
                self.prepared.source_vocabulary.fingerprint, self.prepared.target_vocabulary.fingerprint
            )

    def _inputs(self) -> dict[str, str]:
        inputs = {
            "source vocabulary": self.prepared.source_vocabulary.fingerprint,
            "target vocabulary": self.prepared.target_vocabulary.fingerprint,
            "training corpus": hash_file(self.corpora[0].directory / MANIFEST),
            "dev set": hash_file(self.corpora[1].directory / MANIFEST),
        }
        for name, path in self.models.items():
            inputs[f"{name} model"] = hash_of_model(path)
        return inputs

    def _facts(self, inputs: dict[str, str]) -> dict[str, str]:
        """What every rank must have in common before the first update."""
        settings = {
            "seed": self.config.seed,
            **self.settings.model_dump(mode="json"),
            "deepspeed": self.config.deepspeed,
        }
        versions = {"engine_fast": __version__, "torch": torch.__version__, "operators": ops.implementation()}
        return versions | inputs | {f"{self.stage}.{name}": json.dumps(value) for name, value in settings.items()}

    def _fitting(self, corpus: ParallelCorpus, what: str, limits: AnyArchitecture) -> Any:
        return fitting(corpus, limits, what=what, has_length_classes=self.stage != "teacher")

    def _bleu_set(self, limits: AnyArchitecture) -> BleuSet | None:
        count = min(self.settings.valid_bleu_sentences, len(self.corpora[1]))
        if not count:
            return None
        return BleuSet(
            Subset(self.corpora[1], np.arange(count, dtype=np.int64)),
            [stream[:count] for stream in self.prepared.references("valid")],
            self.prepared.target_vocabulary,
            self.decode,
            limits.max_positions,
            "none" if self.config.data.pretokenised else "13a",
        )

    def _card(self) -> dict[str, Any]:
        """What a model directory says of its origin."""
        card = {"stage": self.stage, "seed": self.config.seed, "settings": self.settings.model_dump(mode="json")}
        if self.stage == "teacher":
            card["right_to_left"] = self.config.teacher.right_to_left
        else:  # what `translate` takes unless told otherwise
            card["length_beam"] = getattr(self.config.evaluate, f"{self.stage}_length_beam")
        return card

    def _describe(self, place: RunDirectory, model: Teacher | Student) -> None:
        vocabularies = self.prepared.source_vocabulary, self.prepared.target_vocabulary
        place.describe(model.kind, model.architecture, *vocabularies, card=self._card())

    def _export(
        self,
        directory: Path,
        place: RunDirectory,
        trainer: Trainer,
        kind: type[Teacher] | type[Student],
        architecture: AnyArchitecture,
        weights: dict[str, Tensor],
    ) -> None:
        vocabularies = self.prepared.source_vocabulary, self.prepared.target_vocabulary
        model = assemble(kind, architecture, *vocabularies, weights, origin=str(directory / "checkpoints"))
        progress = trainer.progress
        card = self._card() | {
            "updates": progress.update,
            "best_update": progress.best_update,
            self.settings.early_stop.metric: progress.best_score,
        }
        save_model(directory / "model", model, *vocabularies, card=card)
        place.finish(updates=progress.update, best_update=progress.best_update, seconds=progress.seconds)


def _seeded(config: RunConfig, settings: TrainConfig) -> RunConfig:
    """With the stage's seed, if it has one, as the run's."""
    return config if settings.seed is None else config.model_copy(update={"seed": settings.seed})


def _one_pass(model: nn.Module, source_BS: Tensor) -> list[list[int]]:
    return [hypothesis.tokens for hypothesis in mask_predict(cast(Student, model), source_BS)]
