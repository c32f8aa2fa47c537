"""Text in, text out: a stream of lines through a model, in batches of similar length, in the order they came."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from numbers import Integral, Real
from typing import get_args

import torch
from torch import Tensor

from engine_fast.data.symbols import EOS, MASK, PAD
from engine_fast.data.vocabulary import Vocabulary
from engine_fast.decoding.autoregressive import NEVER_EMITTED, MaxLength
from engine_fast.decoding.generate import generate
from engine_fast.decoding.hypothesis import Hypothesis
from engine_fast.decoding.mask_predict import Rescore, mask_predict_n_best
from engine_fast.decoding.sources import Ids, TooLong, TranslateReport, encode_lines, fit_sources, one_line
from engine_fast.distributed.presence import beat
from engine_fast.errors import DataError, require
from engine_fast.models import LoadedModel, Student, Teacher

Translation = tuple[str, Hypothesis]

WINDOW_CHARACTERS = 1 << 24
"""A window ends here, whatever its number of lines, so that lines of a million characters do not fill the memory."""


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


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
    remove_repeats: bool = False
    """Leave out tokens equal to the one before. Scores stay those of the whole; see benchmarks/NOTES.md for BLEU."""
    max_tokens: int = 8192
    """Source tokens, padding included, times beam or length_beam, per batch; a longer sentence goes alone."""
    window: int = 4096
    """Lines read before the first is written; sorted by length among themselves."""
    max_positions: int | None = None
    """Longest source, and a student's longest candidate, in tokens, end symbol included; at most the model's own."""
    too_long: TooLong = "truncate"
    """What happens to a longer source: it loses its end; it is translated in parts that are joined with spaces (cut
    at ends of sentences, else at spaces, else between pieces); or it is an error."""

    def __post_init__(self) -> None:
        for key in ("beam", "iterations", "length_beam", "n_best", "max_tokens", "window"):
            value = getattr(self, key)
            require(_is_count(value) and value >= 1, key, value, "a whole number, at least 1")
        penalty, most = self.length_penalty, self.max_length
        require(_is_number(penalty) and penalty >= 0, "length_penalty", penalty, "a number, 0 or more")
        pair = isinstance(most, tuple) and len(most) == 2 and all(map(_is_number, most))
        require(pair, "max_length", most, "a pair of numbers (a, b)")
        require(self.too_long in get_args(TooLong), "too_long", self.too_long, "truncate, split or refuse")
        positions = self.max_positions
        fits = positions is None or (_is_count(positions) and positions >= 2)
        require(fits, "max_positions", positions, "a whole number, at least 2 (a word and the end)")


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
        return list(self.stream(sentences))

    def stream(
        self, lines: Iterable[str], *, lengths: Iterable[int] | None = None, first_line: int = 1
    ) -> Iterator[str]:
        """One line out for each line in, in order; at most settings.window lines are held. Empty lines stay empty.

        Control characters are read as spaces, and no translation holds a line end of any kind. Warns at the end, in
        one line, of what was unusual; self.report has the counts.
        lengths: known target length of every line in tokens, end symbol included (students only).
        first_line: number of the first line, where errors and warnings name one.
        Raises DataError for a line too long (too_long = refuse), for fewer lengths than lines, for what is no text.
        """
        if isinstance(lines, str):
            raise DataError(f"one string, {lines[:40]!r}, was given, expected a list of them. Put it in [ ].")
        for translations in self.translate_n_best(lines, lengths=lengths, first_line=first_line):
            yield translations[0][0]

    def translate_n_best(
        self, lines: Iterable[str], *, lengths: Iterable[int] | None = None, first_line: int = 1
    ) -> Iterator[list[Translation]]:
        """Up to n_best (text, hypothesis) pairs per line, best first; always at least one. See stream().

        A line in parts has the parts' k-th best as its k-th: tokens and log-probabilities together, and as score
        the mean over tokens of the parts' scores.
        """
        known = None if lengths is None else iter(lengths)
        self.report = TranslateReport()
        try:
            for window in windows(lines, self.settings.window):
                sizes = None if known is None else list(islice(known, len(window)))
                number = first_line + self.report.num_lines
                found, report = self.translate_window(window, first_line=number, lengths=sizes)
                self.report.add(report)
                yield from found
        finally:
            summary = self.report.summary(self.max_positions)
            if summary:
                warnings.warn(summary, stacklevel=2)

    def translate_window(
        self, window: Sequence[str], *, first_line: int = 1, lengths: Sequence[int] | None = None
    ) -> tuple[list[list[Translation]], TranslateReport]:
        """translate_n_best of these lines together, and a report on them alone; self.report stays as it is."""
        if lengths is not None and len(lengths) < len(window):
            done = first_line - 1 + len(lengths)
            raise DataError(f"target lengths end after line {done}, the input goes on. Give one length per line.")
        report = TranslateReport()
        enough = self.max_positions if self.settings.too_long == "truncate" else 0
        rows = encode_lines(window, self.loaded.source_vocabulary, enough, report)
        decode = self.loaded.target_vocabulary.decode
        translations: list[list[Translation]] = []
        for row, parts in zip(rows, self._search(rows, lengths, report, first_line), strict=True):
            ranked = zip(*parts, strict=False)  # parts may differ in how many hypotheses they have
            texts = [(" ".join(filter(None, (decode(h.tokens) for h in each))), _joined(each)) for each in ranked]
            translations.append([(one_line(text).strip(), hypothesis) for text, hypothesis in texts])
            report.num_blank += len(row) > 1 and not translations[-1][0][0]
        return translations, report

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
        found = self._search(sources, lengths, self.report, 1, advance)
        return [[_joined(each) for each in zip(*parts, strict=False)] for parts in found]

    def _search(
        self,
        sources: Sequence[Ids],
        lengths: Sequence[int] | None,
        report: TranslateReport,
        first_line: int,
        advance: Callable[[int], None] | None = None,
    ) -> list[list[list[Hypothesis]]]:
        """For each source, for each of its parts, hypotheses."""
        for number, length in enumerate(lengths or (), first_line):
            if length < 1:
                raise DataError(f"line {number}: target length {length}, expected 1 or more. Count the end symbol.")
        too_long, limit = self.settings.too_long, self.max_positions
        fitted = fit_sources(sources, self.loaded.source_vocabulary, limit, too_long, first_line, report)
        if lengths is not None and report.num_split:
            raise DataError(
                f"line {report.first_long}: longer than {limit} tokens, and a known target length is of the whole, "
                "not of its parts. Let long lines be truncated or refused (too_long)."
            )
        parts, lines = fitted.parts, fitted.lines
        results: list[list[Hypothesis]] = [[Hypothesis([EOS], 0.0, 0.0)] for _ in parts]
        filled = [i for i, part in enumerate(parts) if len(part) > 1]
        if advance is not None and len(filled) < len(parts):
            advance(len(parts) - len(filled))
        for batch in plan_batches([len(parts[i]) for i in filled], self.settings.max_tokens // self.width):
            chosen = [filled[position] for position in batch]
            sizes = None if lengths is None else [lengths[lines[i]] for i in chosen]
            for i, found in zip(chosen, self._search_batch([parts[i] for i in chosen], sizes), strict=True):
                results[i] = [without_repeats(h) for h in found] if self.settings.remove_repeats else found
            beat("translate: a batch is done")
            if advance is not None:  # of a source in parts the first stands for all
                advance(sum(not i or lines[i] != lines[i - 1] for i in chosen))
        grouped: list[list[list[Hypothesis]]] = [[] for _ in sources]
        for line, ranked in zip(lines, results, strict=True):
            grouped[line].append(ranked)
        return grouped

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


def windows(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    """Consecutive lists of `size` lines, or of fewer where these hold very many characters. Raises DataError."""
    window: list[str] = []
    held = 0
    for number, line in enumerate(lines, 1):
        if not isinstance(line, str):
            raise DataError(f"line {number}: a {type(line).__name__}, expected text (str). Decode or convert it first.")
        window.append(line)
        held += len(line)
        if len(window) == size or held >= WINDOW_CHARACTERS:
            yield window
            window, held = [], 0
    if window:
        yield window


def without_repeats(hypothesis: Hypothesis) -> Hypothesis:
    """The hypothesis without tokens that equal the one before."""
    tokens = hypothesis.tokens
    kept = [token for token, before in zip(tokens, [None, *tokens], strict=False) if token != before]
    return replace(hypothesis, tokens=kept)


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


def _joined(parts: Sequence[Hypothesis]) -> Hypothesis:
    """Translations of a source's consecutive parts as one."""
    if len(parts) == 1:
        return parts[0]
    tokens = [token for part in parts for token in part.tokens if token != EOS]
    score = sum(part.score * len(part.tokens) for part in parts) / sum(len(part.tokens) for part in parts)
    return Hypothesis([*tokens, EOS], score, sum(part.log_probability for part in parts))
