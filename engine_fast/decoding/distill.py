"""Sequence-level distillation: the teacher's beam search over a whole split, in chunks that survive a kill.

A chunk's result depends on its own sentences alone, so neither interruption nor the number of processes changes it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from engine_fast.config import DistillConfig
from engine_fast.data.atomic import replacing
from engine_fast.data.corpus import ParallelCorpus
from engine_fast.data.prepared import Prepared
from engine_fast.data.shards import ShardWriter
from engine_fast.decoding.chunks import Chunks, progress
from engine_fast.decoding.translate import DecodeSettings, Translator
from engine_fast.distributed.presence import beat
from engine_fast.errors import CheckpointError
from engine_fast.models import LoadedModel, Teacher

REPORT = "distill.json"
CORPUS = "corpus"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The hypotheses of consecutive sources."""

    counts: Ids
    """Hypotheses per source."""
    lengths: Ids
    """Tokens per hypothesis."""
    tokens: Ids
    """All of them, one after another."""
    log_probabilities: NDArray[np.float32]
    num_truncated: int


def distill(
    loaded: LoadedModel,
    prepared: Prepared,
    config: DistillConfig,
    directory: str | Path,
    *,
    split: str = "train",
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    show_progress: bool = True,
) -> ParallelCorpus | None:
    """Translate a split's sources with the teacher and write the pairs; returns the finished corpus on rank 0.

    Written under `directory`: corpus/ (shards: the source's own ids, the beam's ids, n_best pairs per source in a row),
    source.txt and target.txt (the same as text), distill.json (counts; last, so its presence means done). Until then
    each chunk is a file of its own, complete or absent: the same call again goes on where it stopped. Chunks are
    dealt to ranks; a rank that is done takes over what is still missing. Rank 0 assembles when all chunks are there;
    the others return None by then, and wait for nobody. Ranks share the directory and nothing else.

    A result made from another model, other data or another config is replaced; one that agrees is returned at once.
    Raises VocabularyError when teacher and data differ in vocabulary, CheckpointError for a model without beam search.
    """
    directory = Path(directory)
    if not isinstance(loaded.model, Teacher):
        raise CheckpointError(f"distill needs a teacher, got a {loaded.model.kind} model.")
    corpus = prepared.split(split)
    corpus.require_vocabularies(loaded.source_vocabulary.fingerprint, loaded.target_vocabulary.fingerprint)
    key = _key(loaded.model, corpus, config)
    if _finished(directory, key):
        return ParallelCorpus.open(directory / CORPUS) if rank == 0 else None
    starts = range(0, len(corpus), config.chunk_sentences)
    sizes = [min(config.chunk_sentences, len(corpus) - start) for start in starts]
    folder = directory / f"chunks-{key[:16]}"
    chunks = Chunks(folder, len(starts), ".npz", lambda: _finished(directory, key), rank, world_size)
    chunks.make_directory()

    model = _place(loaded.model, _DTYPES[config.precision], device)
    settings = DecodeSettings(
        beam=config.beam, length_penalty=config.length_penalty, n_best=config.n_best, max_tokens=config.max_tokens
    )
    teacher = LoadedModel(model, loaded.source_vocabulary, loaded.target_vocabulary, loaded.card)
    done = sum(sizes[number] for number in chunks.present())
    with progress("distill", len(corpus), done, show_progress and rank == 0) as advance:
        for number in chunks.missing(passed=lambda number: advance(sizes[number])):
            sources = [corpus.source(starts[number] + i) for i in range(sizes[number])]
            beat(f"distill: chunk {number + 1}")
            chunk = _search(Translator(teacher, settings), sources, advance)
            chunks.write(number, partial(_write_chunk, chunk))
    if rank == 0:
        _assemble(directory, key, corpus, chunks.paths, config, prepared)
    chunks.remove()
    return ParallelCorpus.open(directory / CORPUS) if rank == 0 else None


def _key(model: Teacher, corpus: ParallelCorpus, config: DistillConfig) -> str:
    """Everything the result depends on, as one hash."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(f"{model.kind} {model.architecture.model_dump_json()} {model.right_to_left}\n".encode())
    digest.update(config.model_dump_json().encode())
    digest.update(f"{corpus.source_fingerprint} {corpus.target_fingerprint} {len(corpus)}\n".encode())
    for i in range(len(corpus)):
        digest.update(np.ascontiguousarray(corpus.source(i), dtype=np.int32).tobytes())
    return digest.hexdigest()


def _finished(directory: Path, key: str) -> bool:
    try:
        report = json.loads((directory / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and report.get("key") == key


def _place(model: Teacher, dtype: torch.dtype, device: torch.device | str) -> Teacher:
    """The model on the device in the dtype; the caller's own stays as it is."""
    held = next(model.parameters())
    if held.dtype == dtype and held.device == torch.device(device) and not model.training:
        return model
    return copy.deepcopy(model).to(device=device, dtype=dtype).eval()


def _search(translator: Translator, sources: list[NDArray[Any]], advance: Callable[[int], None]) -> _Chunk:
    found = translator.search(sources, advance=advance)
    flat = [hypothesis for hypotheses in found for hypothesis in hypotheses]
    return _Chunk(
        counts=np.array([len(hypotheses) for hypotheses in found], dtype=np.int32),
        lengths=np.array([len(hypothesis.tokens) for hypothesis in flat], dtype=np.int32),
        tokens=np.array([token for hypothesis in flat for token in hypothesis.tokens], dtype=np.int32),
        log_probabilities=np.array([hypothesis.log_probability for hypothesis in flat], dtype=np.float32),
        num_truncated=translator.report.num_truncated,
    )


def _write_chunk(chunk: _Chunk, file: IO[bytes]) -> None:
    np.savez(
        file,
        counts=chunk.counts,
        lengths=chunk.lengths,
        tokens=chunk.tokens,
        log_probabilities=chunk.log_probabilities,
        num_truncated=np.int64(chunk.num_truncated),
    )


def _read_chunk(path: Path) -> _Chunk:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            parts = {name: arrays[name] for name in ("counts", "lengths", "tokens", "log_probabilities")}
            return _Chunk(**parts, num_truncated=int(arrays["num_truncated"]))
    except (ValueError, KeyError, BadZipFile, EOFError) as error:
        raise CheckpointError(
            f"{path}: damaged ({error}). Remove the file and start again: only it is redone."
        ) from error


def _assemble(
    directory: Path, key: str, corpus: ParallelCorpus, paths: list[Path], config: DistillConfig, prepared: Prepared
) -> None:
    """Chunks, in order, to shards and text. The report is written last."""
    (directory / REPORT).unlink(missing_ok=True)
    for abandoned in directory.glob(".*.partial-*"):
        abandoned.unlink() if abandoned.is_file() else shutil.rmtree(abandoned, ignore_errors=True)
    num_pairs = num_tokens = num_truncated = 0
    total = 0.0
    writer = ShardWriter(
        directory / CORPUS,
        source_fingerprint=corpus.source_fingerprint,
        target_fingerprint=corpus.target_fingerprint,
    )
    with (
        writer as shards,
        replacing(directory / "source.txt", "w") as source_text,
        replacing(directory / "target.txt", "w") as target_text,
    ):
        index = 0
        for path in paths:
            beat(f"distill: assembling {path.name}")
            chunk = _read_chunk(path)
            targets = iter(np.split(chunk.tokens, np.cumsum(chunk.lengths)[:-1]))
            for count in chunk.counts.tolist():
                source_ids = corpus.source(index)
                line = _one_line(prepared.source_vocabulary.decode(source_ids.tolist()))
                for _ in range(count):
                    target_ids = next(targets)
                    shards.add(source_ids, target_ids)
                    source_text.write(line)
                    target_text.write(_one_line(prepared.target_vocabulary.decode(target_ids.tolist())))
                index += 1
            num_pairs += len(chunk.lengths)
            num_tokens += len(chunk.tokens)
            num_truncated += chunk.num_truncated
            total += float(chunk.log_probabilities.sum(dtype=np.float64))
    report = {
        "key": key,
        "num_sources": len(corpus),
        "num_pairs": num_pairs,
        "num_target_tokens": num_tokens,
        "num_truncated_sources": num_truncated,
        "mean_log_probability": total / max(1, num_pairs),
        "config": config.model_dump(mode="json"),
    }
    with replacing(directory / REPORT, "w") as file:
        file.write(json.dumps(report, indent=2) + "\n")


def _one_line(text: str) -> str:
    return text.replace("\n", " ") + "\n"
