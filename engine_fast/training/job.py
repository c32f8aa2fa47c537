"""One trained stage, whichever it is: what the three have in common around the loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine_fast import __version__, ops
from engine_fast.config import AnyArchitecture, RunConfig, TrainConfig
from engine_fast.data.atomic import sha256_of
from engine_fast.data.corpus import ParallelCorpus
from engine_fast.data.prepared import Prepared
from engine_fast.data.shards import MANIFEST
from engine_fast.distributed import Engine, World, require_agreement, start
from engine_fast.distributed.presence import beat
from engine_fast.errors import require
from engine_fast.models import Student, Teacher, save_model
from engine_fast.models.store import fingerprint, stage_model
from engine_fast.training.export import assemble
from engine_fast.training.feeding import Feeder, Subset, fitting
from engine_fast.training.interrupt import catching_signals
from engine_fast.training.loop import StageName, Trainer
from engine_fast.training.networks import require_shardable
from engine_fast.training.run_directory import RunDirectory
from engine_fast.training.seeding import derive
from engine_fast.training.validation import BleuSet, Decode, Validator


@dataclass
class Job:
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
        """Bring the stage in `directory` to its end; it is left alone if it is there already."""
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
            limits, objective = model.architecture, objective_of(model)
            longest = min(network.max_positions for network in (model, *getattr(objective, "teachers", ())))
            corpus, num_dropped = self._fitting(self.corpora[0], "training corpus", longest)
            valid, num_invalid = self._fitting(self.corpora[1], "dev set", longest)
            engine = Engine(objective, model, self.settings, extra=self.config.deepspeed, world=world)
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
                    trainer.say(f"{count} {what} are longer than max_positions = {longest} and left out")
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
            "training corpus": sha256_of(self.corpora[0].directory / MANIFEST),
            "dev set": sha256_of(self.corpora[1].directory / MANIFEST),
        }
        for name, path in self.models.items():
            inputs[f"{name} model"] = fingerprint(stage_model(path))
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

    def _fitting(self, corpus: ParallelCorpus, what: str, longest: int) -> Any:
        return fitting(corpus, longest, what=what, has_length_classes=self.stage != "teacher")

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
