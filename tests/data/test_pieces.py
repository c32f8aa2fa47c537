"""A vocabulary whose segmentation and numbering come from two files of another toolkit."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from engine_fast.data.encoding import encode_pairs
from engine_fast.data.pieces import PieceVocabulary
from engine_fast.data.symbols import EOS, MASK, PAD, UNK
from engine_fast.data.vocabulary import load_vocabulary, save_pair
from engine_fast.errors import VocabularyError

LINES = [f"the {size} {animal} {verb} a {size} {thing}" for size in ("big", "old", "new") for animal in ("dog", "cat")
         for verb in ("sees", "has") for thing in ("house", "tree", "garden")]  # fmt: skip
SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


@pytest.fixture(scope="module")
def model() -> bytes:
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=content, vocab_size=50, hard_vocab_limit=False, minloglevel=2,
        num_threads=1,
    )  # fmt: skip
    return content.getvalue()


@pytest.fixture(scope="module")
def own(model: bytes) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [processor.id_to_piece(i) for i in range(3, processor.get_piece_size())]


@pytest.fixture(scope="module")
def vocabulary(model: bytes, own: list[str]) -> PieceVocabulary:
    return PieceVocabulary(model, [*SYMBOLS, "__de__", *reversed(own), "<row 99>"], [5, 6 + len(own)])


def test_segments_as_sentencepiece_and_numbers_as_the_list(
    vocabulary: PieceVocabulary, model: bytes, own: list[str]
) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    for line in LINES:
        ids = vocabulary.encode(line)
        assert vocabulary.pieces(ids) == processor.encode(line, out_type=str)
        assert [number - 6 for number in ids] == [list(reversed(own)).index(piece) for piece in vocabulary.pieces(ids)]
        assert vocabulary.decode([*ids, EOS, PAD]) == line
    assert vocabulary.encode_batch(LINES) == [vocabulary.encode(line) for line in LINES]
    assert len(vocabulary) == len(own) + 7


def test_text_never_becomes_a_symbol_or_a_silent_piece(vocabulary: PieceVocabulary) -> None:
    spelled = " ".join([*SYMBOLS, "__de__", "<row 99>"])
    assert not {0, PAD, EOS, MASK, 5, len(vocabulary) - 1} & set(vocabulary.encode(spelled))
    assert UNK in vocabulary.encode("the \u2603 sees")
    assert "\u2047" in vocabulary.decode([UNK])  # shown, as in the other vocabularies
    assert vocabulary.decode([5, len(vocabulary) - 1, MASK]) == ""
    assert vocabulary.pieces([5]) == ["__de__"]
    with pytest.raises(VocabularyError, match="does not exist"):
        vocabulary.decode([len(vocabulary)])


def test_text_is_normalised_first(vocabulary: PieceVocabulary) -> None:
    assert vocabulary.encode("  the\tbig \u00a0dog ") == vocabulary.encode("the big dog")
    assert vocabulary.surface("  the\tbig dog ") == "the big dog"


def test_a_file_that_is_read_again(vocabulary: PieceVocabulary, tmp_path: Path) -> None:
    name = vocabulary.save(tmp_path, "source")
    assert name == "source.pieces.json"
    again = load_vocabulary(tmp_path / name)
    assert again.fingerprint == vocabulary.fingerprint
    assert again.encode(LINES[3]) == vocabulary.encode(LINES[3])
    assert pickle.loads(pickle.dumps(vocabulary)).fingerprint == vocabulary.fingerprint  # noqa: S301
    pairs = list(encode_pairs([(LINES[0], LINES[1])], vocabulary, again, workers=1))
    assert pairs[0].source_ids == [*vocabulary.encode(LINES[0]), EOS]


def test_needs_no_transformers(vocabulary: PieceVocabulary, tmp_path: Path) -> None:
    name = vocabulary.save(tmp_path, "source")
    code = (
        "import sys; sys.modules['transformers'] = None; from pathlib import Path; "
        "from engine_fast.data.vocabulary import load_vocabulary; print(len(load_vocabulary(Path(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / name)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"{len(vocabulary)}\n"


def test_one_list_with_two_segmentations_is_two_vocabularies(
    vocabulary: PieceVocabulary, own: list[str], tmp_path: Path
) -> None:
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=content, vocab_size=40, hard_vocab_limit=False, model_type="bpe",
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())
    others = [processor.id_to_piece(i) for i in range(3, processor.get_piece_size())]
    pieces = [*SYMBOLS, *dict.fromkeys([*own, *others])]
    first = PieceVocabulary(processor.serialized_model_proto(), pieces)
    second = PieceVocabulary(vocabulary._processor.serialized_model_proto(), pieces)
    assert first.fingerprint != second.fingerprint
    assert first.pieces(range(len(first))) == second.pieces(range(len(second)))
    assert save_pair(tmp_path, first, second) == {"source": "source.pieces.json", "target": "target.pieces.json"}
    (tmp_path / "joint").mkdir()
    assert save_pair(tmp_path / "joint", first, first) == dict.fromkeys(("source", "target"), "joint.pieces.json")


def test_sample_lines_are_words_it_knows(vocabulary: PieceVocabulary) -> None:
    lines = vocabulary.sample_lines(lines=3, words=4)
    assert 1 <= len(lines) <= 3
    for line in lines:
        assert UNK not in vocabulary.encode(line)
        assert all(any(f" {text}".count(f" {word}") for text in LINES) for word in line.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: {**found, "format": 7}, "format 7, expected 1"),
        (lambda found: {**found, "pieces": found["pieces"][1:]}, "first pieces are"),
        (lambda found: {**found, "pieces": [*found["pieces"], found["pieces"][9]]}, "twice"),
        (lambda found: {**found, "pieces": found["pieces"][:12], "silent": []}, "belong to different models"),
        (lambda found: {**found, "silent": [4000]}, "names id 4000 as silent"),
        (lambda found: {**found, "model": "AAAA"}, "is not a SentencePiece model"),
        (lambda found: {**found, "model": "%"}, "is damaged"),
        (lambda found: {**found, "pieces": [*found["pieces"], 3]}, "is damaged"),
        (lambda found: {"format": 1}, "is damaged"),
        (lambda found: [], "is damaged"),
    ],
)
def test_a_file_that_cannot_be_used(vocabulary: PieceVocabulary, tmp_path: Path, change, message) -> None:
    path = tmp_path / vocabulary.save(tmp_path, "source")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(VocabularyError, match=message) as caught:
        load_vocabulary(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_half_there(vocabulary: PieceVocabulary, tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match="cannot be read"):
        load_vocabulary(tmp_path / "absent.pieces.json")
    path = tmp_path / vocabulary.save(tmp_path, "source")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(VocabularyError, match="is damaged"):
        load_vocabulary(path)
