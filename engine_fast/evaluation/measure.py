"""Measure the systems of a run on one split: quality, energy, repetition, lengths and speed.

B sentences, S source positions, T target positions.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine_fast.config import EvaluateConfig, RunConfig
from engine_fast.data.corpus import ParallelCorpus
from engine_fast.data.prepare import Prepared
from engine_fast.data.symbols import EOS, PAD
from engine_fast.decoding.hypothesis import Hypothesis
from engine_fast.energies import discrete_energy
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
from engine_fast.evaluation.systems import Decode, System, decoder_of, systems_of
from engine_fast.models import Transformer, load_model

Say = Callable[[str], None]


def evaluate_systems(
    config: RunConfig,
    prepared: Prepared,
    directory: Path,
    *,
    teacher_dir: Path,
    cmlm_dir: Path,
    engine_dir: Path,
    device: torch.device,
    say: Say,
) -> dict[str, Any]:
    """Every system of systems_of(config.evaluate) on the configured split.

    Writes directory/outputs/<label>.txt, one translation a line, and source.txt, reference-<n>.txt beside them.
    Energies are discrete, nats a sentence, mean over the split, under the fp32 teacher whatever the decoding's dtype.
    Returns the parts of results.json that are measured: systems, references, lengths, signature, split.
    """
    settings = config.evaluate
    corpus = prepared.split(settings.split)
    references = [list(stream) for stream in prepared.references(settings.split)]
    tokenize = "none" if config.data.pretokenised else "13a"
    outputs = directory / "outputs"
    _write_lines(outputs / "source.txt", prepared.sources(settings.split))
    for number, stream in enumerate(references):
        _write_lines(outputs / f"reference-{number}.txt", stream)

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.precision]
    loaded = {
        role: load_model(path / "model", dtype=dtype, device=device)
        for role, path in (("teacher", teacher_dir), ("cmlm", cmlm_dir), ("engine", engine_dir))
    }
    judge = load_model(teacher_dir / "model", dtype=torch.float32, device=device, kind="transformer").model
    assert isinstance(judge, Transformer)
    fast_judge = loaded["teacher"].model
    assert isinstance(fast_judge, Transformer)

    reference_ids = [[int(token) for token in corpus.target(i)] for i in range(len(corpus))]
    rows: list[dict[str, Any]] = []
    texts: dict[str, list[str]] = {}
    longest = min(model.model.architecture.max_positions for model in loaded.values())
    num_cut = int((corpus.source_lengths > longest).sum())
    if num_cut:
        say(f"evaluate: {num_cut} sources are longer than the models' {longest} positions and are cut")
    lengths = {"reference": _histogram(reference_ids)}
    for system in systems_of(settings):
        limit = loaded[system.role].model.architecture.max_positions
        decode = decoder_of(system, loaded[system.role].model, fast_judge, length_penalty=settings.length_penalty)
        hypotheses, seconds = _decode_split(decode, corpus, settings, system, limit, device)
        ids = [hypothesis.tokens for hypothesis in hypotheses]
        text = [prepared.target_vocabulary.decode(tokens) for tokens in ids]
        texts[system.label] = text
        lengths[system.label] = _histogram(ids)
        _write_lines(outputs / f"{system.label}.txt", text)
        row: dict[str, Any] = {
            "system": system.name,
            "label": system.label,
            "iterations": system.iterations,
            "length_beam": system.length_beam,
            "beam": system.beam if system.role == "teacher" else None,
            "oracle_length": system.oracle_length,
            "rerank": system.rerank,
            "bleu": corpus_bleu(text, references, tokenize=tokenize),
            "chrf": corpus_chrf(text, references),
            "energy": _mean_energy(judge, corpus, ids, settings, device),
            **({"valid": valid_share(text, references)} if config.data.synthetic is not None else {}),
            "repetition": repetition_rate(_words_only(ids)),
            "length_ratio": length_ratio(_words_only(ids), _words_only(reference_ids)),
            "length_accuracy": _share_equal(ids, reference_ids),
            "sentences_per_second": len(ids) / seconds,
            "latency_ms": _latency(decode, corpus, settings, system, limit, device),
        }
        rows.append(row)
        say(_progress(row))

    baseline = next((row["label"] for row in rows if row["system"] == "cmlm"), rows[0]["label"])
    if settings.bootstrap_samples:
        found = paired_bootstrap(baseline, texts, references, samples=settings.bootstrap_samples, tokenize=tokenize)
        for row in rows:
            bootstrap = found[row["label"]]
            row |= {"bleu_interval": bootstrap.bleu_interval, "p_value": bootstrap.p_value}
    return {
        "systems": rows,
        "references": {
            "energy": _mean_energy(judge, corpus, reference_ids, settings, device),
            "repetition": repetition_rate(_words_only(reference_ids)),
            "sentences": len(corpus),
            "streams": len(references),
            "cut_sources": num_cut,
        },
        "baseline": baseline,
        "split": settings.split,
        "lengths": lengths,
        "signature": signatures(len(references), tokenize=tokenize),
    }


def token_batches(lengths: Sequence[int], max_tokens: int) -> list[np.ndarray]:
    """Sentence indices, longest first, in batches of count * longest <= max_tokens (one sentence at least)."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    batches, start = [], 0
    while start < len(order):
        count = max(1, max_tokens // max(1, int(lengths[int(order[start])])))
        batches.append(order[start : start + count])
        start += count
    return batches


def _decode_split(
    decode: Decode, corpus: ParallelCorpus, settings: EvaluateConfig, system: System, limit: int, device: torch.device
) -> tuple[list[Hypothesis], float]:
    """Hypotheses in corpus order, and the seconds that decoding took: length prediction and reranking included,
    text processing and the collation of batches not."""
    found: dict[int, Hypothesis] = {}
    seconds = 0.0
    candidates = max(system.beam, system.length_beam or 1)
    batches = token_batches(corpus.source_lengths.tolist(), max(1, settings.max_tokens // candidates))
    for number, indices in enumerate(batches):
        batch = corpus.collate(indices).to(device)
        source_BS, lengths_B = fit(batch.source, limit), (batch.target != PAD).sum(1)
        if number == 0:
            decode(source_BS[:1], lengths_B[:1])  # first-call costs belong to no system
        hypotheses, spent = _timed(decode, source_BS, lengths_B, device)
        seconds += spent
        found.update(zip(batch.indices.tolist(), hypotheses, strict=True))
    return [found[i] for i in range(len(corpus))], seconds


def _latency(
    decode: Decode, corpus: ParallelCorpus, settings: EvaluateConfig, system: System, limit: int, device: torch.device
) -> float | None:
    """Median milliseconds of one sentence alone, over sentences spread evenly through the split."""
    count = min(settings.latency_sentences, len(corpus))
    if not count:
        return None
    times = []
    for index in np.linspace(0, len(corpus) - 1, count).astype(np.int64):
        batch = corpus.collate(np.array([index])).to(device)
        times.append(_timed(decode, fit(batch.source, limit), (batch.target != PAD).sum(1), device)[1])
    return 1000 * statistics.median(times)


def _timed(
    decode: Decode, source_BS: Tensor, lengths_B: Tensor, device: torch.device
) -> tuple[list[Hypothesis], float]:
    # decoders return Python lists, so a GPU has finished when they do; only earlier work must not be counted
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    hypotheses = decode(source_BS, lengths_B)
    return hypotheses, time.perf_counter() - start


@torch.no_grad()
def _mean_energy(
    judge: Transformer, corpus: ParallelCorpus, ids: list[list[int]], settings: EvaluateConfig, device: torch.device
) -> float:
    """Mean over sentences of E(x, y) = -log p(y | x) in nats; y as the decoder left it."""
    longest = [max(len(tokens), int(source)) for tokens, source in zip(ids, corpus.source_lengths, strict=True)]
    total = 0.0
    for indices in token_batches(longest, settings.max_tokens):
        batch = corpus.collate(indices).to(device)
        target_BT = torch.full((len(indices), max(len(ids[i]) for i in indices)), PAD, device=device)
        for row, index in enumerate(batch.indices.tolist()):
            target_BT[row, : len(ids[index])] = torch.tensor(ids[index], device=device)
        limit = judge.architecture.max_positions
        total += float(discrete_energy(judge, fit(batch.source, limit), fit(target_BT, limit)).double().sum())
    return total / len(ids)


def fit(ids_BS: Tensor, limit: int) -> Tensor:
    """Rows of more than `limit` tokens cut to `limit`, their last one replaced by EOS; the others as they are."""
    if ids_BS.shape[1] <= limit:
        return ids_BS
    cut_BS = ids_BS[:, :limit].clone()
    cut_BS[ids_BS[:, limit] != PAD, -1] = EOS
    return cut_BS


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


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    write_atomic(path, "".join(f"{line}\n" for line in lines))
