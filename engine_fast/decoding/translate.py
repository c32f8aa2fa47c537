"""Text in, text out: a stream of lines through a model, in batches of similar length, in the order they came."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine_fast.data.symbols import EOS, MASK, PAD
from engine_fast.data.vocabulary import Vocabulary
from engine_fast.decoding.autoregressive import NEVER_EMITTED, MaxLength
from engine_fast.decoding.generate import generate
from engine_fast.decoding.hypothesis import Hypothesis
from engine_fast.decoding.mask_predict import Rescore, mask_predict_n_best
from engine_fast.errors import DataError, require
from engine_fast.models import LoadedModel, Student, Teacher

Ids = Sequence[int] | NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """How to decode. A teacher reads beam to max_length, a student iterations and length_beam, both the rest."""

    beam: int = 5
    """Hypotheses of the teacher's beam search; 1 = greedy."""
    max_length: MaxLength = (1.2, 10.0)
    """(a, b): at most a * S + b words, S the source's tokens."""
    iterations: int = 1
    """Mask-predict passes of the student."""
    length_beam: int = 3
    """Length candidates of the student."""
    length_penalty: float = 1.0
    """A teacher's log-probability, in search and in reranking, is divided by length to this power."""
    n_best: int = 1
    """Hypotheses kept per sentence."""
    max_tokens: int = 8192
    """Source tokens, padding included, times beam or length_beam, per batch; a longer sentence goes alone."""
    window: int = 4096
    """Lines read before the first is written; sorted by length among themselves."""
    max_positions: int | None = None
    """Longest source, and a student's longest candidate, in tokens, end symbol included; at most the model's own."""
    too_long: Literal["truncate", "refuse"] = "truncate"
    """What happens to a longer source."""

    def __post_init__(self) -> None:
        for key in ("beam", "iterations", "length_beam", "n_best", "max_tokens", "window"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        require(self.length_penalty >= 0, "length_penalty", self.length_penalty, "0 or more")
        require(self.too_long in ("truncate", "refuse"), "too_long", self.too_long, "truncate or refuse")
        positions = self.max_positions
        require(positions is None or positions >= 2, "max_positions", positions, "at least 2 (a word and the end)")


@dataclass(slots=True)
class TranslateReport:
    """What became of the lines of the last stream, so far."""

    num_lines: int = 0
    num_empty: int = 0
    """Lines without a piece; their translation is an empty line."""
    num_truncated: int = 0
    """Sources cut to the model's positions."""
    first_truncated: int | None = None
    """Number of the first such line, counted from 1."""


@dataclass(slots=True)
class Translator:
    """A loaded model with decoding settings.

    rescore (students only): energies that choose among the length candidates, see mask_predict_n_best.
    """

    loaded: LoadedModel
    settings: DecodeSettings = DecodeSettings()
    rescore: Rescore | None = None
    report: TranslateReport = field(default_factory=TranslateReport)

    def __post_init__(self) -> None:
        width = self.width
        name = "beam" if isinstance(self.loaded.model, Teacher) else "length_beam"
        require(self.settings.n_best <= width, "n_best", self.settings.n_best, f"at most {name} = {width}")
        if self.rescore is not None and isinstance(self.loaded.model, Teacher):
            warnings.warn("a teacher's beam search has no length candidates: rescore has no effect", stacklevel=3)

    @property
    def width(self) -> int:
        """Hypotheses decoded at once per sentence."""
        return self.settings.beam if isinstance(self.loaded.model, Teacher) else self.settings.length_beam

    @property
    def max_positions(self) -> int:
        own = self.loaded.model.max_positions
        return own if self.settings.max_positions is None else min(own, self.settings.max_positions)

    def translate(self, sentences: Sequence[str]) -> list[str]:
        """The translation of each sentence, in order. An empty one stays empty. Raises DataError as stream()."""
        if isinstance(sentences, str):
            raise DataError(f"translate got one string, {sentences[:40]!r}, expected a list of them. Put it in [ ].")
        return list(self.stream(sentences))

    def stream(self, lines: Iterable[str], *, lengths: Iterable[int] | None = None) -> Iterator[str]:
        """One line out for each line in, in order; at most settings.window lines are held. Empty lines stay empty.

        lengths: known target length of every line in tokens, end symbol included (students only).
        Raises DataError for a line too long (too_long = refuse), or for fewer lengths than lines.
        """
        for translations in self.translate_n_best(lines, lengths=lengths):
            yield translations[0][0]

    def translate_n_best(
        self, lines: Iterable[str], *, lengths: Iterable[int] | None = None
    ) -> Iterator[list[tuple[str, Hypothesis]]]:
        """Up to n_best (text, hypothesis) pairs per line, best first; always at least one."""
        reader = iter(lines)
        known = None if lengths is None else iter(lengths)
        decode = self.loaded.target_vocabulary.decode
        self.report = TranslateReport()
        try:
            while window := list(islice(reader, self.settings.window)):
                sizes = None if known is None else list(islice(known, len(window)))
                for found in self._search_window(window, sizes):
                    yield [(decode(h.tokens).replace("\n", " "), h) for h in found]
        finally:
            if self.report.num_truncated:
                warnings.warn(
                    f"{self.report.num_truncated} of {self.report.num_lines} sources, the first in line "
                    f"{self.report.first_truncated}, were longer than {self.max_positions} tokens and were truncated. "
                    "Split them, or train with more positions.",
                    stacklevel=2,
                )

    def translate_ids(self, sources: Sequence[Ids], *, lengths: Sequence[int] | None = None) -> list[Hypothesis]:
        """The best hypothesis of each source. Sources are ids that end in EOS."""
        return [found[0] for found in self.search(sources, lengths=lengths)]

    def search(
        self,
        sources: Sequence[Ids],
        *,
        lengths: Sequence[int] | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> list[list[Hypothesis]]:
        """Up to n_best hypotheses of each source, in order. A source that is EOS alone becomes EOS alone.

        Batches hold sources of similar length; which ones share a batch depends on the sources alone.
        advance: called with the number of sources just done, for a progress bar.
        Raises DataError for a source too long (too_long = refuse) that gives its place, counted from 1.
        """
        if lengths is not None and len(lengths) != len(sources):
            raise DataError(f"{len(lengths)} target lengths for {len(sources)} sources. Give one length per source.")
        self.report = TranslateReport()
        return self._search(sources, lengths, advance)

    def _search(
        self, sources: Sequence[Ids], lengths: Sequence[int] | None, advance: Callable[[int], None] | None = None
    ) -> list[list[Hypothesis]]:
        limit = self.max_positions
        first = self.report.num_lines + 1
        rows: list[list[int]] = []
        for number, source in enumerate(sources, first):
            row = [int(token) for token in source]
            if len(row) > limit:
                row = self._cut(row, number)
            rows.append(row)
        self.report.num_lines += len(rows)
        results: list[list[Hypothesis]] = [[Hypothesis([EOS], 0.0, 0.0)] for _ in rows]
        filled = [i for i, row in enumerate(rows) if len(row) > 1]
        num_empty = len(rows) - len(filled)
        self.report.num_empty += num_empty
        if advance is not None and num_empty:
            advance(num_empty)
        for batch in plan_batches([len(rows[i]) for i in filled], self.settings.max_tokens // self.width):
            chosen = [filled[position] for position in batch]
            sizes = None if lengths is None else [lengths[i] for i in chosen]
            for i, found in zip(chosen, self._search_batch([rows[i] for i in chosen], sizes), strict=True):
                results[i] = found
            if advance is not None:
                advance(len(batch))
        return results

    def _search_window(self, window: list[str], sizes: list[int] | None) -> list[list[Hypothesis]]:
        if sizes is not None and len(sizes) < len(window):
            done = self.report.num_lines + len(sizes)
            raise DataError(f"target lengths end after line {done}, the input goes on. Give one length per line.")
        encoded = self.loaded.source_vocabulary.encode_batch(window)
        return self._search([[*ids, EOS] for ids in encoded], sizes)

    def _search_batch(self, rows: list[list[int]], sizes: list[int] | None) -> list[list[Hypothesis]]:
        model, settings = self.loaded.model, self.settings
        device = next(model.parameters()).device
        source_BS = pad_rows(rows).to(device)
        if isinstance(model, Student):
            ranked = mask_predict_n_best(
                model,
                source_BS,
                iterations=settings.iterations,
                length_beam=settings.length_beam,
                lengths=None if sizes is None else torch.tensor(sizes, device=device),
                max_length=self.max_positions,
                rescore=self.rescore,
                length_penalty=settings.length_penalty,
            )
            return [hypotheses[: settings.n_best] for hypotheses in ranked]
        if sizes is not None:
            raise DataError("target lengths are known only to a student. Leave them out for a teacher's beam search.")
        return generate(
            model,
            source_BS,
            beam=settings.beam,
            n_best=settings.n_best,
            length_penalty=settings.length_penalty,
            max_length=settings.max_length,
            forbidden=never_emitted(self.loaded.target_vocabulary),
        )

    def _cut(self, row: list[int], number: int) -> list[int]:
        limit = self.max_positions
        if self.settings.too_long == "refuse":
            raise DataError(
                f"line {number}: {len(row)} tokens, end symbol included, and at most {limit} fit. "
                "Split the sentence, or let long ones be truncated (too_long = truncate)."
            )
        self.report.num_truncated += 1
        if self.report.first_truncated is None:
            self.report.first_truncated = number
        return [*row[: limit - 1], EOS]


def never_emitted(vocabulary: Vocabulary) -> tuple[int, ...]:
    """Ids that a teacher must not produce. A vocabulary imported without <mask> has a word in that place."""
    has_mask = len(vocabulary) > MASK and vocabulary.pieces([MASK]) == ["<mask>"]
    return tuple(symbol for symbol in NEVER_EMITTED if symbol != MASK or has_mask)


def plan_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Positions of sentences, longest first, packed while count * longest <= max_tokens; equal lengths in order."""
    batches: list[list[int]] = []
    room = 0
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not room:
            batches.append([])
            room = max(1, max_tokens // lengths[position])
        batches[-1].append(position)
        room -= 1
    return batches


def pad_rows(rows: Sequence[Sequence[int]]) -> Tensor:
    """(B, S) int64, right padded with PAD."""
    padded = torch.full((len(rows), max(map(len, rows))), PAD, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return padded
