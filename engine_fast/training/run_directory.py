"""What a stage's directory says about how it came to be: config.yaml, run.json and the vocabulary."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from engine_fast import __version__
from engine_fast.config import ROUNDING_ONLY, AnyArchitecture, RunConfig, TrainConfig, dump_config
from engine_fast.data.atomic import new_directory, write_file
from engine_fast.data.vocabulary import Vocabulary, save_pair
from engine_fast.errors import CheckpointError
from engine_fast.evaluation.files import write_atomic, write_json

VOCABULARY = "vocabulary.json"
"""In vocabulary/: the file and the hash of each side."""
_VERSIONS = ("torch", "deepspeed", "sentencepiece", "sacrebleu", "numpy")


_EXTENDS = {
    "max_updates", "max_epochs", "early_stop", "validate_every", "checkpoint_every", "keep_last", "log_every",
    "valid_bleu_sentences", "average_last", *ROUNDING_ONLY,
}  # fmt: skip
"""Settings that a finished stage may be continued with; with any other it would be another run."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """One stage's directory. Only rank 0 writes."""

    path: Path
    stage: str

    def is_finished(self, settings: TrainConfig, *, seed: int, inputs: dict[str, str]) -> bool:
        """The stage ended, with this very seed, settings and inputs, and its model is there."""
        record = self._record()
        same = record.get("seed") == seed and record.get("inputs") == inputs and not self._changes(record, settings)
        return record.get("finished") is True and same and (self.path / "model" / "config.json").is_file()

    def begin(self, config: RunConfig, settings: TrainConfig, *, inputs: dict[str, str], world_size: int) -> list[str]:
        """Write config.yaml and run.json. Returns one line per setting that differs from the last start.

        Raises CheckpointError if the directory cannot be written to, or holds what this run may not continue: another
        stage, another seed, other inputs, or a finished stage of other settings.
        """
        before = self._record()
        self._check_continues(before, config.seed, inputs)
        changes = self._changes(before, settings)
        other = [change for change in changes if change.split(":")[0].split(".")[1] not in _EXTENDS]
        if before.get("finished") and other:
            raise CheckpointError(
                f"{self.path}: holds this stage, finished with other settings ({other[0]}). "
                "Choose another directory, or remove this one to train again."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path / "config.yaml", dump_config(config))
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be written to ({error.strerror}). Choose another directory."
            ) from error
        self._write(
            stage=self.stage,
            finished=False,
            seed=config.seed,
            inputs=inputs,
            settings=settings.model_dump(mode="json"),
            world_size=world_size,
            versions={"engine_fast": __version__, "python": platform.python_version()}
            | {name: metadata.version(name) for name in _VERSIONS},
            **({"model": before["model"]} if "model" in before else {}),
        )
        return changes

    def _check_continues(self, before: dict[str, Any], seed: int, inputs: dict[str, str]) -> None:
        if not any((self.path / "checkpoints").glob("update-*")):
            return
        held = {"stage": before.get("stage"), "seed": before.get("seed"), **(before.get("inputs") or {})}
        for name, wanted in {"stage": self.stage, "seed": seed, **inputs}.items():
            if held.get(name) != wanted:
                was, now = (str(value)[:12] for value in (held.get(name), wanted))
                raise CheckpointError(
                    f"{self.path}: holds checkpoints of a run whose {name} was {was}; now it is {now}. "
                    "Choose another directory, or remove this one to train again."
                )

    def describe(
        self, kind: str, architecture: AnyArchitecture, source: Vocabulary, target: Vocabulary, *, card: dict[str, Any]
    ) -> None:
        """Keep what besides weights makes a model directory of a checkpoint: `engine-fast export` needs no more."""
        hashes = {"source": source.fingerprint, "target": target.fingerprint}
        with new_directory(self.path / "vocabulary", marker=VOCABULARY) as fresh:
            files = save_pair(fresh, source, target)
            sides = {side: {"file": files[side], "hash": hashes[side]} for side in files}
            write_file(fresh / VOCABULARY, json.dumps(sides, indent=2).encode())
        model = {"kind": kind, "architecture": architecture.model_dump(mode="json"), "card": card}
        self._write(**(self._record() | {"model": model}))

    def finish(self, **results: Any) -> None:
        """Mark the stage as done, with its results."""
        self._write(**(self._record() | {"finished": True} | results))

    def _changes(self, before: dict[str, Any], settings: TrainConfig) -> list[str]:
        if "settings" not in before:
            return []
        pairs = _differences(before["settings"], settings.model_dump(mode="json"), self.stage)
        return [f"{key}: {was!r} -> {now!r}" for key, was, now in pairs]

    def _record(self) -> dict[str, Any]:
        return read_record(self.path)

    def _write(self, **record: Any) -> None:
        try:
            write_json(self.path / "run.json", record)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be written to ({error.strerror}). Choose another directory."
            ) from error


def read_record(directory: Path) -> dict[str, Any]:
    """What run.json of a stage's directory says; {} without a readable one."""
    try:
        record = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _differences(old: Any, new: Any, key: str) -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        return [item for name in names for item in _differences(old.get(name), new.get(name), f"{key}.{name}")]
    return [] if old == new else [(key, old, new)]
