"""Beam search of the teacher; the authors' numbers are float32 here."""

from __future__ import annotations

import pytest
import torch

from engine_fast.data.symbols import EOS, PAD
from engine_fast.decoding.autoregressive import beam_search


@pytest.mark.parametrize("beam", [1, 5])
@pytest.mark.parametrize("variant", ["orig", "mod"])
def test_hypotheses_and_scores(oracle, variant, beam):
    """`mod` has another row for the end symbol, so that some hypotheses end by themselves."""
    teacher, theirs = oracle.teacher(), oracle.load("ar_decode")
    with torch.no_grad():
        teacher.decoder.embedding.weight[EOS] = theirs[f"{variant}.eos_row"].double()
    found = beam_search(
        teacher,
        oracle.batch.source,
        beam=beam,
        n_best=beam,
        length_penalty=1.0,
        max_length=(0.0, 20.0),
        forbidden=(PAD,),
    )
    for sentence, hypotheses in enumerate(found):
        for rank, hypothesis in enumerate(hypotheses):
            prefix = f"{variant}.beam{beam}.sent{sentence}.rank{rank}"
            assert hypothesis.tokens == theirs[f"{prefix}.tokens"].tolist(), prefix
            assert hypothesis.score == pytest.approx(theirs[f"{prefix}.score"].item(), rel=1e-5), prefix
