"""The further teachers of an ensemble, as engine.ensemble names them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from engine_fast.config import EngineConfig
from engine_fast.data.text import expand_path
from engine_fast.errors import require
from engine_fast.models.store import WEIGHTS


def member_directories(config: EngineConfig) -> list[Path]:
    """Their model directories; `~` and `${NAME}` in paths are replaced. Raises ConfigError where one is missing."""
    found = []
    for number, member in enumerate(config.ensemble):
        path = expand_path(member.path)
        directory = path / "model" if (path / "model" / "config.json").is_file() else path
        require(
            (directory / "config.json").is_file() and (directory / WEIGHTS).is_file(),
            f"engine.ensemble[{number}].path", member.path, "a teacher's model directory, or the stage's around one",
            f"There must be config.json and {WEIGHTS}; train that teacher first.",
        )  # fmt: skip
        found.append(directory)
    return found


def member_hashes(config: EngineConfig) -> list[str]:
    """sha256 of their weights: with another teacher under the same name a stage's result is another."""
    hashes = []
    for directory in member_directories(config):
        with (directory / WEIGHTS).open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes
