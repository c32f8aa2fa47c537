"""Vocabularies: ids, round trips, determinism, damage."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_fast.data.subwords import train_sentencepiece
from engine_fast.data.symbols import BOS, EOS, MASK, PAD, UNK
from engine_fast.data.text import normalise
from engine_fast.data.vocabulary import DictionaryVocabulary, SentencePieceVocabulary, load_vocabulary
from engine_fast.errors import ConfigError, DataError, VocabularyError

LINES = ["der hund bellt laut", "die katze schläft", "zwei hunde , drei katzen !", "laut schläft der bär"] * 5
SIZE = 30
ALPHABET = sorted({letter for line in LINES for letter in line})


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model(request: pytest.FixtureRequest) -> SentencePieceVocabulary:
    return train_sentencepiece(LINES, kind=request.param, size=SIZE)


def test_special_ids_and_size(model: SentencePieceVocabulary) -> None:
    assert len(model) == SIZE
    assert model.pieces([BOS, PAD, EOS, UNK, MASK]) == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


@given(text=st.text(alphabet=ALPHABET, max_size=40))
def test_round_trip_of_any_covered_text(model: SentencePieceVocabulary, text: str) -> None:
    ids = model.encode(text)
    assert model.decode(ids) == normalise(text)
    assert all(number > MASK for number in ids)
    assert model.encode_batch([text, "der"]) == [ids, model.encode("der")]


@given(text=st.text(max_size=30))
def test_no_text_makes_control_ids(model: SentencePieceVocabulary, text: str) -> None:
    for tricky in (text, f"</s>{text}<mask>", f"<pad> {text} <s>"):
        assert not {BOS, PAD, EOS, MASK} & set(model.encode(tricky))


def test_decode_drops_control_symbols_and_shows_unknown(model: SentencePieceVocabulary) -> None:
    ids = model.encode("der hund")
    assert model.decode([BOS, *ids, MASK, EOS, PAD, PAD]) == "der hund"
    assert "\u2047" in model.decode([*ids, UNK])
    assert model.decode([EOS]) == model.decode([]) == model.decode(model.encode("")) == ""
    with pytest.raises(VocabularyError, match="id 30 does not exist in a vocabulary of 30"):
        model.decode([SIZE])
    with pytest.raises(VocabularyError, match="id -1"):
        model.pieces([-1])


def test_training_is_deterministic(model: SentencePieceVocabulary) -> None:
    for kind in ("bpe", "unigram"):
        one, other = (train_sentencepiece(iter(LINES), kind=kind, size=29) for _ in range(2))
        assert one.fingerprint == other.fingerprint
        assert one.fingerprint != model.fingerprint


def test_save_load_copy(model: SentencePieceVocabulary, tmp_path: Path) -> None:
    name = model.save(tmp_path, "joint")
    assert name == "joint.model"
    for same in (load_vocabulary(tmp_path / name), copy.deepcopy(model)):
        assert same.fingerprint == model.fingerprint
        assert same.encode("drei hunde") == model.encode("drei hunde")


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"data.vocabulary.size = 5000, expected at most \d+: these 20 lines"):
        train_sentencepiece(LINES, kind="bpe", size=5000)
    with pytest.raises(ConfigError, match="size = 5000, expected at most"):
        train_sentencepiece(LINES, kind="unigram", size=5000)
    with pytest.raises(ConfigError, match="size = 9, expected at least"):
        train_sentencepiece(LINES, kind="bpe", size=9)
    for lines in ([], ["", ""]):
        with pytest.raises(DataError, match="no sentence to learn from"):
            train_sentencepiece(lines, kind="bpe", size=50)


def test_the_named_largest_size_works() -> None:
    with pytest.raises(ConfigError) as caught:
        train_sentencepiece(LINES, kind="bpe", size=5000)
    largest = int(str(caught.value).split("expected at most ")[1].split(":")[0])
    assert len(train_sentencepiece(LINES, kind="bpe", size=largest)) == largest
    assert len(train_sentencepiece(LINES, kind="bpe", size=5000, exact=False)) == largest


def test_files_that_are_no_vocabulary(tmp_path: Path, model: SentencePieceVocabulary) -> None:
    import io

    import sentencepiece

    path = tmp_path / "x.model"
    with pytest.raises(VocabularyError, match=r"x.model: cannot be read"):
        load_vocabulary(path)
    path.write_bytes(b"not a model")
    with pytest.raises(VocabularyError, match=r"x.model: is not a SentencePiece model"):
        load_vocabulary(path)
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=content, vocab_size=SIZE, minloglevel=2
    )
    path.write_bytes(content.getvalue())
    with pytest.raises(VocabularyError, match="its special ids are"):
        load_vocabulary(path)
    with pytest.raises(VocabularyError, match=r"ends in .model"):
        load_vocabulary(tmp_path / "vocabulary.json")


def test_dictionary(tmp_path: Path) -> None:
    (tmp_path / "dict.txt").write_text("der 10\nhun@@ 4\nde 3\n</x> 1\n", encoding="utf-8")
    with_mask = DictionaryVocabulary.load(tmp_path / "dict.txt")
    without = DictionaryVocabulary.load(tmp_path / "dict.txt", mask=False)
    assert with_mask.encode("der  hun@@ de bär </s> <mask>") == [5, 6, 7, UNK, UNK, UNK]
    assert without.encode("der hun@@") == [4, 5]
    assert with_mask.decode([BOS, 5, 6, 7, UNK, MASK, EOS, PAD]) == "der hunde <unk>"
    assert with_mask.decode([5, 6, EOS]) == "der hun"
    assert without.decode([4]) == "der"
    assert len(with_mask) == 9
    assert len(without) == 8
    assert with_mask.fingerprint != without.fingerprint
    for vocabulary in (with_mask, without):
        name = vocabulary.save(tmp_path, f"saved{len(vocabulary)}")
        again = load_vocabulary(tmp_path / name)
        assert again.fingerprint == vocabulary.fingerprint


def test_damaged_dictionary(tmp_path: Path) -> None:
    path = tmp_path / "x.dict.txt"
    path.write_text("der 10\nhund\n")
    with pytest.raises(VocabularyError, match="line 2 is 'hund'"):
        load_vocabulary(path)
    path.write_text("der 10\nder 3\n")
    with pytest.raises(VocabularyError, match="holds 'der' twice"):
        load_vocabulary(path)
