"""Batches: a partition of the corpus, under budget, the same on every rank and in every process."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_fast.config import BatchConfig
from engine_fast.data.batching import BatchPlan, Lengths, padding_share, sorted_batches
from engine_fast.data.prepare import Prepared
from engine_fast.errors import ConfigError


@dataclass(frozen=True)
class Lengthy:
    source_lengths: Lengths
    target_lengths: Lengths


def corpus(num: int, seed: int = 0, longest: int = 40) -> Lengthy:
    generator = np.random.default_rng(seed)
    target = generator.integers(1, longest + 1, size=num)
    source = np.clip(target + generator.integers(-4, 5, size=num), 1, longest)
    return Lengthy(source.astype(np.int32), target.astype(np.int32))


@given(
    num=st.integers(1, 300),
    max_tokens=st.integers(40, 400),
    max_sentences=st.none() | st.integers(1, 9),
    buckets=st.integers(1, 20),
    accumulate=st.integers(1, 4),
    world_size=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_ranks_partition_the_data_exactly(
    num: int, max_tokens: int, max_sentences: int | None, buckets: int, accumulate: int, world_size: int, epoch: int
) -> None:
    data = corpus(num)
    batch = BatchConfig(
        max_tokens=max_tokens, max_sentences=max_sentences, length_buckets=buckets, accumulate=accumulate
    )
    ranks = [
        BatchPlan(data, batch, seed=5, rank=rank, world_size=world_size).updates(epoch) for rank in range(world_size)
    ]
    assert len({len(updates) for updates in ranks}) == 1
    seen: list[int] = []
    for parts in zip(*ranks, strict=True):  # the same update on every rank
        batches = [one for part in parts for one in part.batches]
        assert all(len(part.batches) == accumulate for part in parts)
        members = np.concatenate(batches)
        assert len(members) > 0
        assert {part.num_sentences for part in parts} == {len(members)}
        assert {part.num_target_tokens for part in parts} == {int(data.target_lengths[members].sum())}
        for one in batches:
            assert one.dtype == np.int64
            longest = max(data.source_lengths[one].max(initial=0), data.target_lengths[one].max(initial=0))
            assert len(one) * longest <= max_tokens
            assert max_sentences is None or len(one) <= max_sentences
        seen += members.tolist()
    assert sorted(seen) == list(range(num))


def test_only_the_last_update_is_short() -> None:
    plan = BatchPlan(corpus(500), BatchConfig(max_tokens=100, accumulate=3), seed=0, rank=1, world_size=2)
    *full, _ = plan.updates(0)
    assert all(len(one) for update in full for one in update.batches)


def test_epochs_differ_and_repeat() -> None:
    data, batch = corpus(400), BatchConfig(max_tokens=200)

    def order(seed: int, epoch: int) -> list[list[int]]:
        return [update.batches[0].tolist() for update in BatchPlan(data, batch, seed=seed).updates(epoch)]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) != order(2, 0)
    assert order(1, 1) != order(2, 0)


def test_resuming_in_mid_epoch_continues_the_same_updates() -> None:
    data, batch = corpus(400), BatchConfig(max_tokens=150, accumulate=2)
    whole = BatchPlan(data, batch, seed=9).updates(4)
    resumed = BatchPlan(data, batch, seed=9).updates(4, consumed=22)
    assert [[one.tolist() for one in update.batches] for update in whole[11:]] == [
        [one.tolist() for one in update.batches] for update in resumed
    ]


def test_more_ranks_see_the_same_micro_batches() -> None:
    data, batch = corpus(400), BatchConfig(max_tokens=150, accumulate=4)
    alone = BatchPlan(data, batch, seed=2).updates(0)
    halves = [
        BatchPlan(data, batch.model_copy(update={"accumulate": 2}), seed=2, rank=rank, world_size=2).updates(0)
        for rank in (0, 1)
    ]
    for whole, left, right in zip(alone, *halves, strict=True):
        assert {tuple(one) for one in whole.batches} == {tuple(one) for one in (*left.batches, *right.batches)}


@given(
    num=st.integers(1, 300),
    micro_batches=st.integers(1, 7),
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    epoch=st.integers(0, 2),
)
def test_micro_batches_over_all_ranks_give_the_same_updates_at_any_number_of_them(
    num: int, micro_batches: int, sizes: list[int], epoch: int
) -> None:
    data, batch = corpus(num), BatchConfig(max_tokens=60, micro_batches=micro_batches)

    def numbered(size: int) -> list[dict[int, list[int]]]:
        """Every update: global number of a micro-batch -> its sentences."""
        ranks = [BatchPlan(data, batch, seed=3, rank=rank, world_size=size).updates(epoch) for rank in range(size)]
        result = []
        for parts in zip(*ranks, strict=True):
            assert {len(part.batches) for part in parts} == {-(-micro_batches // size)}
            whole = {
                turn * size + rank: one.tolist()
                for rank, part in enumerate(parts)
                for turn, one in enumerate(part.batches)
            }
            result.append({number: one for number, one in sorted(whole.items()) if one})
            assert {part.num_micro_batches for part in parts} == {len(result[-1])}
            assert list(result[-1]) == list(range(len(result[-1])))
        return result

    first, *others = map(numbered, sizes)
    assert all(other == first for other in others)


@given(
    num=st.integers(1, 300),
    before=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    after=st.tuples(st.integers(1, 4), st.none() | st.integers(1, 7)),
    done=st.integers(0, 9),
)
def test_other_ranks_go_on_after_the_micro_batches_that_were_used(
    num: int, before: tuple[int, int], after: tuple[int, int | None], done: int
) -> None:
    """(ranks, accumulate) until `done`, then (ranks, micro_batches or accumulate 2): each sentence once an epoch."""
    data, used, seen = corpus(num), 0, []
    for rank in range(before[0]):
        batch = BatchConfig(max_tokens=60, accumulate=before[1])
        part = BatchPlan(data, batch, seed=3, rank=rank, world_size=before[0]).updates(1)[:done]
        used = sum(update.num_micro_batches for update in part)
        seen += [index for update in part for one in update.batches for index in one.tolist()]
    batch = BatchConfig(max_tokens=60, micro_batches=after[1], accumulate=1 if after[1] else 2)
    for rank in range(after[0]):
        rest = BatchPlan(data, batch, seed=3, rank=rank, world_size=after[0]).updates(1, consumed=used)
        seen += [index for update in rest for one in update.batches for index in one.tolist()]
    assert sorted(seen) == list(range(num))


def test_a_sentence_beyond_the_budget_is_named() -> None:
    data = corpus(50)
    data.target_lengths[17] = 99
    with pytest.raises(ConfigError, match=r"batch.max_tokens = 60, expected at least 99, the length of sentence 17"):
        BatchPlan(data, BatchConfig(max_tokens=60), seed=0)


def test_rank_outside_the_world() -> None:
    with pytest.raises(ValueError, match="rank = 2"):
        BatchPlan(corpus(5), BatchConfig(), seed=0, rank=2, world_size=2)


@given(num=st.integers(0, 200), max_tokens=st.integers(1, 100), max_sentences=st.none() | st.integers(1, 5))
def test_sorted_batches_hold_every_sentence_once(num: int, max_tokens: int, max_sentences: int | None) -> None:
    data = corpus(num)
    batches = sorted_batches(
        data.target_lengths, max_tokens, source_lengths=data.source_lengths, max_sentences=max_sentences
    )
    assert sorted(index for batch in batches for index in batch.tolist()) == list(range(num))
    longest = [max(data.source_lengths[one].max(), data.target_lengths[one].max()) for one in batches]
    assert longest == sorted(longest, reverse=True)
    for one, width in zip(batches, longest, strict=True):
        assert len(one) == 1 or len(one) * width <= max_tokens
        assert max_sentences is None or len(one) <= max_sentences


def test_padding_share_by_hand() -> None:
    lengths = np.array([1, 3, 4], dtype=np.int32)
    batches = [np.array([0, 1]), np.array([2]), np.array([], dtype=np.int64)]
    assert padding_share(batches, lengths) == pytest.approx(1 - 8 / 10)


def test_padding_of_the_demo_corpus(demo: Prepared) -> None:
    plan = BatchPlan(demo.split("train"), BatchConfig(max_tokens=1024), seed=0)
    assert plan.padding_share(0) < 0.05


@pytest.mark.parametrize("max_tokens", [1024, 3000, 4096])
def test_padding_on_real_text_stays_below_five_percent(multi30k: Prepared, max_tokens: int) -> None:
    data = multi30k.split("train")
    plan = BatchPlan(data, BatchConfig(max_tokens=max_tokens), seed=1)
    batches = [update.batches[0] for update in plan.updates(0)]
    assert padding_share(batches, data.target_lengths) < 0.05
    assert plan.padding_share(0) < 0.05
    assert plan.padding_share(1) < 0.05
