"""What was measured so far, kept file by file, so that an interrupted evaluation goes on with the next system.

<directory>/outputs/<label>.txt     a system's translations, one a line
<directory>/systems/<label>.json    its row, the hash of its translations, and the key: hash of what decides both
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine_fast.evaluation.files import write_atomic, write_json
from engine_fast.evaluation.systems import System

FORMAT = 1
"""Raise when a record's fields change in meaning."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One system on one split."""

    row: dict[str, Any]
    """Its object in results.json, or as much of it as is known."""
    lengths: dict[str, int]
    """Tokens, end symbol included -> translations of that length."""
    text: list[str]
    """Its translations; none holds a line break."""


class Records:
    """The records of one directory. `inputs`: everything but the system itself that decides a measurement, as JSON."""

    def __init__(self, directory: Path, inputs: dict[str, Any]) -> None:
        self._outputs, self._systems = directory / "outputs", directory / "systems"
        self._inputs = inputs

    def load(self, system: System) -> Measured | None:
        """None unless the record is there, was made from the same inputs, and the translations are what they were."""
        try:
            tree = json.loads((self._systems / f"{system.label}.json").read_text(encoding="utf-8"))
            if tree["key"] != self._key(system):
                return None
            content = (self._outputs / f"{system.label}.txt").read_bytes()
            if hashlib.sha256(content).hexdigest() != tree["sha256"]:
                return None
            return Measured(tree["row"], tree["lengths"], content.decode("utf-8").split("\n")[:-1])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def store(self, system: System, measured: Measured) -> None:
        """Write the translations, then the record: its presence says that both are whole."""
        content = as_lines(measured.text).encode("utf-8")
        write_atomic(self._outputs / f"{system.label}.txt", content)
        found = {"sha256": hashlib.sha256(content).hexdigest(), "row": measured.row, "lengths": measured.lengths}
        write_json(self._systems / f"{system.label}.json", {"key": self._key(system), **found})

    def _key(self, system: System) -> str:
        tree = [FORMAT, asdict(system), self._inputs]
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def as_lines(text: Sequence[str]) -> str:
    """The content of a text file, one element a line."""
    return "".join(f"{line}\n" for line in text)
