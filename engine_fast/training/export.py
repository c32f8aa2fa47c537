"""What others can run, from a stage's checkpoints, finished or not, or from a model directory: no DeepSpeed, no GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from engine_fast.config import AnyArchitecture
from engine_fast.data.vocabulary import Vocabulary, load_vocabulary
from engine_fast.distributed import CheckpointStore, Snapshot, World
from engine_fast.errors import CheckpointError, ConfigError, VocabularyError, require
from engine_fast.inference.card import FORMS, find_evaluation, model_card
from engine_fast.inference.ctranslate2 import export_ctranslate2
from engine_fast.inference.onnx import export_onnx
from engine_fast.models import LoadedModel, Student, Teacher, load_model, save_model
from engine_fast.models.store import KINDS, WithoutRandomFill, is_model_directory, read_architecture, stage_model
from engine_fast.training.run_directory import VOCABULARY, read_record

_TRIES = 5


def export(
    source: Path,
    to: Path,
    checkpoint: str | None = None,
    *,
    form: str = "safetensors",
    quantization: str = "float32",
    say: Callable[[str], None],
) -> str:
    """Write `to` from a stage's directory or a model directory; returns what the weights were taken from.

    source: a stage that took over its teacher (teacher.pretrained) has a model and no checkpoints.
    checkpoint (stages only): "best", the default, "latest" (the newest whole one; `say` hears of damaged ones), or a
    name such as "update-00000500", or "update-500". Checksums are compared before.
    form: one of FORMS; quantization: what that form stores weights as. README.md holds the scores of a run that
    evaluated these weights. `to` is replaced only by a whole directory, and only if an export or a model stands there.
    Raises CheckpointError, VocabularyError, ConfigError, DataError.
    """
    require(form in FORMS, "--format", form, f"one of {', '.join(FORMS)}")
    place = to.resolve()
    of_stage = place.name == "model" and ((place.parent / "stage.json").is_file() or bool(read_record(place.parent)))
    if of_stage or place == source.resolve():
        raise ConfigError(f"--to {to}: is a stage's own model, or what is exported. Choose another directory.")
    if form == "safetensors":
        require(quantization == "float32", "--quantization", quantization, "float32", "load() has a precision for it.")
        if to.exists() and not is_model_directory(to) and (not to.is_dir() or any(to.iterdir())):
            raise ConfigError(f"--to {to}: exists, and is no model directory. Choose another directory.")
    model = stage_model(source)
    if not read_record(source) and is_model_directory(model):
        if checkpoint is not None:
            raise ConfigError(f"--checkpoint {checkpoint}: {source} has a model, and no checkpoints. Leave it out.")
        loaded, name = load_model(model), str(model)
    else:
        loaded, name = _from_checkpoint(source, checkpoint or "best", say)
    evaluation = find_evaluation(model, loaded)
    readme = model_card(loaded, form=form, evaluation=evaluation, quantization=quantization)
    if form == "ctranslate2":
        export_ctranslate2(to, loaded, readme=readme, quantization=quantization)
    elif form == "onnx":
        export_onnx(to, loaded, readme=readme, quantization=quantization)
    else:
        vocabularies = loaded.source_vocabulary, loaded.target_vocabulary
        save_model(to, loaded.model, *vocabularies, card=loaded.card, readme=readme)
    return name


def _from_checkpoint(stage: Path, checkpoint: str, say: Callable[[str], None]) -> tuple[LoadedModel, str]:
    """The model of a stage's snapshot, and the snapshot's name."""
    record = _described(stage)
    store = CheckpointStore(stage / "checkpoints", world=World(0, 1, torch.device("cpu")))
    name = _find(store, checkpoint, say)
    description = record["model"]
    source, target = _vocabulary(stage / "vocabulary", "source"), _vocabulary(stage / "vocabulary", "target")
    try:
        architecture = read_architecture(description["kind"], description["architecture"])
    except ValidationError as error:
        raise CheckpointError(f"{stage / 'run.json'}: the architecture cannot be used ({error}).") from error
    origin, weights = str(store.directory / name), store.weights(name)
    model = assemble(KINDS[description["kind"]], architecture, source, target, weights, origin=origin).eval()
    card = description["card"] | {"checkpoint": name}
    if isinstance(model, Teacher):
        model.right_to_left = bool(card.get("right_to_left"))
    return LoadedModel(model, source, target, card), name


def assemble(
    kind: type[Teacher] | type[Student],
    architecture: AnyArchitecture,
    source: Vocabulary,
    target: Vocabulary,
    weights: dict[str, Tensor],
    *,
    origin: str,
) -> Teacher | Student:
    """A model with a snapshot's weights. Raises CheckpointError that names a tensor which does not fit."""
    with WithoutRandomFill():
        model = kind(architecture, len(source), len(target))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in weights or weights[name].shape != parameter.shape:
                found = tuple(weights[name].shape) if name in weights else "nothing"
                raise CheckpointError(f"{origin}: tensor {name}: {found}, expected shape {tuple(parameter.shape)}.")
            parameter.copy_(weights[name])
    return model


def _described(stage: Path) -> dict[str, Any]:
    record = read_record(stage)
    if not record:
        raise CheckpointError(f"{stage}: no readable run.json here. Give the directory of a trained stage.")
    if "model" not in record:
        raise CheckpointError(
            f"{stage}: run.json does not describe the model: an older engine-fast wrote it. If the stage is finished, "
            "take its model directory; otherwise continue it first."
        )
    return record


def _find(store: CheckpointStore, checkpoint: str, say: Callable[[str], None]) -> str:
    """Name of a snapshot that is there."""
    if checkpoint == "latest":
        snapshot = _newest(store, say)
        if snapshot is None:
            raise CheckpointError(f"{store.directory}: no checkpoint yet. Wait for the first one.")
        return snapshot.directory.name
    kept = sorted(path.name for pattern in ("best-*", "update-*") for path in store.directory.glob(pattern))
    if checkpoint == "best":
        best = [name for name in kept if name.startswith("best-")]
        if not best:
            raise CheckpointError(f"{store.directory}: nothing was validated yet. Take --checkpoint latest.")
        return best[-1]  # the earlier ones belong to earlier checkpoints
    kind, _, number = checkpoint.partition("-")
    name = f"{kind}-{int(number):08d}" if number.isdigit() else checkpoint
    if name not in kept:
        raise CheckpointError(
            f"--checkpoint {checkpoint}: not in {store.directory}, which holds {', '.join(kept) or 'none'}. "
            "Take best, latest or one of these."
        )
    return name


def _newest(store: CheckpointStore, say: Callable[[str], None]) -> Snapshot | None:
    """The newest whole snapshot, also of a run that goes on, replaces what is being read and removes it."""
    for _ in range(_TRIES):
        names = store.updates()
        try:
            return store.newest(say)
        except CheckpointError:
            if store.updates() == names:
                raise
    return store.newest(say)


def _vocabulary(directory: Path, side: str) -> Vocabulary:
    try:
        entry = json.loads((directory / VOCABULARY).read_text(encoding="utf-8"))[side]
    except (OSError, ValueError, KeyError) as error:
        raise VocabularyError(
            f"{directory / VOCABULARY}: cannot be read ({error}). Continue the stage first."
        ) from error
    vocabulary = load_vocabulary(directory / entry["file"])
    if vocabulary.fingerprint != entry["hash"]:
        raise VocabularyError(
            f"{directory / entry['file']}: hash {vocabulary.fingerprint[:12]}, but the stage was trained with "
            f"{entry['hash'][:12]}. The file was changed: put the original back, or continue the stage first."
        )
    return vocabulary
