"""Scores against sacreBLEU called directly and against values worked out by hand."""

from __future__ import annotations

import os

import pytest
import sacrebleu

from engine_fast.errors import DataError
from engine_fast.evaluation.metrics import (
    corpus_bleu,
    corpus_chrf,
    length_ratio,
    paired_bootstrap,
    repetition_rate,
    signatures,
    valid_share,
)

REFERENCES = [["the cat sat on the mat .", "a dog runs fast .", "two men are talking ."]] * 2
HYPOTHESES = ["the cat sat on a mat .", "a dog runs very fast .", "two men talk ."]


def test_bleu_is_sacrebleus() -> None:
    assert corpus_bleu(HYPOTHESES, REFERENCES) == sacrebleu.corpus_bleu(HYPOTHESES, REFERENCES).score
    assert corpus_bleu(HYPOTHESES, REFERENCES, tokenize="none") == (
        sacrebleu.corpus_bleu(HYPOTHESES, REFERENCES, tokenize="none", force=True).score
    )


def test_chrf_is_sacrebleus() -> None:
    assert corpus_chrf(HYPOTHESES, REFERENCES) == sacrebleu.corpus_chrf(HYPOTHESES, REFERENCES).score


def test_more_references_can_only_help() -> None:
    other = [["the cat sat on a mat .", "x", "two men talk ."]]
    assert corpus_bleu(HYPOTHESES, [*REFERENCES[:1], *other]) > corpus_bleu(HYPOTHESES, REFERENCES[:1])


def test_degenerate_output_scores_zero() -> None:
    assert corpus_bleu(["", "", ""], REFERENCES) == 0.0


def test_signatures_name_tokeniser_and_references() -> None:
    signature = signatures(2, tokenize="none")
    assert "nrefs:2" in signature["bleu"]
    assert "tok:none" in signature["bleu"]
    assert sacrebleu.__version__ in signature["bleu"]
    assert "nrefs:2" in signature["chrf"]


def test_repetition_by_hand() -> None:
    assert repetition_rate([["a", "a", "b"], [], ["c", "c", "c", "d"]]) == 3 / 7
    assert repetition_rate([[1, 2, 1, 2]]) == 0.0
    assert repetition_rate([]) == 0.0


def test_length_ratio_by_hand() -> None:
    assert length_ratio([["a", "b"], ["c"]], [["a"], ["b"]]) == 1.5


def test_valid_share_by_hand() -> None:
    assert valid_share(["a b", "b a", "x"], [["a b", "a b", "y"], ["q", "b a", "z"]]) == 2 / 3


@pytest.mark.parametrize("references", [[], [["one"]], [["one", "two"], ["one"]]])
def test_uneven_counts_are_refused(references: list[list[str]]) -> None:
    with pytest.raises(DataError, match="2 hypotheses"):
        corpus_bleu(["one", "two"], references)


def test_paired_bootstrap_tells_better_from_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACREBLEU_SEED", "7")
    lines = [f"the number {i} is here and it is fine" for i in range(60)]
    worse = [line.replace("is here", "was there") for line in lines]
    result = paired_bootstrap("bad", {"good": lines, "bad": worse, "same": worse}, [lines], samples=200)
    assert list(result) == ["bad", "good", "same"]
    good_p, same_p = result["good"].p_value, result["same"].p_value
    assert result["bad"].p_value is None
    assert good_p is not None
    assert same_p is not None
    assert good_p < 0.05 < same_p
    assert result["good"].bleu_mean == pytest.approx(100.0)
    assert os.environ["SACREBLEU_SEED"] == "7"
    again = paired_bootstrap("bad", {"good": lines, "bad": worse, "same": worse}, [lines], samples=200)
    assert again == result
