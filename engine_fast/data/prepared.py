"""A prepared corpus, opened: vocabularies, id shards and the raw text of the held-out splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine_fast.data.atomic import sha256_of
from engine_fast.data.corpus import ParallelCorpus
from engine_fast.data.report import PrepareReport
from engine_fast.data.text import iter_lines
from engine_fast.data.vocabulary import Vocabulary, load_vocabulary
from engine_fast.errors import DataError


def source_file(split: str) -> str:
    """Name of a held-out split's source text inside the directory."""
    return f"{split}.source.txt"


def reference_file(split: str, number: int) -> str:
    """Name of a held-out split's reference stream `number`."""
    return f"{split}.reference{number}.txt"


class Prepared:
    """What engine_fast.data.prepare.prepare() left in a directory."""

    def __init__(self, directory: Path, report: PrepareReport, source: Vocabulary, target: Vocabulary) -> None:
        self.directory = directory
        self.source_vocabulary = source
        """Of the source side."""
        self.target_vocabulary = target
        """Of the target side; the same object when the vocabulary is joint."""
        self._report = report
        self._corpora: dict[str, ParallelCorpus] = {}

    @classmethod
    def open(cls, directory: Path) -> Prepared:
        """Check and open. Raises DataError: nothing there, a text or vocabulary file missing or changed."""
        report = PrepareReport.read(directory)
        for name, digest in report.files.items():
            if sha256_of(directory / name) != digest:
                raise DataError(
                    f"{directory / name}: its checksum is not the recorded one. Run engine-fast prepare again."
                )
        files = {side: report.vocabularies[side].file for side in ("source", "target")}
        source = load_vocabulary(directory / files["source"])
        joint = files["source"] == files["target"]
        return cls(directory, report, source, source if joint else load_vocabulary(directory / files["target"]))

    @property
    def report(self) -> dict[str, Any]:
        """report.json as plain data."""
        content: dict[str, Any] = json.loads(self._report.to_json())
        return content

    @property
    def joint(self) -> bool:
        """Whether both sides share one vocabulary."""
        return self.source_vocabulary is self.target_vocabulary

    def split(self, split: str) -> ParallelCorpus:
        """Ids of "train", "valid" or "test", verified once. Raises DataError, VocabularyError."""
        if split not in self._corpora:
            self._known(split)
            corpus = ParallelCorpus.open(self.directory / split)
            corpus.require_vocabularies(self.source_vocabulary.fingerprint, self.target_vocabulary.fingerprint)
            self._corpora[split] = corpus
        return self._corpora[split]

    def sources(self, split: str) -> list[str]:
        """Normalised source lines; of the training split decoded from its ids, since its text is not kept."""
        if split == "train":
            corpus = self.split(split)
            return [self.source_vocabulary.decode(corpus.source(index)) for index in range(len(corpus))]
        return self._lines(split, source_file(split))

    def references(self, split: str) -> list[list[str]]:
        """Reference streams, each with one line per sentence; the generated corpus has two: mode A, mode B."""
        if split == "train":
            corpus = self.split(split)
            return [[self.target_vocabulary.decode(corpus.target(index)) for index in range(len(corpus))]]
        self._known(split)
        count = self._report.splits[split].num_references
        return [self._lines(split, reference_file(split, number)) for number in range(count)]

    def is_valid_translation(self, split: str) -> list[frozenset[str]] | None:
        """The right translations of each sentence of the generated corpus; None for real text, which has none."""
        if self._report.corpus != "synthetic" or split == "train":
            return None
        return [frozenset(pair) for pair in zip(*self.references(split), strict=True)]

    def _known(self, split: str) -> None:
        if split not in self._report.splits:
            raise DataError(f"{self.directory}: has no split {split!r}, expected {', '.join(self._report.splits)}.")

    def _lines(self, split: str, name: str) -> list[str]:
        self._known(split)
        return list(iter_lines(self.directory / name))
