"""What preparation did, as data: PrepareReport, kept as report.json beside the corpus."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine_fast.data.batching import Lengths
from engine_fast.errors import DataError

REPORT = "report.json"
VERSION = 1


@dataclass(frozen=True, slots=True)
class SideReport:
    """Lengths of one side in ids, end symbols included."""

    num_ids: int
    mean: float
    median: float
    percentile_95: float
    longest: int
    unknown_share: float
    """<unk> / ids."""

    @classmethod
    def of(cls, lengths: Lengths, num_unknown: int) -> SideReport:
        total = int(lengths.sum(dtype=np.int64))
        if not total:
            return cls(0, 0.0, 0.0, 0.0, 0, 0.0)
        return cls(
            total,
            round(total / len(lengths), 4),
            float(np.median(lengths)),
            float(np.percentile(lengths, 95)),
            int(lengths.max()),
            num_unknown / total,
        )


@dataclass(frozen=True, slots=True)
class SplitReport:
    """One split."""

    read: int
    kept: int
    dropped: dict[str, int]
    """Rule of engine_fast.data.filters -> pairs; empty for valid and test, which keep every line."""
    longer_than_limit: int
    """Kept pairs with a side above filters.max_tokens (valid and test)."""
    num_references: int
    source: SideReport
    target: SideReport


@dataclass(frozen=True, slots=True)
class VocabularyReport:
    """One vocabulary."""

    file: str
    kind: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """Everything report.json says. `seconds` and `reused` belong to the call and are not written."""

    key: str
    """Hash of the settings and of every input file: equal key, equal result."""
    corpus: str
    source_language: str
    target_language: str
    pretokenised: bool
    splits: dict[str, SplitReport]
    vocabularies: dict[str, VocabularyReport]
    """"source" and "target"; the same file when the vocabulary is joint."""
    files: dict[str, str]
    """Vocabulary and text files -> sha256; the shards' hashes stand in their manifests."""
    settings: dict[str, Any]
    """data.vocabulary, data.filters and the other settings that shaped the result."""
    seconds: float = field(default=0.0, compare=False)
    reused: bool = field(default=False, compare=False)

    @property
    def pairs_per_second(self) -> float:
        """Pairs read over all splits a second; 0 when the result was there already."""
        return sum(split.read for split in self.splits.values()) / self.seconds if self.seconds else 0.0

    def to_json(self) -> bytes:
        """Equal inputs give equal bytes."""
        content = asdict(self)
        del content["seconds"], content["reused"]
        return (json.dumps({"version": VERSION, **content}, indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def read(cls, directory: Path) -> PrepareReport:
        """Read report.json. Raises DataError: missing, damaged, of another version."""
        path = directory / REPORT
        hint = "Run engine-fast prepare again."
        try:
            content = json.loads(path.read_bytes())
            if content.pop("version") != VERSION:
                raise DataError(f"{path}: written by another version of engine-fast. {hint}")
            content["splits"] = {name: _split(part) for name, part in content["splits"].items()}
            content["vocabularies"] = {name: VocabularyReport(**part) for name, part in content["vocabularies"].items()}
            return cls(**content)
        except OSError as error:
            raise DataError(f"{path}: no prepared corpus here ({error.strerror}). {hint}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: is damaged ({error}). {hint}") from error


def _split(content: dict[str, Any]) -> SplitReport:
    sides = {side: SideReport(**content[side]) for side in ("source", "target")}
    return SplitReport(**{**content, **sides})
