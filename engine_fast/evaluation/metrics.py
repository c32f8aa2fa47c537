"""Scores of translated text: sacreBLEU and chrF with signatures, paired bootstrap, repetition, length ratio.

References are streams: one list per reference set, each aligned with the hypotheses. This is the only module that
imports sacrebleu.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.significance import PairedTest, Result

from engine_fast.errors import DataError

Streams = Sequence[Sequence[str]]


def corpus_bleu(hypotheses: Sequence[str], references: Streams, *, tokenize: str = "13a") -> float:
    """Corpus BLEU in percent (sacreBLEU, exp smoothing, mixed case).

    `tokenize` is sacreBLEU's name of the tokeniser: 13a for detokenised text, none for text that is tokens already.
    """
    _check(hypotheses, references)
    return float(_bleu(tokenize).corpus_score(list(hypotheses), [list(stream) for stream in references]).score)


def corpus_chrf(hypotheses: Sequence[str], references: Streams) -> float:
    """chrF2 in percent (sacreBLEU: character 6-grams, beta 2)."""
    _check(hypotheses, references)
    return float(CHRF().corpus_score(list(hypotheses), [list(stream) for stream in references]).score)


def signatures(num_references: int = 1, *, tokenize: str = "13a") -> dict[str, str]:
    """What sacreBLEU prints beside a score, so that others can repeat it: {"bleu": .., "chrf": ..}."""
    streams = [["a"]] * num_references
    bleu, chrf = _bleu(tokenize), CHRF()
    bleu.corpus_score(["a"], streams)  # the signature counts references, which only a scored corpus has
    chrf.corpus_score(["a"], streams)
    return {"bleu": str(bleu.get_signature()), "chrf": str(chrf.get_signature())}


def repetition_rate(sentences: Sequence[Sequence[object]]) -> float:
    """Share of tokens equal to the token before them; 0 for no tokens. A token is a word or an id, as given."""
    repeated = sum(a == b for sentence in sentences for a, b in pairwise(sentence))
    return repeated / max(1, sum(len(sentence) for sentence in sentences))


def length_ratio(hypotheses: Sequence[Sequence[object]], references: Sequence[Sequence[object]]) -> float:
    """Total tokens of the hypotheses over total tokens of the references."""
    return sum(map(len, hypotheses)) / max(1, sum(map(len, references)))


def valid_share(hypotheses: Sequence[str], references: Streams) -> float:
    """Share of hypotheses that equal one of their references, for corpora whose references are all there are."""
    _check(hypotheses, references)
    hits = sum(line in options for line, *options in zip(hypotheses, *references, strict=True))
    return hits / len(hypotheses)


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """BLEU of one system over resampled test sets, and whether it differs from the baseline's."""

    bleu_mean: float
    bleu_interval: float
    """Half width of the 95% interval around the mean."""
    p_value: float | None
    """Of "no difference to the baseline", two-sided; None for the baseline itself."""


def paired_bootstrap(
    baseline: str,
    systems: Mapping[str, Sequence[str]],
    references: Streams,
    *,
    samples: int = 1000,
    tokenize: str = "13a",
    seed: int = 12345,
) -> dict[str, Bootstrap]:
    """Paired bootstrap resampling (Koehn 2004), sacreBLEU's implementation, BLEU only.

    Every system, the baseline among them, is scored on the same `samples` resampled test sets.
    Returns one Bootstrap for each name of `systems`, which must hold `baseline`.
    """
    for hypotheses in systems.values():
        _check(hypotheses, references)
    named: list[tuple[str, Sequence[str]]] = [(baseline, list(systems[baseline]))]
    named += [(name, list(lines)) for name, lines in systems.items() if name != baseline]
    previous = os.environ.get("SACREBLEU_SEED")
    os.environ["SACREBLEU_SEED"] = str(seed)  # PairedTest takes its seed from nowhere else
    try:
        test = PairedTest(
            named,
            {"BLEU": _bleu(tokenize)},
            [list(stream) for stream in references],
            test_type="bs",
            n_samples=samples,
        )
        _, scores = test()
    finally:
        if previous is None:
            del os.environ["SACREBLEU_SEED"]
        else:
            os.environ["SACREBLEU_SEED"] = previous
    found: dict[str, Bootstrap] = {}
    for (name, lines), result in zip(named, scores["BLEU"], strict=True):
        assert isinstance(result, Result)
        p_value = None if name == baseline else result.p_value
        if name != baseline and lines == named[0][1]:
            p_value = 1.0  # sacreBLEU counts "larger than", and calls no difference at all significant
        found[name] = Bootstrap(cast(float, result.mean), cast(float, result.ci), p_value)
    return found


def _bleu(tokenize: str) -> BLEU:
    # force: sacreBLEU's guess that text "looks tokenised" is only a warning on stderr, and pretokenised corpora are
    # declared in the configuration
    return BLEU(tokenize=tokenize, force=True)


def _check(hypotheses: Sequence[str], references: Streams) -> None:
    counts = [len(stream) for stream in references]
    if not counts or not hypotheses or any(count != len(hypotheses) for count in counts):
        raise DataError(
            f"scoring: {len(hypotheses)} hypotheses and reference streams of {counts} lines, expected at least one "
            "line and equal counts. Translate the whole split, one line per source line."
        )
