"""The further teachers of an ensemble, as engine.ensemble names them."""

from __future__ import annotations

from pathlib import Path

from engine_fast.config import EngineConfig
from engine_fast.data.text import expand_path
from engine_fast.errors import require
from engine_fast.models.store import WEIGHTS, fingerprint, require_kind, stage_model


def member_directories(config: EngineConfig) -> list[Path]:
    """Their model directories; `~` and `${NAME}` in paths are replaced.

    Raises ConfigError where one is missing, CheckpointError where one is no teacher.
    """
    found = []
    for number, member in enumerate(config.ensemble):
        path = expand_path(member.path)
        directory = stage_model(path)
        require(
            (directory / "config.json").is_file() and (directory / WEIGHTS).is_file(),
            f"engine.ensemble[{number}].path", member.path, "a teacher's model directory, or the stage's around one",
            f"There must be config.json and {WEIGHTS}; train that teacher first.",
        )  # fmt: skip
        require_kind(directory, "teacher")
        found.append(directory)
    return found


def member_hashes(config: EngineConfig) -> list[str]:
    """Their fingerprints: with another teacher under the same name a stage's result is another."""
    return [fingerprint(directory) for directory in member_directories(config)]
