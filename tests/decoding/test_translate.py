from __future__ import annotations

import random
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from engine_fast.data.symbols import EOS, MASK
from engine_fast.data.vocabulary import DictionaryVocabulary
from engine_fast.decoding import DecodeSettings, Translator, beam_search, mask_predict
from engine_fast.decoding.translate import never_emitted, plan_batches
from engine_fast.errors import ConfigError, DataError
from engine_fast.models import LoadedModel
from tests.decoding.tiny import WORDS, load_tiny, make_student, make_teacher, make_vocabulary


def random_lines(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(count)]


def alone(loaded: LoadedModel, line: str) -> str:
    source = torch.tensor([[*loaded.source_vocabulary.encode(line), EOS]])
    if loaded.model.kind == "cmlm":
        best = mask_predict(loaded.model, source, iterations=2, length_beam=3)[0]
    else:
        best = beam_search(loaded.model, source, beam=3)[0][0]
    return loaded.target_vocabulary.decode(best.tokens)


@pytest.mark.parametrize("make", [make_teacher, make_student])
def test_every_line_is_translated_as_if_alone_and_in_order(make) -> None:
    loaded = load_tiny(make())
    lines = random_lines(23)
    settings = DecodeSettings(beam=3, iterations=2, length_beam=3, max_tokens=100, window=9)
    assert Translator(loaded, settings).translate(lines) == [alone(loaded, line) for line in lines]


def test_it_streams_window_by_window() -> None:
    read = 0

    def lines() -> Iterator[str]:
        nonlocal read
        for line in random_lines(12):
            read += 1
            yield line

    out = Translator(load_tiny(make_teacher()), DecodeSettings(beam=1, window=4)).stream(lines())
    next(out)
    assert read == 4
    assert len(list(out)) == 11
    assert Translator(load_tiny(make_teacher())).translate([]) == []


def test_empty_lines_stay_empty_and_are_counted() -> None:
    translator = Translator(load_tiny(make_student()))
    lines = ["", "mon tue", "  \t ", "\u3000", "wed"]
    out = translator.translate(lines)
    assert [bool(line) for line in out] == [False, True, False, False, True]
    assert (translator.report.num_lines, translator.report.num_empty) == (5, 3)
    assert Translator(load_tiny(make_student())).translate(["", ""]) == ["", ""]


@pytest.mark.parametrize("make", [make_teacher, make_student])
def test_long_lines_are_truncated_counted_and_told_once(make) -> None:
    loaded = load_tiny(make())
    long = " ".join(["mon", "tue"] * 20)
    translator = Translator(loaded, DecodeSettings(window=2))
    with pytest.warns(UserWarning, match=r"of 4 lines: 2 longer than 24 tokens, the first in line 2, trunc") as told:
        out = translator.translate(["wed", long, "thu", long + " sun"])
    assert len(told) == 1
    assert translator.report.num_truncated == 2
    assert out[1] == out[3] == next(Translator(loaded).stream([" ".join(long.split()[:23])]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(translator.translate(["wed"])) == 1
    assert (translator.report.num_lines, translator.report.num_truncated) == (1, 0)


def test_long_lines_are_refused_by_number_when_asked() -> None:
    translator = Translator(load_tiny(make_student()), DecodeSettings(too_long="refuse", window=2))
    out = translator.stream(["wed", "thu", "fri", " ".join(["mon"] * 24)])
    assert next(out)
    assert next(out)
    with pytest.raises(DataError, match=r"line 4: 25 tokens.*at most 24"):
        list(out)
    exact = Translator(load_tiny(make_student()), DecodeSettings(too_long="refuse"))
    assert len(list(exact.translate([" ".join(["mon"] * 23)]))) == 1


def test_a_smaller_limit_bounds_sources_and_candidates() -> None:
    translator = Translator(load_tiny(make_student()), DecodeSettings(max_positions=5, length_beam=4, n_best=4))
    with pytest.warns(UserWarning, match="longer than 5 tokens"):
        found = next(translator.translate_n_best([" ".join(["mon"] * 9)]))
    assert sorted(len(h.tokens) for _, h in found) == [2, 3, 4, 5]


@pytest.mark.filterwarnings("ignore:of 7 lines")
def test_control_characters_are_harmless() -> None:
    lines = ["mon\x00 tue", "\x00", "mon\u2028tue", "wed\x0cthu", "fri\r", "\ufeffsat", "\x1b[31msun"]
    out = Translator(load_tiny(make_teacher()), DecodeSettings(beam=1)).translate(lines)
    assert len(out) == len(lines)
    assert not any("\n" in line for line in out)


def test_oracle_lengths_reach_the_student() -> None:
    translator = Translator(load_tiny(make_student()), DecodeSettings(length_beam=1, window=2))
    found = list(translator.translate_n_best(["mon", "", "tue wed", "thu"], lengths=iter([4, 9, 7, 2])))
    assert [len(h.tokens) for [(_, h)] in found] == [4, 1, 7, 2]
    with pytest.raises(DataError, match="end after line 1"):
        list(translator.stream(["mon", "tue"], lengths=[3]))
    with pytest.raises(DataError, match="1 target lengths for 2 sources"):
        translator.translate_ids([[5, EOS], [6, EOS]], lengths=[3])
    with pytest.raises(DataError, match="known only to a student"):
        Translator(load_tiny(make_teacher())).translate_ids([[5, EOS]], lengths=[3])


@pytest.mark.parametrize("make", [make_teacher, make_student])
def test_n_best_is_ordered_and_bounded(make) -> None:
    translator = Translator(load_tiny(make()), DecodeSettings(beam=4, length_beam=4, n_best=3))
    for found in translator.translate_n_best(random_lines(5)):
        assert len(found) == 3
        scores = [h.score for _, h in found]
        assert scores == sorted(scores, reverse=True)
    with pytest.raises(ConfigError, match="n_best = 5, expected at most"):
        Translator(load_tiny(make()), DecodeSettings(beam=4, length_beam=4, n_best=5))


def test_rescoring_changes_the_choice() -> None:
    loaded = load_tiny(make_student())
    settings = DecodeSettings(length_beam=4)

    def longest(source, target):
        return -((target != 1).sum(1).double() ** 2)

    lines = random_lines(6)
    plain = [h for [(_, h)] in Translator(loaded, settings).translate_n_best(lines)]
    chosen = [h for [(_, h)] in Translator(loaded, settings, longest).translate_n_best(lines)]
    assert all(len(a.tokens) >= len(b.tokens) for a, b in zip(chosen, plain, strict=True))
    assert any(len(a.tokens) > len(b.tokens) for a, b in zip(chosen, plain, strict=True))
    with pytest.warns(UserWarning, match="no effect"):
        Translator(load_tiny(make_teacher()), rescore=longest)


def test_ids_may_come_as_arrays_and_progress_is_told() -> None:
    translator = Translator(load_tiny(make_teacher()), DecodeSettings(beam=2, max_tokens=20))
    sources = [np.array([5, 6, EOS], dtype=np.uint16), np.array([EOS], dtype=np.uint16), [7, EOS]]
    counts: list[int] = []
    found = translator.search(sources, advance=counts.append)
    assert sum(counts) == 3
    assert [h.tokens for h in translator.translate_ids(sources)] == [hypotheses[0].tokens for hypotheses in found]
    assert found[1][0].tokens == [EOS]
    assert translator.search([]) == []


def test_batches_hold_every_sentence_once_and_fit_the_budget() -> None:
    rng = random.Random(1)
    lengths = [rng.randint(1, 60) for _ in range(200)]
    batches = plan_batches(lengths, 50)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 50 for batch in batches)
    assert any(len(batch) > 1 for batch in batches)
    assert plan_batches([], 50) == []


def test_repeated_tokens_are_left_out_where_asked() -> None:
    loaded = load_tiny(make_student())
    lines = random_lines(30)
    plain = list(Translator(loaded, DecodeSettings(length_beam=2)).translate_n_best(lines))
    short = list(Translator(loaded, DecodeSettings(length_beam=2, remove_repeats=True)).translate_n_best(lines))
    assert any(a[0][0] != b[0][0] for a, b in zip(plain, short, strict=True)), "no sentence had a repetition"
    for [(text, whole)], [(shorter, kept)] in zip(plain, short, strict=True):
        words = text.split()
        assert shorter.split() == [word for i, word in enumerate(words) if i == 0 or word != words[i - 1]]
        assert (kept.score, kept.log_probability) == (whole.score, whole.log_probability)
        assert kept.tokens[-1] == EOS


@pytest.mark.parametrize("length", [0, -5])
def test_a_target_length_below_one_is_named(length: int) -> None:
    translator = Translator(load_tiny(make_student()))
    with pytest.raises(DataError, match=f"line 2: target length {length}, expected 1 or more"):
        list(translator.stream(["mon", "tue"], lengths=[3, length]))
    with pytest.raises(DataError, match=f"line 2: target length {length}, expected 1 or more"):
        translator.translate_ids([[5, EOS], [6, EOS]], lengths=[3, length])


def test_a_vocabulary_without_mask_keeps_its_first_word() -> None:
    assert MASK in never_emitted(make_vocabulary())
    assert MASK not in never_emitted(DictionaryVocabulary(WORDS, mask=False))


@pytest.mark.parametrize(
    "wrong",
    [{"beam": 0}, {"iterations": 0}, {"length_beam": 0}, {"max_tokens": 0}, {"window": 0}, {"n_best": 0},
     {"length_penalty": -1.0}, {"too_long": "ignore"}, {"max_positions": 1}],
)  # fmt: skip
def test_wrong_settings_are_named(wrong) -> None:
    [(key, value)] = wrong.items()
    with pytest.raises(ConfigError, match=f"{key} = {value!r}, expected"):
        DecodeSettings(**wrong)
