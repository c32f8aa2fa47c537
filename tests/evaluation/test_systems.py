"""Which systems are measured, and what becomes of the figures: files, table, versions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from engine_fast.config import EvaluateConfig
from engine_fast.evaluation.files import write_atomic, write_json
from engine_fast.evaluation.results import results_table, versions
from engine_fast.evaluation.systems import systems_of
from tests.evaluation.fake_run import fake_results


def test_systems_cover_passes_beams_oracle_and_reranking() -> None:
    labels = [system.label for system in systems_of(EvaluateConfig(iterations=[1, 10]))]
    assert labels == [
        "teacher-greedy", "teacher-beam",
        "cmlm.i1.k5", "cmlm.i1.k1", "cmlm-rerank.i1.k5", "cmlm-oracle.i1",
        "cmlm.i10.k5", "cmlm.i10.k1", "cmlm-rerank.i10.k5", "cmlm-oracle.i10",
        "engine.i1.k3", "engine.i1.k1", "engine-rerank.i1.k3", "engine-oracle.i1",
        "engine.i10.k3", "engine.i10.k1", "engine-rerank.i10.k3", "engine-oracle.i10",
    ]  # fmt: skip


def test_nothing_to_choose_from_means_no_reranking() -> None:
    config = EvaluateConfig(iterations=[1, 1], cmlm_length_beam=1, engine_length_beam=1, oracle_lengths=False)
    assert [system.label for system in systems_of(config)] == [
        "teacher-greedy", "teacher-beam", "cmlm.i1.k1", "engine.i1.k1",
    ]  # fmt: skip


def test_a_student_that_cannot_refine_has_one_pass() -> None:
    for iterations in ([1, 4, 10], [4]):
        config = EvaluateConfig(iterations=iterations, oracle_lengths=False, cmlm_length_beam=1)
        assert [system.label for system in systems_of(config, refine=False)] == [
            "teacher-greedy", "teacher-beam", "cmlm.i1.k1", "engine.i1.k3", "engine.i1.k1", "engine-rerank.i1.k3",
        ]  # fmt: skip


def test_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": 1})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("engine_fast.evaluation.files.os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "half")
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]
    assert path.read_text() == '{\n  "a": 1\n}\n'


def test_table_shows_every_system() -> None:
    results = fake_results()
    console = Console(width=200, record=True)
    console.print(results_table(results))
    text = console.export_text()
    for column in ("BLEU", "energy", "repeated", "sentences/s"):
        assert column in text
    assert "valid" not in text  # real text has no set of right answers
    assert text.count("engine") == np.sum([row["system"].startswith("engine") for row in results["systems"]])
    assert "references 21.50" in text


def test_versions_name_what_can_change_a_figure() -> None:
    assert {"engine_fast", "python", "torch", "sacrebleu", "sentencepiece"} <= versions().keys()
