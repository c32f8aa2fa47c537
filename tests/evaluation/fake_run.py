"""A run directory as the recipe leaves it, with made-up figures, for tests of the report."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from engine_fast.config import EvaluateConfig, parse_config
from engine_fast.evaluation.systems import System, systems_of

NUM_SENTENCES = 40


def fake_results(*, engine_bleu: float = 31.0, engine_energy: float = 26.0) -> dict[str, Any]:
    """results.json of a made-up run; ENGINE's one-pass figures can be chosen."""
    config = parse_config({"name": "made-up", "data": {"corpus": "multi30k_de_en"}})
    rows = [_row(system, engine_bleu, engine_energy) for system in systems_of(EvaluateConfig())]
    histogram = {str(length): 3 + (length * 7) % 11 for length in range(4, 30)}
    return {
        "name": "made-up",
        "systems": rows,
        "references": {"energy": 21.5, "repetition": 0.001, "sentences": NUM_SENTENCES, "streams": 1, "cut_sources": 0},
        "baseline": "cmlm.i1.k5",
        "split": "test",
        "lengths": {"reference": histogram, **{row["label"]: histogram for row in rows}},
        "signature": {"bleu": "nrefs:1|case:mixed|tok:13a", "chrf": "nrefs:1|nc:6"},
        "seed": 1,
        "config": config.model_dump(mode="json", exclude_none=True),
        "versions": {"engine_fast": "0.1.0", "torch": "2.13.0"},
        "machine": {"device": "cpu", "cpu": "Some Processor", "cores": 2, "threads": 2},
        "corpus": {"train": 29000},
        "seconds": {"teacher": 3600.0},
        "hashes": {"source vocabulary": "ab" * 32},
    }


def write_fake_run(directory: Path, results: dict[str, Any] | None = None) -> Path:
    """Write the directory and return it."""
    results = fake_results() if results is None else results
    outputs = directory / "evaluate" / "outputs"
    outputs.mkdir(parents=True)
    (directory / "evaluate" / "results.json").write_text(json.dumps(results), encoding="utf-8")
    generator = random.Random(1)
    words = ["ein", "Mann", "steht", "auf", "der", "Straße", "und", "hält", "<b>einen</b>", "Ball", "&", "lacht"]
    lines = [" ".join(generator.choices(words, k=12)) for _ in range(NUM_SENTENCES)]
    for name in ("source", "reference-0", *(row["label"] for row in results["systems"])):
        doubled = [
            f"{line} Ball Ball" if name.startswith("cmlm") and i % 3 == 0 else line for i, line in enumerate(lines)
        ]
        (outputs / f"{name}.txt").write_text("".join(f"{line}\n" for line in doubled), encoding="utf-8")
    for stage, bleu in (("teacher", 33.0), ("cmlm", 24.0), ("engine", 30.0)):
        (directory / stage).mkdir()
        (directory / stage / "metrics.jsonl").write_text(_metrics(stage, bleu), encoding="utf-8")
    return directory


def _row(system: System, engine_bleu: float, engine_energy: float) -> dict[str, Any]:
    passes = system.iterations or 1
    bleu = {"teacher": 33.0 + (system.beam > 1), "cmlm": 24.0 + 2.2 * passes**0.6, "engine": engine_bleu + 0.3 * passes}
    energy = {"teacher": 17.0, "cmlm": 60.0 - 3 * passes, "engine": engine_energy - 0.3 * passes}
    speed = {"teacher": 30.0 / system.beam, "cmlm": 400.0 / passes, "engine": 500.0 / passes}
    return {
        "system": system.name,
        "label": system.label,
        "iterations": system.iterations,
        "length_beam": system.length_beam,
        "beam": system.beam if system.role == "teacher" else None,
        "oracle_length": system.oracle_length,
        "rerank": system.rerank,
        "bleu": bleu[system.role] + 0.4 * system.rerank + 0.6 * system.oracle_length,
        "chrf": 55.0,
        "energy": energy[system.role],
        "repetition": 0.11 if system.role == "cmlm" else 0.004,
        "length_ratio": 0.98,
        "length_accuracy": 0.3,
        "sentences_per_second": speed[system.role] * (0.7 if system.rerank else 1.0),
        "latency_ms": 20.0,
        "bleu_interval": 1.1,
        "p_value": None if system.label == "cmlm.i1.k5" else 0.001,
    }


def _metrics(stage: str, bleu: float) -> str:
    lines: list[dict[str, Any]] = []
    for update in range(0, 1001, 20):
        loss = 3 + 5 / (1 + update / 100)
        if update:
            lines.append({"kind": "train", "update": update, "loss": loss, "lr": 1e-4})
        if update % 200 == 0:
            line = {"kind": "valid", "update": update, "loss": loss + 0.2, "bleu": bleu - 20 / (1 + update / 200)}
            if stage == "engine":
                line |= {"energy": 20 + 40 / (1 + update / 100), "relaxed_energy": 19 + 40 / (1 + update / 100)}
            lines.append(line)
    return "".join(json.dumps(line) + "\n" for line in lines)
