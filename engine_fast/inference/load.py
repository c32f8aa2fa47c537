"""From a directory to a translator: device, precision, the teacher that reranks, what the model's card advises."""

from __future__ import annotations

import os
import warnings
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine_fast.data.vocabulary import Vocabulary
from engine_fast.decoding import DecodeSettings, Rescore, Translator
from engine_fast.energies import discrete_energy
from engine_fast.errors import ConfigError, VocabularyError, require
from engine_fast.models import (
    LoadedModel,
    Network,
    Precision,
    Student,
    Teacher,
    load_model,
    set_precision,
    use_cuda_graphs,
)

LENGTH_BEAM = 3
"""Length candidates of a student whose card names none."""
CPU_TOKENS = 2048
"""max_tokens of a student on a CPU: larger batches take more memory for at most a seventh more speed (NOTES.md)."""
_ONLY_STUDENT = ("iterations", "length_beam")
_ONLY_TEACHER = ("beam", "length_penalty")


def load(
    path: str | Path,
    *,
    teacher: str | Path | None = None,
    device: torch.device | str = "auto",
    precision: Precision = "fp32",
    cuda_graphs: bool = False,
    **settings: Any,
) -> Translator:
    """The model in a directory, ready to translate: `load(path).translate(["Ein Satz."])`.

    Args: path: what train, import or export wrote; a student or a teacher.
        teacher (students only): directory of the teacher that chooses the length candidate of least energy per token.
        device: auto (a GPU where there is one), cpu, cuda, cuda:N. precision: fp32, bf16, or on a CPU int8, of model
        and teacher (see set_precision). cuda_graphs: on a GPU, both launch recorded graphs (see use_cuda_graphs).
        settings: fields of DecodeSettings. Left out: length_beam is the model card's, else 3; a beam holds n_best;
        max_tokens is CPU_TOKENS for a student on a CPU; max_positions is at most the model's and the teacher's.
    Warns of what has no effect on this kind of model. No gradients: the weights are frozen.
    Raises CheckpointError for a directory that is missing, damaged or of another kind, VocabularyError for a teacher
    with another vocabulary, ConfigError for a setting, a device or a precision that does not exist.
    """
    known = [field.name for field in fields(DecodeSettings)]
    for name in settings:
        near = [f"Did you mean {each!r}?" for each in get_close_matches(name, known, 1)]
        require(name in known, "setting", name, f"one of {', '.join(known)}", "".join(near))
    where = pick_device(device)
    loaded = load_model(path, device=where)
    _prepare(loaded.model, precision, cuda_graphs)
    _warn_without_effect(loaded.model, settings, has_teacher=teacher is not None)
    positions = [loaded.model.max_positions]
    rescore: Rescore | None = None
    if teacher is not None and isinstance(loaded.model, Student):
        judge = load_model(teacher, device=where, kind="teacher")
        _prepare(judge.model, precision, cuda_graphs)
        rescore = _rescorer(loaded, judge)
        positions.append(judge.model.max_positions)
    if settings.get("max_positions") is not None:
        positions.append(settings["max_positions"])
    n_best, length_beam = settings.get("n_best", 1), loaded.card.get("length_beam", LENGTH_BEAM)
    usable = type(length_beam) is int and length_beam >= 1
    require(usable, f"{path}: card.length_beam", length_beam, "a number of candidates, at least 1")
    advised = {"beam": max(DecodeSettings().beam, n_best), "length_beam": max(length_beam, n_best)}
    if where.type == "cpu" and isinstance(loaded.model, Student):
        advised["max_tokens"] = CPU_TOKENS
    return Translator(loaded, DecodeSettings(**advised | settings | {"max_positions": min(positions)}), rescore)


def _prepare(model: Network, precision: Precision, cuda_graphs: bool) -> None:
    require(isinstance(cuda_graphs, bool), "cuda_graphs", cuda_graphs, "true or false")
    set_precision(model, precision)
    if cuda_graphs:
        use_cuda_graphs(model)


def pick_device(device: torch.device | str) -> torch.device:
    """auto: a GPU where there is one. Of several GPUs each rank of a launcher takes its own. Raises ConfigError."""
    try:
        asked = None if device == "auto" else torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device = {device!r}, expected auto, cpu, cuda or cuda:N.") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked is None:
        asked = torch.device("cuda" if count else "cpu")
    require(asked.type in ("cpu", "cuda"), "device", device, "auto, cpu, cuda or cuda:N")
    if asked.type == "cpu":
        return asked
    hint = "Use auto or cpu, or see `engine-fast doctor`."
    require(count > 0, "device", str(asked), "auto or cpu, for this torch sees no GPU", hint)
    index = int(os.environ.get("LOCAL_RANK", "0")) if asked.index is None else asked.index
    require(index < count, "device", f"cuda:{index}", f"one of the {count} GPUs that this process sees", hint)
    return torch.device("cuda", index)


def _rescorer(student: LoadedModel, judge: LoadedModel) -> Rescore:
    for side in ("source", "target"):
        own: Vocabulary = getattr(student, f"{side}_vocabulary")
        other: Vocabulary = getattr(judge, f"{side}_vocabulary")
        if own.fingerprint != other.fingerprint:
            raise VocabularyError(
                f"the teacher's {side} vocabulary is {other.fingerprint[:12]}, the student's {own.fingerprint[:12]}. "
                "Rerank with the teacher that the student was trained with."
            )
    assert isinstance(judge.model, Teacher)
    return partial(discrete_energy, judge.model)


def _warn_without_effect(model: Network, settings: dict[str, Any], *, has_teacher: bool) -> None:
    if isinstance(model, Student):
        ignored = [name for name in _ONLY_TEACHER if name in settings and not (has_teacher and name != "beam")]
    else:
        ignored = [name for name in _ONLY_STUDENT if name in settings] + ["teacher"] * has_teacher
    if ignored:
        warnings.warn(f"{', '.join(ignored)}: without effect on a {model.kind} model", stacklevel=3)
