"""The decoding benchmark's providers translate alike, and its floors are figures that it reports."""

from __future__ import annotations

import torch

from benchmarks import bench_decode, harness
from engine_fast.config import Architecture
from engine_fast.models import CMLM, Transformer

VOCABULARY = 60


def test_every_provider_translates_the_same_sentences():
    torch.manual_seed(0)
    student = CMLM(bench_decode.STUDENT.model_copy(update=bench_decode.SMALL), VOCABULARY, VOCABULARY).eval()
    teacher = Transformer(Architecture(**bench_decode.SMALL), VOCABULARY, VOCABULARY).eval()
    runs = bench_decode.make_runs(1, 3, student, teacher, VOCABULARY)
    found = {name: run() for name, run in runs.items()}
    assert set(found) == {"fp32", "bf16", "int8", "unpacked", "reference_ops", "teacher"}
    assert {len(hypotheses) for hypotheses in found.values()} == {1}
    assert len(found["teacher"][0].tokens) == bench_decode.TARGET_LENGTH
    for name in ("bf16", "unpacked", "int8"):
        assert abs(found[name][0].score - found["fp32"][0].score) < 0.05
    assert found["reference_ops"][0].tokens == found["bf16"][0].tokens
    assert "teacher" not in bench_decode.make_runs(2, 1, student, teacher, VOCABULARY)


def test_every_floor_is_a_figure_that_is_reported():
    names = ("fp32", "bf16", "int8", "unpacked", "reference_ops", "teacher")
    seconds = {f"b{b}_k{k}": dict.fromkeys(names, 1.0) for b, k in bench_decode.SHAPES}
    assert set(harness.floors("decode")) <= set(bench_decode.figures_of(seconds))
