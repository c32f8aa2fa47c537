"""What ENGINE gains beyond the paper: each extra alone, and those together that helped, on one finished run.

    python -m benchmarks.bench_extras RUN --right-to-left TEACHER --work DIR [--updates N] [--threads N] [--only ..]

RUN is a directory of `engine-fast run` whose stages prepare, teacher, cmlm (and distill) are done; TEACHER the stage or
model directory of a right-to-left teacher of the same vocabularies. Every variant trains ENGINE from RUN's CMLM, in
DIR/<variant>, with nothing but its own setting changed; one that is finished is not trained, or measured, again. Kept
is the update of lowest dev energy (paper, section 4.4), for dev BLEU goes up and down by a point from one to the next.
"together" has the extras whose dev BLEU was above plain ENGINE's, if there are several, or those of --together;
"plain_other_seed" shows what chance alone does.
Writes benchmarks/results/extras.json and extras.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks import extras_table, harness
from engine_fast.config import EngineConfig, RunConfig, load_config, parse_config
from engine_fast.data.batching import sorted_batches
from engine_fast.data.corpus import ParallelCorpus
from engine_fast.data.prepared import Prepared
from engine_fast.data.symbols import EOS
from engine_fast.distributed import World
from engine_fast.energies import TeacherEnergy
from engine_fast.evaluation.metrics import corpus_bleu, length_ratio, paired_bootstrap, repetition_rate, signatures
from engine_fast.evaluation.records import Measured, Records
from engine_fast.evaluation.results import versions
from engine_fast.evaluation.shares import decode_share, merge, score_share
from engine_fast.evaluation.systems import System, decoder_of
from engine_fast.models import Student, Teacher, load_model
from engine_fast.training import train_engine
from engine_fast.training.metrics import read_metrics
from engine_fast.training.objectives import EngineObjective, temperature_at
from engine_fast.training.run_directory import read_record

ENSEMBLE = "the right-to-left teacher"
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ensemble": {"ensemble": [{"path": ENSEMBLE, "weight": 1.0}]},
    "o1_temperature": {"o1_temperature": {"start": 1.0, "end": 0.1, "shape": "exponential"}},
    "predicted_lengths": {"predicted_lengths": True},
    "repetition": {"repetition_weight": 2.0},
}
"""Settings of the engine section that differ from the run's own."""
OTHER_SEED, TOGETHER = "plain_other_seed", "together"
WORLD = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Bench:
    """The finished run, and what all variants have in common."""

    run: Path
    backward: Path
    work: Path
    updates: int
    threads: int

    def config(self, settings: dict[str, Any]) -> RunConfig:
        """The run's configuration with fewer updates and the variant's settings."""
        tree = load_config(self.run / "config.yaml").model_dump(mode="json", exclude_none=True, exclude_unset=True)
        for member in (settings := json.loads(json.dumps(settings))).get("ensemble", []):
            member["path"] = str(self.backward)
        part = max(1, self.updates // 5)
        schedule = {
            "max_updates": self.updates, "validate_every": part, "checkpoint_every": part,
            "early_stop": {"metric": "energy"},
        }  # fmt: skip
        tree["engine"] = {**tree.get("engine", {}), **schedule, **settings}
        tree["runtime"] = {**tree.get("runtime", {}), "threads": self.threads}
        return parse_config(tree, str(self.run / "config.yaml"))

    def train(self, name: str, settings: dict[str, Any]) -> Path:
        config, prepared = self.config(settings), self.prepared
        distilled = config.engine.data == "distilled"
        corpus = ParallelCorpus.open(self.run / "distill" / "corpus") if distilled else prepared.split("train")
        train_engine(
            config, prepared, corpus, self.work / name, valid_corpus=prepared.split("valid"),
            teacher_dir=self.run / "teacher", cmlm_dir=self.run / "cmlm",
        )  # fmt: skip
        return self.work / name

    @property
    def prepared(self) -> Prepared:
        return Prepared.open(self.run / "prepare" / "data")


class Judge:
    """Measures a model on the evaluated split: one pass, as the run's own evaluation does, and the gap."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self.config = bench, bench.config({})
        prepared, split = bench.prepared, self.config.evaluate.split
        self._corpus, self._vocabulary = prepared.split(split), prepared.target_vocabulary
        self.references = [list(stream) for stream in prepared.references(split)]
        self.tokenize = "none" if self.config.data.pretokenised else "13a"
        self._ids = [[int(token) for token in self._corpus.target(i)] for i in range(len(self._corpus))]
        self.teachers = {"left_to_right": _model(bench.run / "teacher"), "right_to_left": _model(bench.backward)}

    def rows(self, place: Path, model_dir: Path, role: str) -> dict[str, Measured]:
        """ "own", "rerank" and "oracle" lengths of a student; "greedy" of a teacher."""
        beam = getattr(self.config.evaluate, f"{role}_length_beam", None)
        systems = {
            "own": System("engine", "engine", iterations=1, length_beam=beam),
            "rerank": System("engine-rerank", "engine", iterations=1, length_beam=beam, rerank=True),
            "oracle": System("engine-oracle", "engine", iterations=1, length_beam=1, oracle_length=True),
        }
        if role == "teacher":
            systems = {"greedy": System("teacher-greedy", "teacher")}
        weights = {path.name: _weights(path) for path in (self._bench.run / "teacher", self._bench.backward)}
        inputs = {
            "model": _weights(model_dir), "teachers": weights, "versions": versions(),
            "settings": self.config.evaluate.model_dump(mode="json"), "data": self._bench.prepared.report["key"],
        }  # fmt: skip
        records = Records(place, inputs)
        found = {}
        for name, system in systems.items():
            measured = records.load(system)
            if measured is None:
                measured = self._measure(system, load_model(_model_directory(model_dir)).model)
                records.store(system, measured)
            found[name] = measured
            row = measured.row
            print(f"  {name:7} BLEU {row['bleu']:.2f}  energy {row['energy']:.2f}  repeated {row['repetition']:.2%}")
        return found

    def _measure(self, system: System, model: Any) -> Measured:
        settings, judge = self.config.evaluate, self.teachers["left_to_right"]
        limit = min(model.max_positions, judge.max_positions)
        decode = decoder_of(system, model, judge, length_penalty=settings.length_penalty)
        budget = settings.max_tokens // max(1, system.length_beam or 1)
        part, seconds = decode_share(
            decode, self._corpus, label=system.label, max_tokens=budget, limit=limit, world=WORLD
        )
        ids = merge([part], len(self._corpus))
        energies = {
            name: score_share(
                teacher, self._corpus, ids, label=system.label, max_tokens=settings.max_tokens, world=WORLD
            )
            for name, teacher in self.teachers.items()
        }
        means = {name: math.fsum(found.values()) / len(ids) for name, found in energies.items()}
        text = [self._vocabulary.decode(tokens).replace("\n", " ") for tokens in ids]
        words, wanted = ([[t for t in tokens if t != EOS] for tokens in side] for side in (ids, self._ids))
        row = {
            "bleu": corpus_bleu(text, self.references, tokenize=self.tokenize),
            "energy": means["left_to_right"],
            "energy_right_to_left": means["right_to_left"],
            "repetition": repetition_rate(words),
            "length_ratio": length_ratio(words, wanted),
            "length_accuracy": sum(len(a) == len(b) for a, b in zip(ids, self._ids, strict=True)) / len(ids),
            "sentences_per_second": len(ids) / seconds,
        }
        return Measured(row, {}, text)

    @torch.no_grad()
    def gap(self, model_dir: Path, temperature: float) -> float:
        """Discrete minus relaxed energy, nats a sentence, under the run's teacher with the references' lengths."""
        engine = self.config.engine
        settings = EngineConfig.model_validate({"o1": engine.o1, "o2": engine.o2, "temperature": temperature})
        student = cast(Student, load_model(_model_directory(model_dir)).model)
        objective = EngineObjective(student, TeacherEnergy(self.teachers["left_to_right"]), settings).eval()
        total, corpus = 0.0, self._corpus
        for indices in sorted_batches(corpus.target_lengths, 4096, source_lengths=corpus.source_lengths):
            stats = objective.evaluate(corpus.collate(indices))
            total += float(stats["energy"] - stats["relaxed_energy"])
        return total / len(corpus)


def temperature_of(config: EngineConfig, update: int) -> float:
    """O1's, of the update whose weights were kept."""
    if config.o1_temperature is None:
        return config.temperature
    return temperature_at(config.o1_temperature, min(1.0, update / max(1, config.max_updates - 1)))


def variant(bench: Bench, judge: Judge, name: str, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what extras.json says of it, its translations by kind of lengths)."""
    print(f"{name}: {json.dumps(settings) if settings else 'the run as it is'}", flush=True)
    directory = bench.train(name, settings)
    record = read_record(directory)
    best = record["best_update"]
    dev = next(
        line for line in read_metrics(directory / "metrics.jsonl") if line["kind"] == "valid" and line["update"] == best
    )
    measured = judge.rows(directory / "evaluate", directory, "engine")
    engine = bench.config(settings).engine
    found = {
        "settings": settings,
        **{kind: each.row for kind, each in measured.items()},
        "gap": judge.gap(directory, engine.temperature),
        "own_gap": judge.gap(directory, temperature_of(engine, best)),
        "dev": {key: dev[key] for key in ("bleu", "energy", "relaxed_energy", "gap", "length_accuracy")},
        "best_update": best,
        "training_seconds": round(record["seconds"], 1),
    }
    return found, {kind: each.text for kind, each in measured.items()}


def together(found: dict[str, dict[str, Any]]) -> list[str]:
    """The extras with a higher dev BLEU than plain ENGINE: the test set has no say."""
    plain = found["plain"]["dev"]["bleu"]
    return [name for name in VARIANTS if name in found and found[name]["dev"]["bleu"] > plain]


def run(bench: Bench, only: list[str], combined: list[str] | None = None) -> dict[str, Any]:
    """Train and measure everything; returns what extras.json holds. combined: instead of together()'s choice."""
    torch.set_num_threads(bench.threads)
    judge = Judge(bench)
    texts: dict[str, list[str]] = {}
    found: dict[str, dict[str, Any]] = {}

    def add(name: str, settings: dict[str, Any]) -> None:
        found[name], lines = variant(bench, judge, name, settings)
        texts.update({f"{name}/{kind}": text for kind, text in lines.items()})

    before: dict[str, Any] = {}
    for name, path, role in (
        ("cmlm", bench.run / "cmlm", "cmlm"),
        ("left_to_right", bench.run / "teacher", "teacher"),
        ("right_to_left", bench.backward, "teacher"),
    ):
        print(f"{name}: as it is", flush=True)
        rows = judge.rows(bench.work / "before" / name, path, role)
        before[name] = {kind: each.row for kind, each in rows.items()}
    for name in only:
        add(name, VARIANTS[name])
    add(OTHER_SEED, {"seed": judge.config.seed + 1})
    helped = together(found)
    combined = helped if combined is None else combined
    if len(combined) > 1:
        add(TOGETHER, {key: value for name in combined for key, value in VARIANTS[name].items()})
    bootstraps = paired_bootstrap(
        "plain/own", texts, judge.references,
        samples=judge.config.evaluate.bootstrap_samples or 1000, tokenize=judge.tokenize,
    )  # fmt: skip
    for label, bootstrap in bootstraps.items():
        name, kind = label.split("/")
        found[name][kind] |= {"bleu_interval": bootstrap.bleu_interval, "p_value": bootstrap.p_value}
    return {
        "corpus": judge.config.name,
        "split": judge.config.evaluate.split,
        "seeds": 1,
        "updates": bench.updates,
        "length_beam": judge.config.evaluate.engine_length_beam,
        "signature": signatures(len(judge.references), tokenize=judge.tokenize)["bleu"],
        "helped_on_dev": helped,
        "combined": combined,
        "before": before,
        "variants": found,
    }


def _model_directory(path: Path) -> Path:
    return path / "model" if (path / "model" / "config.json").is_file() else path


def _weights(path: Path) -> str:
    tree = json.loads((_model_directory(path) / "config.json").read_text(encoding="utf-8"))
    return str(tree["weights"]["sha256"])


def _model(path: Path) -> Teacher:
    return cast(Teacher, load_model(_model_directory(path), kind="teacher", dtype=torch.float32).model)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_extras",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="directory of a run whose cmlm stage is done")
    parser.add_argument("--right-to-left", type=Path, required=True, help="directory of the other teacher")
    parser.add_argument("--work", type=Path, required=True, help="where the variants are trained")
    parser.add_argument("--updates", type=int, default=250, help="of each variant")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="beside plain")
    parser.add_argument("--together", nargs="+", choices=list(VARIANTS), help="what to combine, instead of what helped")
    options = parser.parse_args()
    bench = Bench(options.run, options.right_to_left, options.work, options.updates, options.threads)
    content = run(bench, list(dict.fromkeys(["plain", *options.only])), options.together)
    path = harness.write_results("extras", content)
    (path.with_suffix(".md")).write_text(extras_table.markdown(content), encoding="utf-8")
    print(extras_table.markdown(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
