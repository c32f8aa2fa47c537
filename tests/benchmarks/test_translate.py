"""The race: its floors are figures that it reports, everybody writes what was forced, its summary is right."""

import json
from itertools import combinations

import pytest
import torch

from benchmarks import bench_translate, harness, translate_models, translate_table, translate_worker
from benchmarks.bench_translate import figures, race, summarise, systems
from engine_fast.decoding import mask_predict
from engine_fast.models import load_model


def row(p50, best, peak=100.0, **more):
    return {
        "latency_ms": {"p50": p50, "p95": 2 * p50}, "best": best, "peak_mib": peak,
        "throughput": {"1": {"sentences_per_second": best, "spread": 0.1}}, **more,
    }  # fmt: skip


@pytest.fixture
def parts():
    """Every system with figures of which the last one named is the fastest of its kind."""
    paper = {system.name: row(50.0, 10.0) for system in systems("paper")}
    paper["ctranslate2 greedy int8"] = row(400.0, 20.0)
    paper["ctranslate2 greedy fp32"] = row(800.0, 9.0, peak=200.0)
    paper |= {name: row(300.0, 5.0) for name in paper if name.startswith("teacher greedy")}
    paper["teacher greedy bf16"] = row(200.0, 5.0)
    paper["student 3 lengths bf16"] = row(25.0, 40.0, peak=240.0)
    paper["student 1 length bf16"] = row(20.0, 80.0)
    paper["student 1 length 4 passes bf16"] = row(1.0, 900.0)  # neither of these two is the one pass that is judged
    paper["student 3 lengths reranked bf16"] = row(1.0, 900.0, peak=900.0)
    scores = {"student 1 length fp32": 27.0, "student 1 length bf16": 26.9, "student 3 lengths fp32": 28.0,
              "student 3 lengths bf16": 27.7, "student 3 lengths onnx fp32": 28.0,
              "student 3 lengths onnx int8": 28.05}  # fmt: skip
    return {"paper": paper, "trained": {name: row(5.0, 50.0, bleu=bleu) for name, bleu in scores.items()}}


def test_figures_compare_the_right_systems(parts):
    found = figures(parts)
    assert found["latency_over_ctranslate2_int8"] == pytest.approx(16)
    assert found["latency_over_teacher"] == pytest.approx(8)
    assert found["throughput_over_ctranslate2_int8"] == pytest.approx(2)
    assert found["throughput_over_ctranslate2_int8_one_length"] == pytest.approx(4)
    assert found["memory_over_ctranslate2_fp32"] == pytest.approx(1.2)
    assert found["bleu_cost_bf16"] == pytest.approx(0.3)
    assert found["bleu_cost_int8"] == pytest.approx(-0.05)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_floors_are_figures_that_the_benchmark_reports(parts, device):
    if device == "cuda":
        parts = {"paper": {system.name: row(5.0, 9.0) for system in systems("paper", device="cuda")}}
    assert figures(parts).keys() >= harness.floors("translate" if device == "cpu" else "translate_gpu").keys()


def test_names_are_unique_and_smoke_takes_one_of_each_engine():
    for part, device in (("paper", "cpu"), ("trained", "cpu"), ("paper", "cuda")):
        names = [system.name for system in systems(part, device=device)]
        assert len(set(names)) == len(names)
    engines = {system.engine for system in systems("paper", only=bench_translate.SMOKE)}
    assert engines == translate_worker.ENGINES.keys()


def test_summary_of_rounds():
    found = summarise({1: [[0.1, 0.1, 0.4], [0.2, 0.2, 0.2]], 8: [[2.0, 2.0], [1.0]]})
    assert found["latency_ms"]["p50"] == pytest.approx(150)
    assert found["latency_ms"]["p95"] == pytest.approx(400)
    assert found["throughput"]["8"]["sentences_per_second"] == pytest.approx(6)  # of 4 and 8
    assert found["throughput"]["8"]["spread"] == pytest.approx(4 / 6)
    assert found["best"] == pytest.approx(6)


def test_random_students_choose_the_forced_lengths(tmp_path):
    materials = translate_models.paper(tmp_path, translate_models.SMOKE, {"student"}, num_lines=3)
    assert materials.models.keys() == {"teacher", "deep", "student"}
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_model(materials.models["student"], dtype=dtype)
        rows = [[*loaded.source_vocabulary.encode(line), 2] for line in materials.texts.read_text().splitlines()]
        assert {len(row) for row in rows} == {translate_models.SOURCE}
        lengths = [len(h.tokens) for h in mask_predict(loaded.model, torch.tensor(rows), length_beam=1)]
        assert lengths == [translate_models.TARGET] * 3


def test_a_race_of_two_processes(tmp_path):
    chosen = systems("paper", only=["student 1 length fp32", "ctranslate2 greedy int8"])
    materials = translate_models.paper(
        tmp_path, translate_models.SMOKE, {system.model for system in chosen}, num_lines=4
    )
    rows = race(
        "paper", chosen, materials, threads=1, device="cpu", cap=0.1, until=0.0, rounds=3, sentences={1: 2, 4: 4}
    )
    assert [*rows] == ["student 1 length fp32", "ctranslate2 greedy int8"]
    for each in rows.values():
        assert each["throughput"]["4"]["rounds"] == 1  # there was no time for more
        assert each["peak_mib"] >= each["loaded_mib"] > 1
    content = {"threads": 1, "figures": {"x": 1.0}, "signature": "", "parts": {"paper": rows}}
    content["paper"] = {"source_tokens": 26, "target_tokens": 27}
    text = translate_table.markdown(json.loads(json.dumps(content)))
    assert sum(line.startswith(("| student", "| ctranslate2")) for line in text.splitlines()) == 2


def test_a_worker_that_writes_too_little_is_found(tmp_path, monkeypatch):
    (tmp_path / "texts").write_text("a b\nc d\n")
    made = {"full": "x " * 25, "short": "x x"}
    monkeypatch.setitem(translate_worker.ENGINES, "fake", lambda job: lambda lines: [made[job["model"]]] * len(lines))
    job = {"engine": "fake", "texts": str(tmp_path / "texts"), "forced": 27}
    request = {"batch": 1, "sentences": 2, "seconds": 9.0}
    assert len(translate_worker.Worker(job | {"model": "full"}).answer(request)["calls"]) == 2
    with pytest.raises(ValueError, match="not all of them were made"):
        translate_worker.Worker(job | {"model": "short"}).answer(request)


def test_a_family_differs_in_precision_alone():
    found = translate_table.families(["student 1 length fp32", "student 1 length int8", "student 1 length onnx int8"])
    assert [*map(len, found.values())] == [2, 1]
    assert [*found] == ["student 1 length", "student 1 length onnx"]


def test_the_figure_names_every_family_and_no_name_covers_another(parts, tmp_path):
    content = {"threads": 1, "figures": {}, "signature": "", "parts": {"trained": parts["trained"]}, "paper": {}}
    translate_table.write(content, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"translate.md", "translate.png", "translate.svg"}
    for number, name in enumerate(parts["trained"]):
        parts["trained"][name] = row(5.0 + number, 50.0 - number, bleu=27.0 + number // 2)
    for axis in translate_table.draw(parts["trained"]).axes:
        names = [text for text in axis.texts if text.get_text()]
        assert {text.get_text() for text in names} == translate_table.families(parts["trained"]).keys()
        boxes = [text.get_window_extent() for text in names]
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
