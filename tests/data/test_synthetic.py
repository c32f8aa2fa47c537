"""The generated corpus: two right translations for every sentence, deterministic, one piece a word."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine_fast.config import DataConfig, SyntheticConfig, VocabularyConfig
from engine_fast.data.prepare import Prepared, prepare
from engine_fast.data.synthetic import Lexicon, generate


@pytest.mark.parametrize("num_words", [1, 2, 7, 60, 400, 5000])
def test_lexicon_words_are_all_different(num_words: int) -> None:
    lexicon = Lexicon.draw(num_words, seed=4)
    new = [b for a, b in zip(lexicon.mode_a, lexicon.mode_b, strict=True) if a != b]
    words = [*lexicon.source, *lexicon.mode_a, *new]
    assert len(set(words)) == len(words) == 2 * num_words + num_words // 2


def test_modes_are_as_described() -> None:
    lexicon = Lexicon(("s0", "s1", "s2"), ("a0", "a1", "a2"), ("a0", "b1", "a2"))
    assert lexicon.translate([1, 2, 0]) == ("a1 a2 a0", "a2 a0 b1")


def test_sentences() -> None:
    config = SyntheticConfig(num_train=2000)
    examples = list(generate(config, split="train", seed=1))
    assert len(examples) == 2000
    assert {len(example.source.split()) for example in examples} == set(range(4, 11))
    assert all(example.target in example.references for example in examples)
    assert all(example.references[0] != example.references[1] for example in examples)
    share = sum(example.target == example.references[0] for example in examples) / 2000
    assert 0.45 < share < 0.55
    assert examples == list(generate(config, split="train", seed=1))
    assert examples != list(generate(config, split="train", seed=2))
    assert examples[:100] != list(generate(config.model_copy(update={"num_valid": 100}), split="valid", seed=1))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_every_word_is_one_piece_at_the_demo_size(tmp_path: Path, kind: str, seed: int) -> None:
    config = DataConfig(
        synthetic=SyntheticConfig(num_train=4000, num_valid=100, num_test=10),
        vocabulary=VocabularyConfig(kind=kind, size=256),  # type: ignore[arg-type]
    )
    prepare(config, tmp_path / "p", seed=seed)
    prepared = Prepared.open(tmp_path / "p")
    lines = [*prepared.sources("valid"), *(line for stream in prepared.references("valid") for line in stream)]
    words = sum(len(line.split()) for line in lines)
    assert sum(map(len, prepared.source_vocabulary.encode_batch(lines))) <= 1.02 * words
    assert [prepared.target_vocabulary.decode(ids) for ids in prepared.target_vocabulary.encode_batch(lines)] == lines
