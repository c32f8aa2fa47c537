"""Lines of any kind to sources that a model can read, and a count of what was unusual about them.

A source is a list of ids that ends in EOS. One that is too long for the model becomes a part of itself, or several.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine_fast.data.symbols import EOS, UNK
from engine_fast.data.vocabulary import Vocabulary
from engine_fast.errors import DataError

Ids = Sequence[int] | NDArray[np.integer]
TooLong = Literal["truncate", "split", "refuse"]

UNKNOWN_SHARE = 0.05
"""Share of unknown pieces from which a text is suspected to be in another language or script. To a German-English
vocabulary of 5000 pieces: German and English of three corpora at most 0.03 %, Romanian 9.5 %, other scripts 40 %."""
_BREAKING = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Control characters, and all that any program takes for the end of a line."""
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
"""Those of them that are not white space."""
_SURROGATE = re.compile("[\ud800-\udfff]")
"""What undecodable bytes become under errors="surrogateescape". No vocabulary can encode it."""
_SLICE = 1 << 16
"""Characters encoded at once: SentencePiece holds a hundred bytes and more for each."""
_SPACE = "\u2581"
_STOPS = (".", "!", "?", "\u2026")
_WIDE_STOPS = ("\u3002", "\uff01", "\uff1f")
"""After which no space comes."""
_CLOSING = "\"')]}\u00bb\u201c\u201d\u2019\u300d"
_SHORT = 10
"""A sentence of fewer pieces stays with the next: "z. B." ends none, and a line of full stops has thousands."""


@dataclass(slots=True)
class TranslateReport:
    """What became of the lines of a stream, so far."""

    num_lines: int = 0
    num_empty: int = 0
    """Lines without a piece; their translation is an empty line."""
    num_truncated: int = 0
    """Sources cut to the model's positions."""
    num_split: int = 0
    """Sources translated in several parts."""
    first_long: int | None = None
    """Number of the first line that was truncated or split, counted from 1."""
    num_control: int = 0
    """Lines with control characters, which were read as spaces."""
    num_undecodable: int = 0
    """Lines with something that is no Unicode character, read as U+FFFD."""
    num_blank: int = 0
    """Lines with pieces whose translation has none."""
    num_pieces: int = 0
    """Pieces of all sources, end symbols left out."""
    num_unknown: int = 0
    """Those that the vocabulary lacks."""

    def add(self, later: TranslateReport) -> None:
        """Count the lines of a report on what came after."""
        for count in fields(self):
            if count.name != "first_long":
                setattr(self, count.name, getattr(self, count.name) + getattr(later, count.name))
        self.first_long = later.first_long if self.first_long is None else self.first_long

    def summary(self, limit: int) -> str:
        """One line about what was unusual and what to do about it; empty where nothing was. limit: tokens that fit."""
        share = self.num_unknown / max(1, self.num_pieces)
        long = f"longer than {limit} tokens, the first in line {self.first_long}, "
        remarks = (
            (self.num_truncated, long + "truncated (split them, or train with more positions)"),
            (self.num_split, long + "translated in parts"),
            (self.num_undecodable, "with bytes that are not UTF-8, read as U+FFFD"),
            (self.num_control, "with control characters, read as spaces"),
            (self.num_blank, "whose translation came out empty"),
        )
        told = [f"{count} {remark}" for count, remark in remarks if count]
        if share > UNKNOWN_SHARE:
            told.append(
                f"{share:.1%} of the pieces are unknown to the vocabulary (is this the language, and the script, that "
                "the model was trained to read?)"
            )
        return f"of {self.num_lines} lines: " + "; ".join(told) if told else ""


@dataclass(slots=True)
class Sources:
    """Sources that fit, each a line or a part of one."""

    parts: list[list[int]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    """The place of each part's line; ascending, none left out."""


def one_line(text: str) -> str:
    """The text with a space for every control character and every line end of any kind."""
    return _BREAKING.sub(" ", text)


def encode_lines(lines: Sequence[str], vocabulary: Vocabulary, limit: int, report: TranslateReport) -> list[list[int]]:
    """Ids of each line, EOS at the end. Of a line of many thousand characters enough to see that it is too long, if
    limit > 0; else all. Counts control characters and what is not Unicode."""
    clean = []
    for line in lines:
        report.num_control += _CONTROL.search(line) is not None
        if _SURROGATE.search(line):
            report.num_undecodable += 1
            line = _SURROGATE.sub("\ufffd", line)
        clean.append(one_line(line))
    short = [line if len(line) <= _SLICE else "" for line in clean]
    encoded = vocabulary.encode_batch(short)
    for i, line in enumerate(clean):
        if len(line) > _SLICE:
            for piece_of_line in _slices(line):
                encoded[i] += vocabulary.encode(piece_of_line)
                if 0 < limit <= len(encoded[i]):
                    break
    return [[*ids, EOS] for ids in encoded]


def fit_sources(
    rows: Sequence[Ids], vocabulary: Vocabulary, limit: int, too_long: TooLong, first: int, report: TranslateReport
) -> Sources:
    """Every row in at most `limit` tokens, or several such parts of it; `first` is the number of the first line.

    Raises DataError for a row too long (refuse) that gives its line.
    """
    sources = Sources()
    for place, ids in enumerate(rows):
        row = [int(token) for token in ids]
        parts = [row]
        if len(row) > limit:
            parts = _cut(row, vocabulary, limit, too_long, first + place)
            report.num_truncated += too_long == "truncate"
            report.num_split += too_long == "split"
            report.first_long = first + place if report.first_long is None else report.first_long
        for part in parts:
            report.num_pieces += len(part) - 1
            report.num_unknown += part.count(UNK)
        sources.parts += parts
        sources.lines += [place] * len(parts)
        report.num_empty += len(row) == 1
    report.num_lines += len(rows)
    return sources


def split_row(row: Sequence[int], pieces: Sequence[str], room: int) -> list[list[int]]:
    """Ids without an end symbol in consecutive parts of at most `room`: at the ends of sentences; a sentence that does
    not fit evenly at spaces; a word that does not fit evenly between its pieces."""
    words, ends, ended = set(), [0], False
    spaced = any(piece.startswith(_SPACE) for piece in pieces)
    for i, piece in enumerate(pieces):
        starts = piece.startswith(_SPACE) if spaced else i > 0 and not pieces[i - 1].endswith("@@")
        if starts:
            words.add(i)
        if ended and (starts or pieces[i - 1].endswith(_WIDE_STOPS)) and i - ends[-1] >= min(_SHORT, room):
            ends.append(i)
        bare = piece.lstrip(_SPACE).rstrip(_CLOSING)
        ended = bare.endswith(_STOPS + _WIDE_STOPS) if bare else ended
    parts = []
    for start, stop in pairwise([*ends, len(row)]):
        while stop - start > room:
            num_parts = -(-(stop - start) // room)
            even = start + -(-(stop - start) // num_parts)
            spaces = [i for i in range(start + 1, start + room + 1) if i in words]
            cut = min(spaces, key=lambda i: abs(i - even), default=even)
            parts.append(list(row[start:cut]))
            start = cut
        parts.append(list(row[start:stop]))
    return parts


def _cut(row: list[int], vocabulary: Vocabulary, limit: int, too_long: TooLong, number: int) -> list[list[int]]:
    if too_long == "refuse":
        raise DataError(
            f"line {number}: {len(row)} tokens, end symbol included, and at most {limit} fit. Split the sentence, or "
            "let long ones be translated in parts (too_long = split) or truncated (truncate)."
        )
    if too_long == "truncate":
        return [[*row[: limit - 1], EOS]]
    return [[*part, EOS] for part in split_row(row[:-1], vocabulary.pieces(row[:-1]), limit - 1)]


def _slices(text: str) -> Iterator[str]:
    """Consecutive parts of at most _SLICE characters, cut at spaces where there are any."""
    start = 0
    while start < len(text):
        stop = start + _SLICE
        if stop < len(text):
            space = text.rfind(" ", start + 1, stop)
            stop = space if space > 0 else stop
        yield text[start:stop]
        start = stop
