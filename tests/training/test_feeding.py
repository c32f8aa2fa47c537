"""Which sentences are trained on, in which order, and from where after a resume."""

import numpy as np
import pytest
import torch

from engine_fast.config import BatchConfig
from engine_fast.data.batching import Batch
from engine_fast.data.symbols import EOS, PAD
from engine_fast.distributed import World
from engine_fast.errors import DataError
from engine_fast.training.feeding import Feeder, clipped, fitting
from engine_fast.training.seeding import derive, seed_torch


class Numbers:
    """Sentence i holds i + 10, as often as its length says, and the end symbol."""

    def __init__(self, lengths):
        self.source_lengths = self.target_lengths = np.array(lengths, dtype=np.int32)

    def collate(self, indices):
        rows = [torch.tensor([i + 10] * (self.target_lengths[i] - 1) + [EOS]) for i in indices]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        return Batch(ids, ids, torch.as_tensor(np.asarray(indices)))


def feeder(rank=0, size=1, **batch):
    corpus = Numbers([2 + i % 7 for i in range(50)])
    world = World(rank, size, torch.device("cpu"))
    return Feeder(corpus, BatchConfig(max_tokens=24, **batch), seed=5, world=world)


def contents(feed):
    return [(batch.indices.tolist(), weight) for batch, weight in feed.batches]


@pytest.mark.parametrize("done", [1, 7, 30])
def test_seek_continues_where_the_last_update_says(done):
    whole, again = feeder(), feeder()
    for _ in range(done):
        last = whole.take()
    again.seek(last.next_epoch, last.next_consumed)
    for _ in range(25):
        one, other = whole.take(), again.take()
        assert contents(one) == contents(other)
        assert (one.epoch, one.next_epoch, one.next_consumed) == (other.epoch, other.next_epoch, other.next_consumed)


def test_prefetching_changes_nothing():
    plain, eager = feeder(), feeder()
    for _ in range(25):
        eager.prefetch()
        assert contents(plain.take()) == contents(eager.take())


def test_every_sentence_once_an_epoch_over_all_ranks():
    seen, ranks = [], [feeder(rank, 3, accumulate=2) for rank in range(3)]
    while True:
        feeds = [rank.take() for rank in ranks]
        assert len({feed.num_target_tokens for feed in feeds}) == 1
        assert len({len(feed.batches) for feed in feeds}) == 1
        tokens = 0
        for feed in feeds:
            for batch, weight in feed.batches:
                assert len(batch.indices) > 0
                if weight:
                    seen += batch.indices.tolist()
                    tokens += batch.num_target_tokens
        assert tokens == feeds[0].num_target_tokens
        if feeds[0].next_epoch == 1:
            break
    assert sorted(seen) == list(range(50))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_seek_goes_on_with_other_ranks_in_mid_epoch(before, after):
    ranks = [feeder(rank, before) for rank in range(before)]
    done = [[rank.take() for rank in ranks] for _ in range(3)]
    assert done[-1][0].next_epoch == 0
    others = [feeder(rank, after) for rank in range(after)]
    for other in others:
        other.seek(done[-1][0].next_epoch, done[-1][0].next_consumed)
    while done[-1][0].next_epoch == 0:
        done.append([other.take() for other in others])
    seen = [index for feeds in done for feed in feeds for batch, weight in feed.batches if weight
            for index in batch.indices.tolist()]  # fmt: skip
    assert sorted(seen) == list(range(50))
    assert done[-1][0].next_consumed == 0


def test_a_rank_beyond_the_micro_batches_of_an_update_has_stand_ins():
    feeds = [feeder(rank, 3, micro_batches=2).take() for rank in range(3)]
    assert [[weight for _, weight in feed.batches] for feed in feeds] == [[1.0], [1.0], [0.0]]
    assert len({feed.num_target_tokens for feed in feeds}) == 1


def test_a_rank_without_work_gets_a_stand_in_of_no_weight():
    last = None
    ranks = [feeder(rank, 5, accumulate=7) for rank in range(5)]
    while last is None or last[0].next_epoch == 0:
        last = [rank.take() for rank in ranks]
    weights = [weight for feed in last for _, weight in feed.batches]
    assert set(weights) == {0.0, 1.0}


def test_sentences_beyond_the_model_are_left_out_and_counted():
    corpus = Numbers([3, 9, 4, 8, 5])
    fits, dropped = fitting(corpus, 8, what="corpus", has_length_classes=False)
    assert dropped == 1
    assert fits.collate([1, 2]).indices.tolist() == [2, 3]
    _, dropped = fitting(corpus, 8, what="corpus", has_length_classes=True)
    assert dropped == 2  # class 8 would be the ninth of 8
    with pytest.raises(DataError, match="none of its 5 sentences"):
        fitting(corpus, 2, what="corpus", has_length_classes=False)


def test_clipping_keeps_the_end_symbol():
    source = torch.tensor([[7, 8, 9, 10, EOS], [7, 8, EOS, PAD, PAD]])
    batch = Batch(source, source, torch.arange(2))
    assert clipped(batch, 5) is source
    assert clipped(batch, 3).tolist() == [[7, 8, EOS], [7, 8, EOS]]
    assert clipped(batch, 4).tolist() == [[7, 8, 9, EOS], [7, 8, EOS, PAD]]


def test_seeds_follow_from_their_parts_alone():
    assert derive(1, "teacher", 2) == derive(1, "teacher", 2)
    assert len({derive(1, "teacher", 2), derive(1, "teacher", 3), derive(12, "teacher"), derive(1, 2, "teacher")}) == 4
    seed_torch(1, "x")
    one = torch.rand(3)
    seed_torch(1, "x")
    assert torch.equal(one, torch.rand(3))
