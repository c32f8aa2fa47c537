from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from engine_fast.data.symbols import BOS, EOS, MASK, PAD
from engine_fast.decoding import beam_search, greedy
from engine_fast.decoding.hypothesis import top
from engine_fast.errors import ConfigError
from engine_fast.models import Transformer, shift_right
from tests.decoding.tiny import make_teacher, pad


def log_probability(model: Transformer, source_1S: Tensor, tokens: list[int]) -> float:
    """One uncached pass over the whole target."""
    target_1T = torch.tensor([tokens])
    log_probs = model(source_1S, shift_right(target_1T)).log_softmax(-1)
    return log_probs.gather(2, target_1T[:, :, None]).sum().item()


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beam_as_wide_as_the_space_finds_what_enumeration_finds(length_penalty: float) -> None:
    words = [3, 5, 6]  # of 7 ids, four are special and may not be emitted
    model = make_teacher(size=7)
    source = torch.tensor([[5, 6, 5, EOS]])
    every = [[*s, EOS] for n in (1, 2, 3) for s in itertools.product(words, repeat=n)]
    truth = sorted(((log_probability(model, source, s) / len(s) ** length_penalty, s) for s in every), reverse=True)
    found = beam_search(
        model, source, beam=len(every), n_best=len(every), length_penalty=length_penalty, max_length=(0, 3)
    )[0]
    assert [h.tokens for h in found] == [s for _, s in truth]
    assert [h.score for h in found] == pytest.approx([score for score, _ in truth], abs=1e-10)


def test_not_stopping_early_finds_the_best_with_a_narrower_beam() -> None:
    """With beam 9 (all live prefixes of length 2) the search is exact only if it goes on after 9 have finished."""
    exact = 0
    for seed in range(20):
        model = make_teacher(size=7, seed=seed)
        source = torch.tensor([[6, 5, EOS]])
        every = [[*s, EOS] for n in (1, 2, 3) for s in itertools.product([3, 5, 6], repeat=n)]
        best = max(every, key=lambda s: log_probability(model, source, s) / len(s))
        late = beam_search(model, source, beam=9, max_length=(0, 3), stop_early=False)[0][0]
        early = beam_search(model, source, beam=9, max_length=(0, 3))[0][0]
        assert late.tokens == best
        assert late.score >= early.score
        exact += early.tokens == best
    assert exact > 0


@pytest.mark.parametrize("seed", range(5))
def test_beam_of_one_is_greedy(seed: int, sources: Tensor) -> None:
    model = make_teacher(seed=seed)
    wide = beam_search(model, sources, beam=1)
    for hypotheses, hypothesis in zip(wide, greedy(model, sources), strict=True):
        assert hypotheses[0].tokens == hypothesis.tokens
        assert hypotheses[0].score == pytest.approx(hypothesis.score)
        assert hypotheses[0].log_probability == pytest.approx(hypothesis.log_probability)


def test_greedy_words_are_the_argmax_of_an_uncached_pass(teacher: Transformer, sources: Tensor) -> None:
    for source, hypothesis in zip(sources, greedy(teacher, sources), strict=True):
        source = source[source != PAD][None]
        logits = teacher(source, shift_right(torch.tensor([hypothesis.tokens])))[0]
        logits[:, [BOS, PAD, MASK]] = float("-inf")
        logits[0, EOS] = float("-inf")
        expected = logits.argmax(-1).tolist()
        assert hypothesis.tokens[:-1] == expected[:-1]


@pytest.mark.parametrize("beam", [1, 4])
def test_scores_are_those_of_an_uncached_pass(beam: int, teacher: Transformer, sources: Tensor) -> None:
    for source, hypotheses in zip(sources, beam_search(teacher, sources, beam=beam, n_best=beam), strict=True):
        assert len(hypotheses) == beam
        assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)
        assert len({tuple(h.tokens) for h in hypotheses}) == beam
        for h in hypotheses:
            exact = log_probability(teacher, source[source != PAD][None], h.tokens)
            assert h.log_probability == pytest.approx(exact, abs=1e-9)
            assert h.score == pytest.approx(exact / len(h.tokens), abs=1e-9)


@pytest.mark.parametrize("beam", [1, 3])
def test_a_sentence_does_not_depend_on_its_batch(beam: int) -> None:
    model = make_teacher(seed=3, scale=0.8)
    rows = [[5, 6, 7, 8, EOS], [9, EOS], [11, 5, 10, EOS], [7, 7, 9, 10, 6, 5, EOS], [8, 11, EOS], [6, 6, EOS]]
    together = beam_search(model, pad(rows), beam=beam)
    alone = [beam_search(model, torch.tensor([row]), beam=beam)[0] for row in rows]
    assert len({len(h[0].tokens) for h in together}) > 1, "the sentences should leave the batch at different steps"
    assert [h[0].tokens for h in together] == [h[0].tokens for h in alone]
    assert [h.tokens for h in greedy(model, pad(rows))] == [
        greedy(model, torch.tensor([row]))[0].tokens for row in rows
    ]


@pytest.mark.parametrize("seed", range(8))
def test_what_is_never_emitted(seed: int, sources: Tensor) -> None:
    model = make_teacher(seed=seed)
    for hypotheses in beam_search(model, sources, beam=4, n_best=4):
        for h in hypotheses:
            assert not {BOS, PAD, MASK} & set(h.tokens)
            assert h.tokens.count(EOS) == 1
            assert h.tokens[-1] == EOS
            assert len(h.tokens) >= 2


def test_length_is_limited_by_the_source_and_by_the_positions(sources: Tensor) -> None:
    model = make_teacher(seed=1)
    with torch.no_grad():  # EOS never wins by itself
        model.decoder.embedding.weight[EOS] = 0
        model.decoder.embedding.weight[6] *= 20
    for decode in (greedy, lambda *a, **k: [h[0] for h in beam_search(*a, **k, beam=2)]):
        short = decode(model, sources, max_length=(0.5, 2))
        limits = [int(0.5 * n + 2) + 1 for n in (sources != PAD).sum(1).tolist()]
        assert [len(h.tokens) for h in short] == limits
        assert all(h.tokens[-1] == EOS for h in short)
        assert [len(h.tokens) for h in decode(model, sources, max_length=(10, 100))] == [24] * len(sources)


def test_nonsense_settings_are_named(teacher: Transformer, sources: Tensor) -> None:
    with pytest.raises(ConfigError, match="beam = 0"):
        beam_search(teacher, sources, beam=0)
    with pytest.raises(ConfigError, match=r"n_best = 3.*beam = 2"):
        beam_search(teacher, sources, beam=2, n_best=3)
    with pytest.raises(ConfigError, match="length_penalty = -1"):
        beam_search(teacher, sources, length_penalty=-1)


def test_no_sentences(teacher: Transformer) -> None:
    assert beam_search(teacher, torch.zeros(0, 0, dtype=torch.long)) == []
    assert greedy(teacher, torch.zeros(0, 0, dtype=torch.long)) == []


def test_among_equals_the_lowest_index_wins() -> None:
    values = torch.tensor([[1.0, 3, 3, 2, 3, 2, 2], [0, 0, 0, 0, 0, 0, 0], [7, 6, 5, 4, 3, 2, 1]])
    best, index = top(values, 4)
    assert index.tolist() == [[1, 2, 4, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert best.tolist() == [[3, 3, 3, 2], [0, 0, 0, 0], [7, 6, 5, 4]]
    assert top(values, 7)[1].tolist()[0] == [1, 2, 4, 3, 5, 6, 0]


def test_a_model_that_finds_all_words_equal_takes_the_lowest() -> None:
    model = make_teacher()
    with torch.no_grad():
        model.decoder.embedding.weight.zero_()
    found = beam_search(model, torch.tensor([[5, EOS]]), beam=3, max_length=(0, 2), n_best=3)[0]
    assert [h.tokens for h in found] == [[3, EOS], [3, 3, EOS], [3, 5, EOS]]
