"""Shares of a split: every sentence once, the same batches for any number of ranks, honest times."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine_fast.data.corpus import ParallelCorpus
from engine_fast.data.shards import ShardWriter
from engine_fast.data.symbols import EOS, PAD
from engine_fast.decoding import beam_search
from engine_fast.decoding.hypothesis import Hypothesis
from engine_fast.distributed import World
from engine_fast.energies import discrete_energy
from engine_fast.evaluation.shares import deal, decode_share, fit, latency, merge, score_share, token_batches
from tests.decoding.tiny import make_teacher, pad

CPU = torch.device("cpu")
LIMIT = 24


@pytest.fixture
def corpus(tmp_path: Path) -> ParallelCorpus:
    """40 sentences of 2 to 10 tokens."""
    rng = random.Random(1)
    with ShardWriter(tmp_path / "split", source_fingerprint="a" * 64, target_fingerprint="a" * 64) as shards:
        for _ in range(40):
            source, target = ([*rng.choices(range(5, 12), k=rng.randint(1, 9)), EOS] for _ in range(2))
            shards.add(source, target)
    return ParallelCorpus.open(tmp_path / "split")


@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(1, 200))
def test_batches_hold_every_sentence_once_within_the_budget(lengths: list[int], max_tokens: int) -> None:
    batches = token_batches(lengths, max_tokens)
    assert sorted(int(i) for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= max_tokens


def test_fit_cuts_only_what_is_too_long() -> None:
    ids_BS = torch.tensor([[7, 8, 9, EOS], [7, 8, EOS, PAD], [7, EOS, PAD, PAD]])
    assert fit(ids_BS, 3).tolist() == [[7, 8, EOS], [7, 8, EOS], [7, EOS, PAD]]
    assert fit(ids_BS, 4) is ids_BS
    assert ids_BS[0, 2] == 9  # the batch itself is left alone


@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(1, 200), st.integers(1, 9))
def test_every_batch_is_dealt_to_one_rank(lengths: list[int], max_tokens: int, ranks: int) -> None:
    batches = [batch.tolist() for batch in token_batches(lengths, max_tokens)]
    hands = [deal(batches, World(rank, ranks, CPU)) for rank in range(ranks)]
    assert sorted(batch for hand in hands for batch in hand) == sorted(batches)
    assert max(map(len, hands)) - min(map(len, hands)) <= 1


def test_merging_wants_every_sentence_once() -> None:
    assert merge([{2: "c", 0: "a"}, {}, {1: "b"}], 3) == ["a", "b", "c"]
    for wrong in ([{0: "a"}, {1: "b"}], [{0: "a", 1: "b", 2: "c"}, {2: "c"}], [{0: "a", 1: "b"}, {1: "b"}]):
        with pytest.raises(AssertionError, match="3 sentences"):
            merge(wrong, 3)


@pytest.mark.parametrize("ranks", [2, 3, 50])
def test_shares_add_up_to_what_one_rank_finds(corpus: ParallelCorpus, ranks: int) -> None:
    teacher = make_teacher().float()

    def decode(source_BS: Tensor, _: Tensor | None) -> list[Hypothesis]:
        return [best[0] for best in beam_search(teacher, source_BS, beam=3)]

    def all_of(size: int) -> tuple[list[list[int]], list[float]]:
        worlds = [World(rank, size, CPU) for rank in range(size)]
        shares = [
            decode_share(decode, corpus, label="teacher", max_tokens=40, limit=LIMIT, world=world) for world in worlds
        ]
        assert all((seconds > 0) == bool(found) for found, seconds in shares)
        ids = merge([found for found, _ in shares], len(corpus))
        energies = [score_share(teacher, corpus, ids, label="teacher", max_tokens=60, world=world) for world in worlds]
        return ids, merge(energies, len(corpus))

    ids, energies = all_of(1)
    assert all_of(ranks) == (ids, energies)  # to the last bit
    index = 7
    with torch.no_grad():
        alone = discrete_energy(teacher, pad([corpus.source(index).tolist()]), torch.tensor([ids[index]]))
    assert energies[index] == pytest.approx(float(alone), rel=1e-5)


def test_first_calls_and_one_by_one_times(corpus: ParallelCorpus) -> None:
    """The first call, here the slowest, belongs to no time."""
    calls: list[tuple[int, ...]] = []

    def decode(source_BS: Tensor, lengths_B: Tensor | None) -> list[Hypothesis]:
        assert lengths_B is not None
        assert len(lengths_B) == len(source_BS)
        if not calls:
            time.sleep(0.5)
        calls.append(tuple(source_BS.shape))
        return [Hypothesis([EOS], 0.0, 0.0) for _ in source_BS]

    world = World(1, 2, CPU)
    found, seconds = decode_share(decode, corpus, label="teacher", max_tokens=40, limit=LIMIT, world=world)
    batches = token_batches(corpus.source_lengths.tolist(), 40)[1::2]
    assert sorted(found) == sorted(int(i) for batch in batches for i in batch)
    assert [shape[0] for shape in calls] == [1, *map(len, batches)]
    assert seconds < 0.5
    calls.clear()
    milliseconds = latency(decode, corpus, sentences=3, limit=LIMIT, device=CPU)
    assert milliseconds is not None
    assert 0 < milliseconds < 500
    lengths = corpus.source_lengths[np.array([0, 0, 19, 39])]
    assert calls == [(1, length) for length in lengths.tolist()]
    assert latency(decode, corpus, sentences=0, limit=LIMIT, device=CPU) is None
