"""Translation raced against the fastest autoregressive engines, everything included that a user waits for.

    python -m benchmarks.bench_translate [--run DIR] [--threads 2] [--seconds 840] [--only NAME ..] [--smoke]

Every system lives in a process of its own and works while the others wait, in turns that are reversed every other
round, on the same sentences; its peak resident memory is its own. Two parts:

paper     6+6 layers, width 512, ffn 1024, V = 10000, random weights; 26 tokens in, and everybody writes 27
trained   teacher and ENGINE of the run directory --run, the text it was evaluated on, with BLEU

Batch 1 is latency (p50, p95 over sentences) and throughput, batches of 8, 32 and 128 throughput: sentences a second in
each round, then median and spread over rounds. A batch is what one call is given: engine_fast and its exported script
cut it as they do for any user, the others compute it at once. Batch 128 is measured in the first and the last round
alone. On a GPU `graphs` are the students with recorded CUDA graphs; the recording is inside of the clock, too.
A measurement ends after about --cap seconds, so slow systems translate fewer sentences, and a batch that would
take several times that long is left out.
Writes benchmarks/results/translate.json, translate.md and translate.{png,svg}; exits with 1 below a floor of
benchmarks/floors.toml. --smoke: tiny models, one system of each kind, one round; judges and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, translate_models, translate_table
from benchmarks.translate_models import Materials, System
from engine_fast.evaluation.metrics import corpus_bleu, signatures

SENTENCES = {"paper": {1: 24, 8: 32, 32: 64, 128: 128}, "trained": {1: 24, 32: 96}}
"""Batch -> sentences that are translated in one measurement, if the cap allows."""
SMALL = {1: 2, 8: 8}
"""The same for --smoke."""
LENGTHS = ((1, "1 length"), (3, "3 lengths"))
ROUNDS = {"paper": 3, "trained": 2}
_TEACHER = "@teacher"
"""Stands for the teacher's directory in a system's options."""
SMOKE = ("student 1 length fp32", "student 3 lengths onnx fp32", "teacher greedy fp32", "ctranslate2 greedy fp32",
         "transformers greedy fp32")  # fmt: skip


def systems(part: str, *, device: str = "cpu", only: Sequence[str] | None = None) -> list[System]:
    """All that take part, the students first; only: names, or how they start."""
    found = [_ours("student", f"{count} {precision}", precision=precision, length_beam=lengths)
             for lengths, count in LENGTHS for precision in _precisions(device)]  # fmt: skip
    if device == "cuda":
        graphs = [System(f"{system.name} graphs", "ours", "student", {**system.options, "cuda_graphs": True})
                  for system in found]  # fmt: skip
        found += graphs
    stored = {"fp32": "float32", "int8": "int8"}
    if device == "cpu":
        found += [System(f"student {count} onnx {short}", "onnx", f"student-{form}", {"length_beam": lengths})
                  for lengths, count in LENGTHS for short, form in stored.items()]  # fmt: skip
    found += [
        _ours("student", "3 lengths reranked bf16", precision="bf16", length_beam=3, teacher=_TEACHER),
        _ours("student", "1 length 4 passes bf16", precision="bf16", length_beam=1, iterations=4),
        *(_ours("teacher", f"greedy {precision}", beam=1, precision=precision) for precision in _precisions(device)),
        _ours("teacher", "beam 5 fp32", beam=5),
    ]
    if device == "cuda":
        stored = {"fp32": "float32", "fp16": "float16", "int8": "int8_float16"}
    found += [_ctranslate2(search, beam, short, form)
              for short, form in stored.items() for beam, search in ((1, "greedy"), (5, "beam 5"))]  # fmt: skip
    if part == "paper":
        found += [
            System("teacher 12-1 greedy fp32", "ours", "deep", {"beam": 1}),
            _ctranslate2("12-1 greedy", 1, "int8", stored["int8"], model="deep"),
            System("transformers greedy fp32", "huggingface", "marian", {"beam": 1}),
        ]
    return [system for system in found if only is None or system.name.startswith(tuple(only))]


def _ours(model: str, name: str, **options: Any) -> System:
    return System(f"{model} {name}", "ours", model, options)


def _ctranslate2(search: str, beam: int, short: str, compute_type: str, *, model: str = "teacher") -> System:
    form = "int8" if short == "int8" else "float32"
    return System(
        f"ctranslate2 {search} {short}", "ctranslate2", f"{model}-{form}", {"beam": beam, "compute_type": compute_type}
    )


def _precisions(device: str) -> tuple[str, ...]:
    """Of our own models; engine_fast has int8 on CPUs only."""
    return ("fp32", "bf16", "int8") if device == "cpu" else ("fp32", "bf16")


class Process:
    """A system at work in translate_worker."""

    def __init__(self, system: System, materials: Materials, threads: int, device: str) -> None:
        options = {key: str(materials.models["teacher"]) if value == _TEACHER else value
                   for key, value in system.options.items()}  # fmt: skip
        job = {
            "engine": system.engine, "model": str(materials.models[system.model]), "options": options,
            "threads": threads, "texts": str(materials.texts), "forced": materials.forced, "device": device,
        }  # fmt: skip
        self.name = system.name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.translate_worker", json.dumps(job)], cwd=harness.HERE.parent,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.loaded = self._read()

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> float:
        """Peak resident MiB."""
        peak = float(self.ask(end=True)["peak_mib"])
        self._process.wait()
        return peak

    def stop(self) -> None:
        """Whatever it does."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: its process ended with {self._process.wait()}; what it said stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def race(
    part: str, chosen: Iterable[System], materials: Materials, *, threads: int, device: str, cap: float, until: float,
    rounds: int, sentences: Mapping[int, int],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """One row per system. Rounds after the first are left out once `until`, of time.monotonic, would be passed."""
    calls: dict[str, dict[int, list[list[float]]]] = {}
    rows: dict[str, dict[str, Any]] = {}
    processes = []
    try:
        for system in chosen:
            try:
                processes.append(Process(system, materials, threads, device))
            except RuntimeError as error:
                if device == "cpu" or system.engine != "ctranslate2":
                    raise
                say(f"{part}: left out, for it does not run on this device. {error}")
                continue
            rows[system.name] = {"engine": system.engine, "model": system.model, "options": system.options}
            rows[system.name] |= processes[-1].loaded
            calls[system.name] = {batch: [] for batch in sentences}
            say(f"{part}: {system.name} loaded in {processes[-1].loaded['load_seconds']:.1f} s")
        took = 0.0
        for number in range(rounds):
            started = time.monotonic()
            if number and started + took > until:
                say(f"{part}: {number} of {rounds} rounds, for time is up")
                break
            for batch, count in sentences.items():
                if number and batch == max(sentences) and batch > 1 and number < rounds - 1:
                    continue
                for process in processes if number % 2 == 0 else reversed(processes):
                    answer = process.ask(batch=batch, sentences=count, seconds=cap)
                    if answer["calls"]:
                        calls[process.name][batch].append(answer["calls"])
            if not number or not took:
                took = time.monotonic() - started
            say(f"{part}: round {number + 1} took {time.monotonic() - started:.0f} s")
        for process in processes:
            if materials.references is not None:
                found = process.ask(all=32)
                bleu = corpus_bleu(found["translations"], materials.references, tokenize=materials.tokenize)
                rows[process.name] |= {"bleu": bleu, "all_seconds": found["seconds"]}
            rows[process.name] |= {"peak_mib": process.end(), **summarise(calls[process.name])}
    finally:
        for process in processes:
            process.stop()
    return rows


def summarise(calls: Mapping[int, list[list[float]]]) -> dict[str, Any]:
    """calls: batch -> rounds -> seconds of each call."""
    throughput = {}
    for batch, rounds in calls.items():
        if not rounds:
            continue
        speeds = [batch * len(each) / sum(each) for each in rounds]
        middle = statistics.median(speeds)
        throughput[str(batch)] = {
            "sentences_per_second": middle, "spread": (max(speeds) - min(speeds)) / middle, "rounds": len(speeds),
            "calls": sum(map(len, rounds)),
        }  # fmt: skip
    alone = sorted(seconds for each in calls.get(1, []) for seconds in each)
    found: dict[str, Any] = {"throughput": throughput}
    if alone:
        medians = [statistics.median(each) for each in calls[1]]
        found["latency_ms"] = {
            "p50": 1e3 * statistics.median(medians), "p95": 1e3 * alone[math.ceil(0.95 * len(alone)) - 1],
            "spread": (max(medians) - min(medians)) / statistics.median(medians), "sentences": len(alone),
        }  # fmt: skip
    found["best"] = max(each["sentences_per_second"] for each in throughput.values())
    return found


def figures(parts: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, float]:
    """What floors.toml judges. The student is taken at its fastest precision, and so is our teacher."""
    found: dict[str, float] = {}
    rows = parts.get("paper", {})

    def fastest(prefix: str, key: str) -> float | None:
        values = [
            row["best"] if key == "best" else row["latency_ms"][key]
            for name, row in rows.items()
            if name.startswith(prefix) and "passes" not in name and "reranked" not in name
        ]
        return (max(values) if key == "best" else min(values)) if values else None

    def ratio(name: str, over: float | None, under: float | None) -> None:
        if over is not None and under is not None:
            found[name] = over / under

    peer, whole = "ctranslate2 greedy int8", "ctranslate2 greedy fp32"
    three = fastest("student 3 lengths", "p50")
    ratio("latency_over_ctranslate2_int8", fastest(peer, "p50"), three)
    ratio("latency_over_ctranslate2", fastest("ctranslate2 greedy", "p50"), three)
    ratio("latency_over_teacher", fastest("teacher greedy", "p50"), three)
    ratio("throughput_over_ctranslate2_int8_one_length", fastest("student 1 length", "best"), fastest(peer, "best"))
    ratio("throughput_over_ctranslate2_int8", fastest("student 3 lengths", "best"), fastest(peer, "best"))
    if whole in rows:
        peaks = [row["peak_mib"] for name, row in rows.items() if name.startswith("student") and "reranked" not in name]
        ratio("memory_over_ctranslate2_fp32", max(peaks, default=None), rows[whole]["peak_mib"])
    scores = {name: row["bleu"] for name, row in parts.get("trained", {}).items() if "bleu" in row}
    for precision in ("bf16", "int8"):
        losses = [
            scores[name.replace(precision, "fp32")] - score
            for name, score in scores.items()
            if name.startswith("student") and name.endswith(precision) and name.replace(precision, "fp32") in scores
        ]
        if losses:
            found[f"bleu_cost_{precision}"] = max(losses)
    return found


def installed(system: System) -> bool:
    package = {"huggingface": "transformers", "onnx": "onnxruntime"}.get(system.engine, system.engine)
    return system.engine == "ours" or find_spec(package) is not None


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_translate", description=__doc__)
    parser.add_argument("--run", type=Path, help="a finished run directory; without it only random weights race")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=840.0, help="for everything; later rounds are left out")
    parser.add_argument("--cap", type=float, default=3.0, help="seconds of one measurement, about")
    parser.add_argument("--only", nargs="+", help="systems whose names start with one of these")
    parser.add_argument("--keep", type=Path, help="keep finished parts here, and take those that are here already")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    start = time.monotonic()
    torch.set_num_threads(options.threads)
    size = translate_models.SMOKE if options.smoke else translate_models.Size()
    only = SMOKE if options.smoke else options.only
    parts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        for part in ("trained", "paper") if options.run else ("paper",):
            kept = options.keep and options.keep / f"{part}.json"
            if kept is not None and kept.is_file():
                parts[part] = json.loads(kept.read_text())
                continue
            scratch = Path(name) / part
            scratch.mkdir()
            chosen = systems(part, device=options.device, only=only)
            if options.device == "cuda":  # a machine with a GPU often has no network to install peers from
                missing = {system.engine for system in chosen if not installed(system)}
                chosen = [system for system in chosen if system.engine not in missing]
                say(f"{part}: not installed and left out: {', '.join(sorted(missing)) or 'nothing'}")
            needed = {system.model for system in chosen}
            if part == "trained":
                materials = translate_models.trained(scratch, options.run, needed)
                until = start + options.seconds / 3
            else:
                materials = translate_models.paper(scratch, size, needed, num_lines=max(SENTENCES[part]))
                until = start + options.seconds
            parts[part] = race(
                part, chosen, materials, threads=options.threads, device=options.device, cap=options.cap, until=until,
                rounds=1 if options.smoke else ROUNDS[part],
                sentences=SMALL if options.smoke else SENTENCES[part],
            )  # fmt: skip
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(parts[part]))
    found = figures(parts)
    content = {
        "threads": options.threads, "seconds": time.monotonic() - start, "figures": found,
        "paper": asdict(size) | {"source_tokens": translate_models.SOURCE, "target_tokens": translate_models.TARGET},
        "signature": signatures(1, tokenize="13a")["bleu"], "parts": parts,
    }  # fmt: skip
    print(translate_table.markdown(content))
    if only:
        return 0
    print(harness.write_results("translate", content, device=options.device))
    translate_table.write(content, harness.RESULTS if options.device == "cpu" else harness.RESULTS / "gpu")
    problems = harness.judge(found, harness.floors("translate" if options.device == "cpu" else "translate_gpu"))
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
