"""Mask-predict: candidate lengths, tokens, log-probabilities and the chosen candidate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine_fast.data.symbols import PAD
from engine_fast.decoding.mask_predict import lengths_around, mask_predict_candidates, predict_lengths


@pytest.mark.parametrize("candidates", [1, 3, 5])
def test_lengths(oracle, candidates):
    student, theirs = oracle.student(), oracle.load("mask_predict")
    _, logits_BL = student.encode(oracle.batch.source)
    assert torch.equal(predict_lengths(logits_BL, candidates), theirs[f"pred.k{candidates}.it1.lengths"])
    gold = (oracle.batch.target != PAD).sum(-1)
    around = lengths_around(gold, candidates, student.architecture.max_positions)
    assert torch.equal(around, theirs[f"gold.k{candidates}.it1.lengths"])


@pytest.mark.parametrize("iterations", [1, 4, 10])
@pytest.mark.parametrize("candidates", [1, 3, 5])
@pytest.mark.parametrize("lengths", ["gold", "pred"])
def test_candidates(oracle, agree, lengths, candidates, iterations):
    """The authors predict the end symbol's slot too, and forbid nothing."""
    prefix, theirs = f"{lengths}.k{candidates}.it{iterations}", oracle.load("mask_predict")
    found = mask_predict_candidates(
        oracle.student(),
        oracle.batch.source,
        iterations=iterations,
        lengths_BK=theirs[f"{prefix}.lengths"],
        force_end=False,
    )
    expected = theirs[f"{prefix}.cand_tokens"]
    tokens = F.pad(found.tokens, (0, expected.shape[-1] - found.tokens.shape[-1]), value=PAD)
    assert torch.equal(tokens, expected)
    agree(found.log_probabilities, theirs[f"{prefix}.cand_logprob"], "log-probabilities")
    chosen = found.averages.argmax(-1)
    assert torch.equal(tokens[torch.arange(len(chosen)), chosen], theirs[f"{prefix}.hypo"])
