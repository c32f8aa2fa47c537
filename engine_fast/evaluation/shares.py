"""A rank's share of a split: the batches it decodes and scores, and how long that takes.

Batches depend on the sentences alone and are dealt out whole, so that no hypothesis and no energy depends on how many
ranks there are. There is no more to share than there are batches: with fewer of them than ranks, some ranks idle.

B sentences, S source positions, T target positions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from engine_fast.data.corpus import ParallelCorpus
from engine_fast.data.symbols import EOS, PAD
from engine_fast.decoding.hypothesis import Hypothesis
from engine_fast.distributed import World
from engine_fast.distributed.presence import beat
from engine_fast.energies import discrete_energy
from engine_fast.evaluation.systems import Decode
from engine_fast.models import Teacher

T = TypeVar("T")


def token_batches(lengths: Sequence[int], max_tokens: int) -> list[np.ndarray]:
    """Sentence indices, longest first, in batches of count * longest <= max_tokens (one sentence at least)."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    batches, start = [], 0
    while start < len(order):
        count = max(1, max_tokens // max(1, int(lengths[int(order[start])])))
        batches.append(order[start : start + count])
        start += count
    return batches


def deal(batches: Sequence[T], world: World) -> Sequence[T]:
    """This rank's batches. They come sorted by length, so every world.size-th one makes even loads."""
    return batches[world.rank :: world.size]


def merge(parts: Sequence[Mapping[int, T]], count: int) -> list[T]:
    """What all ranks found, in the corpus's order; each of `count` sentences must be there once."""
    found = {index: value for part in parts for index, value in part.items()}
    assert sum(map(len, parts)) == count == len(found), f"{count} sentences, shares of {[len(part) for part in parts]}"
    return [found[index] for index in range(count)]


def decode_share(
    decode: Decode, corpus: ParallelCorpus, *, label: str, max_tokens: int, limit: int, world: World
) -> tuple[dict[int, list[int]], float]:
    """Sentence -> ids of its translation, and the seconds that decoding took on this rank: length prediction and
    reranking included, text processing and the collation of batches not. `limit`: positions of the model."""
    found: dict[int, list[int]] = {}
    seconds = 0.0
    for number, indices in enumerate(deal(token_batches(corpus.source_lengths.tolist(), max_tokens), world)):
        beat(f"evaluate: {label} translates batch {number + 1}")
        source_BS, lengths_B = _inputs(corpus, indices, limit, world.device)
        if number == 0:
            decode(source_BS[:1], lengths_B[:1])  # first-call costs belong to no system
        hypotheses, spent = _timed(decode, source_BS, lengths_B)
        seconds += spent
        found.update(zip(indices.tolist(), (hypothesis.tokens for hypothesis in hypotheses), strict=True))
    return found, seconds


@torch.no_grad()
def score_share(
    judge: Teacher,
    corpus: ParallelCorpus,
    ids: Sequence[Sequence[int]],
    *,
    label: str,
    max_tokens: int,
    world: World,
) -> dict[int, float]:
    """Sentence -> E(x, y) = -log p(y | x) in nats; y as the decoder left it. `ids` are those of the whole split."""
    longest = [max(len(tokens), int(source)) for tokens, source in zip(ids, corpus.source_lengths, strict=True)]
    limit = judge.max_positions
    found: dict[int, float] = {}
    for indices in deal(token_batches(longest, max_tokens), world):
        beat(f"evaluate: energies of {label}")
        source_BS, _ = _inputs(corpus, indices, limit, world.device)
        target_BT = torch.full((len(indices), max(len(ids[i]) for i in indices)), PAD)
        for row, index in enumerate(indices.tolist()):
            target_BT[row, : len(ids[index])] = torch.tensor(ids[index])
        energy_B = discrete_energy(judge, source_BS, fit(target_BT.to(world.device), limit))
        found.update(zip(indices.tolist(), energy_B.tolist(), strict=True))
    return found


def latency(
    decode: Decode, corpus: ParallelCorpus, *, sentences: int, limit: int, device: torch.device
) -> float | None:
    """Median milliseconds of one sentence alone, over sentences spread evenly through the split; None for none."""
    count = min(sentences, len(corpus))
    if not count:
        return None
    times = []
    chosen = np.linspace(0, len(corpus) - 1, count).astype(np.int64)
    for index in (chosen[0], *chosen):
        beat("evaluate: one sentence alone")
        source_BS, lengths_B = _inputs(corpus, np.array([index]), limit, device)
        times.append(_timed(decode, source_BS, lengths_B)[1])
    return 1000 * statistics.median(times[1:])  # the first was there to be warm


def fit(ids_BS: Tensor, limit: int) -> Tensor:
    """Rows of more than `limit` tokens cut to `limit`, their last one replaced by EOS; the others as they are."""
    if ids_BS.shape[1] <= limit:
        return ids_BS
    cut_BS = ids_BS[:, :limit].clone()
    cut_BS[ids_BS[:, limit] != PAD, -1] = EOS
    return cut_BS


def _inputs(corpus: ParallelCorpus, indices: np.ndarray, limit: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sources (B, S), cut to `limit`, and the references' lengths (B,)."""
    batch = corpus.collate(indices).to(device)
    return fit(batch.source, limit), (batch.target != PAD).sum(1)


def _timed(decode: Decode, source_BS: Tensor, lengths_B: Tensor) -> tuple[list[Hypothesis], float]:
    # decoders return Python lists, so a GPU has finished when they do; only earlier work must not be counted
    if source_BS.is_cuda:
        torch.cuda.synchronize(source_BS.device)
    start = time.perf_counter()
    hypotheses = decode(source_BS, lengths_B)
    return hypotheses, time.perf_counter() - start
