"""Measure the systems of a run on one split, on all ranks: quality, energy, repetition, lengths and speed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine_fast.config import RunConfig
from engine_fast.data.corpus import ParallelCorpus
from engine_fast.data.prepared import Prepared
from engine_fast.data.symbols import EOS
from engine_fast.distributed import World, require_agreement
from engine_fast.distributed.presence import patient
from engine_fast.evaluation.files import write_atomic
from engine_fast.evaluation.metrics import (
    corpus_bleu,
    corpus_chrf,
    length_ratio,
    paired_bootstrap,
    repetition_rate,
    signatures,
    valid_share,
)
from engine_fast.evaluation.records import Measured, Records, as_lines
from engine_fast.evaluation.results import machine, versions
from engine_fast.evaluation.shares import decode_share, latency, merge, score_share
from engine_fast.evaluation.systems import Decode, System, decoder_of, roles_of, systems_of
from engine_fast.models import Student, Teacher, load_model

Say = Callable[[str], None]


def evaluate_systems(
    config: RunConfig,
    prepared: Prepared,
    directory: Path,
    *,
    teacher_dir: Path,
    cmlm_dir: Path | None,
    engine_dir: Path | None,
    world: World,
    say: Say,
    known: dict[str, float] | None = None,
) -> dict[str, Any] | None:
    """Every system of systems_of(config.evaluate) on the configured split; every rank of `world` must call it.

    A student that none of them is needs no directory. known: energies of references, to which this call adds its own,
    so that the next one in this process need not measure them again.

    The ranks decode and score shares of the batches; rank 0 computes the rest, prints and writes. But for times, the
    result is the same at any number of ranks. Energies are discrete, nats a sentence, mean over the split, under the
    fp32 teacher whatever the decoding's dtype. Speed is that of one rank: `sentences_per_second` divides by the
    decoding seconds of all ranks added up, `latency_ms` is measured on rank 0 when the other ranks are done.

    Writes directory/outputs/<label>.txt, one translation a line, source.txt, reference-<n>.txt, and the records that
    let the same call, interrupted, go on with the next system.
    Returns the parts of results.json that are measured (systems, references, lengths, signature, split) on rank 0 and
    None on the others, which return earlier: rank 0's last part takes long, wait for it without a collective.
    Raises: what a rank raises, PeerError on the others, and DistributedError on all when they do not see the same run.
    """
    with world.together():
        bench = _Bench(config, prepared, world, {"teacher": teacher_dir, "cmlm": cmlm_dir, "engine": engine_dir})
    require_agreement(world, bench.shared, "evaluate")
    reference_energy = bench.reference_energy({} if known is None else known)
    with world.together():
        records = Records(directory, bench.inputs)
        found = {}
        if world.is_main:
            if bench.num_cut:
                say(f"evaluate: {bench.num_cut} sources are longer than the models' positions and are cut")
            bench.write_texts(directory / "outputs")
            kept = ((system, records.load(system)) for system in bench.systems)
            found = {system.label: measured for system, measured in kept if measured is not None}
    done = world.broadcast(set(found))
    for system in bench.systems:
        if system.label in done:
            if world.is_main:
                say(f"{_progress(found[system.label].row)} (measured before)")
            continue
        ids, seconds = bench.decode(system)
        energy = bench.mean_energy(ids, system.label)
        with world.together():
            if world.is_main:
                measured = found[system.label] = bench.measure(system, ids, seconds, energy)
                records.store(system, measured)
                say(_progress(measured.row))
    if not world.is_main:
        return None
    for system in bench.systems:
        measured = found[system.label]
        if "latency_ms" not in measured.row:
            measured.row["latency_ms"] = bench.latency(system)
            records.store(system, measured)
    return bench.results(found, reference_energy)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A system's function, and the positions of the model behind it."""

    decode: Decode
    limit: int


class _Bench:
    """The split, the models, and what is done with one system at a time."""

    def __init__(self, config: RunConfig, prepared: Prepared, world: World, given: dict[str, Path | None]) -> None:
        directories = {role: path for role in roles_of(config.evaluate) if (path := given[role]) is not None}
        self._config, self._settings, self._world, self._prepared = config, config.evaluate, world, prepared
        split = self._settings.split
        self._corpus: ParallelCorpus = prepared.split(split)
        self._references = [list(stream) for stream in prepared.references(split)]
        self._tokenize = "none" if config.data.pretokenised else "13a"
        self.reference_ids = [[int(token) for token in self._corpus.target(i)] for i in range(len(self._corpus))]

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self._settings.precision]
        self._models: dict[str, Teacher | Student] = {
            role: load_model(
                path / "model", dtype=dtype, device=world.device, kind="teacher" if role == "teacher" else "student"
            ).model
            for role, path in directories.items()
        }
        students = [model for model in self._models.values() if isinstance(model, Student)]
        self.systems = systems_of(self._settings, refine=all(student.refines for student in students))
        judge = self._models["teacher"]
        if dtype != torch.float32:
            path = directories["teacher"] / "model"
            judge = load_model(path, dtype=torch.float32, device=world.device, kind="teacher").model
        self._judge = _teacher(judge)
        longest = min(model.max_positions for model in self._models.values())
        self.num_cut = int((self._corpus.source_lengths > longest).sum())
        # a model's config.json holds the hash of its weights, which load_model has compared
        models = {role: (path / "model" / "config.json").read_text("utf-8") for role, path in directories.items()}
        self._judged_by = models["teacher"]
        facts = {"settings": self._settings.model_dump(mode="json"), "models": models, "versions": versions()}
        self.shared = {name: json.dumps(fact, sort_keys=True) for name, fact in facts.items()}
        """What all ranks must have in common."""
        self.shared["data"] = prepared.report["key"]
        self.inputs = {**self.shared, "machine": machine(world.device)}
        """What decides a measurement; speeds of two machines must not stand in one table."""

    def decode(self, system: System) -> tuple[list[list[int]], float]:
        """Ids of every translation, in the corpus's order, and the seconds of all ranks together; on every rank."""
        loaded, candidates = self._load(system), max(system.beam, system.length_beam or 1)
        budget = max(1, self._settings.max_tokens // candidates)
        with self._world.together():
            share = decode_share(
                loaded.decode, self._corpus,
                label=system.label, max_tokens=budget, limit=loaded.limit, world=self._world,
            )  # fmt: skip
        shares = self._world.gather(share)
        return merge([found for found, _ in shares], len(self._corpus)), math.fsum(seconds for _, seconds in shares)

    def mean_energy(self, ids: Sequence[Sequence[int]], label: str) -> float:
        """Mean over the split of E(x, y) in nats; float64, exactly rounded, so that no order of adding matters."""
        with self._world.together():
            share = score_share(
                self._judge, self._corpus, ids,
                label=label, max_tokens=self._settings.max_tokens, world=self._world,
            )  # fmt: skip
        return math.fsum(merge(self._world.gather(share), len(ids))) / len(ids)

    def reference_energy(self, known: dict[str, float]) -> float:
        """mean_energy of the references."""
        key = json.dumps([self._judged_by, self.shared["data"], self._settings.split, self._settings.max_tokens])
        if key not in known:
            known[key] = self.mean_energy(self.reference_ids, "the references")
        return known[key]

    def measure(self, system: System, ids: list[list[int]], seconds: float, energy: float) -> Measured:
        """The system's row but for its latency."""
        # one translation a line: a vocabulary of bytes may spell a line break
        text = [self._prepared.target_vocabulary.decode(tokens).replace("\n", " ") for tokens in ids]
        synthetic = self._config.data.synthetic is not None
        row: dict[str, Any] = {
            "system": system.name,
            "label": system.label,
            "iterations": system.iterations,
            "length_beam": system.length_beam,
            "beam": system.beam if system.role == "teacher" else None,
            "oracle_length": system.oracle_length,
            "rerank": system.rerank,
            "bleu": corpus_bleu(text, self._references, tokenize=self._tokenize),
            "chrf": corpus_chrf(text, self._references),
            "energy": energy,
            **({"valid": valid_share(text, self._references)} if synthetic else {}),
            "repetition": repetition_rate(_words_only(ids)),
            "length_ratio": length_ratio(_words_only(ids), _words_only(self.reference_ids)),
            "length_accuracy": _share_equal(ids, self.reference_ids),
            "sentences_per_second": len(ids) / seconds,
            "num_ranks": self._world.size,
        }
        return Measured(row, _histogram(ids), text)

    def latency(self, system: System) -> float | None:
        """Median milliseconds of one sentence alone, on this rank."""
        loaded, sentences = self._load(system), self._settings.latency_sentences
        return latency(loaded.decode, self._corpus, sentences=sentences, limit=loaded.limit, device=self._world.device)

    def results(self, found: dict[str, Measured], reference_energy: float) -> dict[str, Any]:
        """Rows with their bootstrap, in the table's order, and what they are to be compared with."""
        measured = {system.label: found[system.label] for system in self.systems}
        rows = [each.row for each in measured.values()]
        baseline = next((row["label"] for row in rows if row["system"] == "cmlm"), rows[0]["label"])
        if self._settings.bootstrap_samples:
            with patient("evaluate: bootstrap"):
                bootstraps = paired_bootstrap(
                    baseline,
                    {label: each.text for label, each in measured.items()},
                    self._references,
                    samples=self._settings.bootstrap_samples,
                    tokenize=self._tokenize,
                )
            for row in rows:
                bootstrap = bootstraps[row["label"]]
                row |= {"bleu_interval": bootstrap.bleu_interval, "p_value": bootstrap.p_value}
        return {
            "systems": rows,
            "references": {
                "energy": reference_energy,
                "repetition": repetition_rate(_words_only(self.reference_ids)),
                "sentences": len(self._corpus),
                "streams": len(self._references),
                "cut_sources": self.num_cut,
            },
            "baseline": baseline,
            "split": self._settings.split,
            "lengths": {
                "reference": _histogram(self.reference_ids),
                **{label: each.lengths for label, each in measured.items()},
            },
            "signature": signatures(len(self._references), tokenize=self._tokenize),
        }

    def write_texts(self, outputs: Path) -> None:
        """What the translations are translations of, beside them."""
        write_atomic(outputs / "source.txt", as_lines(self._prepared.sources(self._settings.split)))
        for number, stream in enumerate(self._references):
            write_atomic(outputs / f"reference-{number}.txt", as_lines(stream))

    def _load(self, system: System) -> _Loaded:
        model, reranker = self._models[system.role], _teacher(self._models["teacher"])
        decode = decoder_of(system, model, reranker, length_penalty=self._settings.length_penalty)
        return _Loaded(decode, model.max_positions)


def _teacher(model: Teacher | Student) -> Teacher:
    assert isinstance(model, Teacher)
    return model


def _words_only(ids: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[token for token in tokens if token != EOS] for tokens in ids]


def _share_equal(ids: Sequence[Sequence[int]], reference_ids: Sequence[Sequence[int]]) -> float:
    same = sum(len(ours) == len(theirs) for ours, theirs in zip(ids, reference_ids, strict=True))
    return same / len(ids)


def _histogram(ids: Sequence[Sequence[int]]) -> dict[str, int]:
    """Length (end symbol included) -> sentences, as JSON has it."""
    return {str(length): count for length, count in sorted(Counter(map(len, ids)).items())}


def _progress(row: dict[str, Any]) -> str:
    return (
        f"{row['label']:<22} BLEU {row['bleu']:5.1f}  energy {row['energy']:7.2f}  "
        f"repeated {row['repetition']:6.2%}  {row['sentences_per_second']:8.1f} sentences/s"
    )
