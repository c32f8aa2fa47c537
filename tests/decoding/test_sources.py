"""Text of any kind in: as many lines out, none of them two, nothing lost; and the counts that say what was odd."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_fast.config import Architecture
from engine_fast.data.subwords import train_sentencepiece
from engine_fast.data.symbols import EOS, UNK
from engine_fast.decoding import DecodeSettings, TranslateReport, Translator, translate
from engine_fast.decoding import sources as module
from engine_fast.decoding.sources import encode_lines, split_row
from engine_fast.errors import DataError
from engine_fast.models import CMLM, LoadedModel
from tests.decoding.tiny import SHAPE, load_tiny, make_student, make_teacher, widen

LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
SENTENCES = ["Ein Mann f\u00e4hrt Rad.", "Zwei Hunde spielen im Schnee!", "Ist das ein Ball? Nein.", "die Frau lacht"]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """A student over real SentencePiece pieces, 24 positions."""
    vocabulary = train_sentencepiece(SENTENCES * 20, kind="bpe", size=80)
    model = CMLM(Architecture(**SHAPE, positions="learned", activation="gelu"), len(vocabulary), len(vocabulary))
    widen(model, 0)
    return LoadedModel(model.double().eval(), vocabulary, vocabulary, {})


def quiet(translator: Translator, lines: list[str]) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return translator.translate(lines)


PIECES = ["\u2581a", "\u2581Hund.", "b", ".", '!"', "\u2581", "\u3002"]
anything = st.text() | st.text(alphabet=LINE_ENDS + "\x00\x07\x1b \t.aE\ufeff\u200b\ud800\u732b", max_size=80)
long = st.builds(lambda text, count: text * count, st.text(min_size=1, max_size=9), st.integers(100, 3000))


@settings(max_examples=40)
@given(st.lists(anything | long, max_size=5), st.sampled_from(["truncate", "split"]))
def test_any_text_gives_one_line_for_each(loaded: LoadedModel, lines: list[str], too_long: str) -> None:
    translator = Translator(loaded, DecodeSettings(length_beam=1, too_long=too_long, window=2))
    out = quiet(translator, lines)
    report = translator.report
    assert len(out) == len(lines) == report.num_lines
    assert not any(set(LINE_ENDS + "\x00") & set(text) for text in out)
    empty = [not loaded.source_vocabulary.encode(module.one_line(line.replace("\ud800", "?"))) for line in lines]
    assert report.num_empty == sum(empty)
    assert not any(text for text, nothing in zip(out, empty, strict=True) if nothing)
    assert sum(not text for text in out) == report.num_empty + report.num_blank
    assert report.num_undecodable == sum("\ud800" in line for line in lines)


@settings(max_examples=40)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=120), st.integers(1, 30))
def test_parts_fit_and_hold_every_piece_in_order(pieces: list[str], room: int) -> None:
    row = list(range(len(pieces)))
    parts = split_row(row, pieces, room)
    assert [token for part in parts for token in part] == row
    assert all(1 <= len(part) <= room for part in parts)


def test_lines_are_cut_at_sentences_then_at_spaces_then_anywhere() -> None:
    words = ["\u2581a"] * 9 + ["."] + ["\u2581b"] * 9 + ["!", '"'] + ["\u2581c"] * 5

    def cut(pieces: list[str], room: int) -> list[int]:
        return [len(part) for part in split_row(range(len(pieces)), pieces, room)]

    assert cut(words, 20) == [10, 11, 5]
    assert cut(words, 7) == [5, 5, 6, 5, 5]
    assert cut(["\u2581z", ".", "\u2581B", ".", *["\u2581w"] * 20], 15) == [12, 12]  # "z. B." is no sentence
    assert cut(["\u2581ab", *"cdefghij", "\u2581k", *"lmnopqrs"], 12) == [9, 9]
    assert cut(["\u2581a", *"b" * 20], 8) == [7, 7, 7]
    assert cut([*"a" * 11, "\u3002", *"b" * 11, "\uff01", *"c" * 11], 15) == [12, 12, 11]
    assert cut(["one@@", "two", "three@@", "four"], 3) == [2, 2]


def test_a_long_line_in_parts_is_its_parts_with_spaces(loaded: LoadedModel) -> None:
    translator = Translator(loaded, DecodeSettings(length_beam=2, n_best=2, too_long="split"))
    with pytest.warns(UserWarning, match=r"of 3 lines: 1 longer than 24 tokens, the first in line 2, translated in p"):
        first, whole, last = translator.translate_n_best([SENTENCES[3], " ".join(SENTENCES[:3]), SENTENCES[0]])
    report = translator.report
    row = loaded.source_vocabulary.encode(" ".join(SENTENCES[:3]))
    parts = split_row(row, loaded.source_vocabulary.pieces(row), 23)
    assert len(parts) == 2
    alone = translator.search([[*part, EOS] for part in parts])
    for k, (text, hypothesis) in enumerate(whole):
        ranked = [found[k] for found in alone]
        assert text == " ".join(loaded.target_vocabulary.decode(h.tokens) for h in ranked)
        assert hypothesis.tokens == [*(token for h in ranked for token in h.tokens[:-1]), EOS]
        assert hypothesis.log_probability == pytest.approx(sum(h.log_probability for h in ranked))
        weighted = sum(h.score * len(h.tokens) for h in ranked) / sum(len(h.tokens) for h in ranked)
        assert hypothesis.score == pytest.approx(weighted)
    assert [first[0][0], last[0][0]] == translator.translate([SENTENCES[3], SENTENCES[0]])
    assert (report.num_split, report.first_long, report.num_lines) == (1, 2, 3)
    assert translator.search([[*row, EOS]])[0] == [hypothesis for _, hypothesis in whole]
    counts: list[int] = []
    translator.search([[*row, EOS], [EOS], [*parts[0], EOS]], advance=counts.append)
    assert sum(counts) == 3


def test_known_lengths_are_of_whole_lines(loaded: LoadedModel) -> None:
    translator = Translator(loaded, DecodeSettings(too_long="split"))
    with pytest.raises(DataError, match=r"line 2: longer than 24 tokens, and a known target length is of the whole"):
        list(translator.stream(["a", "Hunde " * 30], lengths=[3, 9]))


def test_a_line_of_a_million_characters_is_cut_before_it_is_encoded(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    encode = type(loaded.source_vocabulary).encode

    def counted(vocabulary: object, text: str) -> list[int]:
        asked.append(len(text))
        return encode(vocabulary, text)

    monkeypatch.setattr(type(loaded.source_vocabulary), "encode", counted)
    line = "Hunde " * 170_000
    translator = Translator(loaded, DecodeSettings(length_beam=1))
    texts = quiet(translator, [line, "die Frau"])
    assert len(texts) == 2
    assert texts == quiet(translator, ["Hunde " * 30, "die Frau"])
    assert [0 < length <= 1 << 16 for length in asked] == [True]
    asked.clear()
    [row] = encode_lines([line], loaded.source_vocabulary, 0, TranslateReport())
    assert max(asked) <= 1 << 16
    assert loaded.source_vocabulary.decode(row) == line.strip()
    asked.clear()
    assert quiet(translator, ["x" * 1_000_000])[0]  # no space to cut at, and next to no piece
    assert max(asked) <= 1 << 16
    with pytest.raises(DataError, match=r"line 1: \d{6,} tokens, end symbol included, and at most 24 fit"):
        Translator(loaded, DecodeSettings(too_long="refuse")).translate(["Hunde " * 170_000])


def test_windows_of_long_lines_end_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translate, "WINDOW_CHARACTERS", 100)
    lines = ["a" * 60, "b" * 60, "c", "", "d", "e", "f" * 500]
    assert [len(window) for window in translate.windows(lines, 3)] == [2, 3, 2]


@pytest.mark.parametrize("window", [1, 7])
def test_no_more_than_a_window_is_held(window: int) -> None:
    held = most = 0

    def lines() -> Iterator[str]:
        nonlocal held, most
        for _ in range(60):
            held += 1
            most = max(most, held)
            yield random.choice(["mon tue", "", "wed"])

    translator = Translator(load_tiny(make_teacher()), DecodeSettings(beam=1, window=window))
    for _ in translator.stream(lines()):
        held -= 1
    assert (held, most) == (0, window)


def test_what_is_odd_is_counted_and_told_once(loaded: LoadedModel) -> None:
    translator = Translator(loaded, DecodeSettings(length_beam=1, window=2))
    lines = [
        "Ein\x00Mann",
        "Hunde\u2028spielen\u0085im",
        "\udcff Ball",
        "die Frau lacht",
        "\u732b\u304c\u3044\u308b",
        "",
    ]
    with pytest.warns(UserWarning, match="of 6 lines") as told:
        out = translator.translate(lines)
    share = translator.report.num_unknown / translator.report.num_pieces
    assert [str(warning.message) for warning in told] == [
        "of 6 lines: 1 with bytes that are not UTF-8, read as U+FFFD; 1 with control characters, read as spaces; "
        f"{share:.1%} of the pieces are unknown to the vocabulary "
        "(is this the language, and the script, that the model was trained to read?)"
    ]
    assert out[:2] == translator.translate(["Ein Mann", "Hunde spielen im"])
    translator.translate(["die Frau lacht"] * 9)
    assert (translator.report.num_unknown, translator.report.summary(24)) == (0, "")


def test_unknown_pieces_are_counted_where_they_are_read(loaded: LoadedModel) -> None:
    row = loaded.source_vocabulary.encode("die \u732b Frau")
    translator = Translator(loaded)
    quiet(translator, ["die \u732b Frau", "die"])
    assert translator.report.num_unknown == row.count(UNK) == 1
    assert translator.report.num_pieces == len(row) + len(loaded.source_vocabulary.encode("die"))


def test_reports_add_up_as_one_stream() -> None:
    lines = ["mon", "tue " * 40, "", "\x01wed", "nothing known", "thu " * 30]
    loaded = load_tiny(make_student())
    whole = Translator(loaded, DecodeSettings(too_long="split"))
    quiet(whole, lines)
    total = TranslateReport()
    for start in (0, 1, 4):
        window = lines[start : {0: 1, 1: 4, 4: 6}[start]]
        total.add(whole.translate_window(window, first_line=start + 1)[1])
    assert total == whole.report
    assert (total.first_long, total.num_split, total.num_unknown, total.num_control) == (2, 2, 2, 1)
