"""A teacher that exists already, in the place of one that is trained (teacher.pretrained)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from engine_fast.config import PretrainedConfig, RunConfig
from engine_fast.data.atomic import sha256_of
from engine_fast.data.prepared import Prepared
from engine_fast.data.text import expand_path
from engine_fast.data.vocabulary import Vocabulary
from engine_fast.distributed import start
from engine_fast.errors import VocabularyError, require
from engine_fast.models.huggingface.importing import Origin, import_huggingface, read_vocabularies
from engine_fast.models.store import (
    is_model_directory,
    load_model,
    load_vocabularies,
    require_kind,
    save_model,
)


def vocabularies_of(pretrained: PretrainedConfig) -> tuple[Vocabulary, Vocabulary]:
    """Those of source and target that its model directory has, or will have; no weights are read.

    Raises CheckpointError: not there, not reachable, not usable; VocabularyError.
    """
    ours = _own_directory(pretrained)
    return read_vocabularies(_origin(pretrained)) if ours is None else load_vocabularies(ours)


def files_of(pretrained: PretrainedConfig) -> dict[str, str]:
    """Name -> sha256 of what stands in its directory, so that a change is noticed; {} for a name on the hub."""
    directory = _own_directory(pretrained) or expand_path(pretrained.path)
    files = (path for path in sorted(directory.glob("*")) if path.is_file())
    return {path.name: _sha256(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def described(pretrained: PretrainedConfig) -> dict[str, Any]:
    """What of it decides the vocabularies and the weights, for the keys of stages."""
    return {"pretrained": pretrained.model_dump(mode="json", exclude_none=True), "files": files_of(pretrained)}


def install_teacher(config: RunConfig, prepared: Prepared, directory: Path) -> None:
    """Write directory/model: the teacher of teacher.pretrained, checked and in our form. Rank 0 works, the others wait.

    Raises VocabularyError when the corpus was prepared with other vocabularies; ConfigError; as import_huggingface.
    """
    pretrained = config.teacher.pretrained
    assert pretrained is not None, "there is a teacher to be trained"
    require(
        not config.teacher.right_to_left,
        "teacher.right_to_left", True, "false with teacher.pretrained", "How it reads is known from its own directory.",
    )  # fmt: skip

    def install() -> None:
        for side, own, wanted in zip(
            ("source", "target"),
            vocabularies_of(pretrained),
            (prepared.source_vocabulary, prepared.target_vocabulary),
            strict=True,
        ):
            if own.fingerprint != wanted.fingerprint:
                raise VocabularyError(
                    f"teacher.pretrained.path = {pretrained.path}: its {side} vocabulary is {own.fingerprint[:12]}, "
                    f"the corpus was prepared with {wanted.fingerprint[:12]}. Prepare it with this configuration."
                )
        ours = _own_directory(pretrained)
        if ours is None:
            longest = import_huggingface(_origin(pretrained), directory / "model").max_positions
        else:
            loaded = load_model(ours, kind="teacher")
            card = loaded.card | {"pretrained": pretrained.path}
            save_model(directory / "model", loaded.model, loaded.source_vocabulary, loaded.target_vocabulary, card=card)
            longest = loaded.model.max_positions
        positions = config.cmlm.architecture.max_positions
        require(
            positions <= longest,
            "cmlm.architecture.max_positions", positions, f"at most {longest}, the longest side of the given teacher",
        )  # fmt: skip

    start(config.runtime).on_main(install)


@cache
def _sha256(path: Path, size: int, modified: int) -> str:
    """Once for all trials of a sweep; size and time say which content it was."""
    return sha256_of(path)


def _own_directory(pretrained: PretrainedConfig) -> Path | None:
    """Where it is a model directory of ours, or the directory of a stage around one."""
    path = expand_path(pretrained.path)
    found = next((place for place in (path, path / "model") if is_model_directory(place)), None)
    if found is not None:
        for name in ("revision", "source_language", "target_language", "prompt"):
            value = getattr(pretrained, name)
            require(not value, f"teacher.pretrained.{name}", value, f"none: {path} was imported with its own")
        require_kind(found, "teacher")
    return found


def _origin(pretrained: PretrainedConfig) -> Origin:
    path = expand_path(pretrained.path)
    return Origin(**pretrained.model_dump() | {"path": str(path) if path.exists() else pretrained.path})
