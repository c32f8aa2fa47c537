"""The demo corpus: a language pair in which every sentence has two right translations.

A source of n words is translated in one of two modes, drawn at random for the whole sentence. Mode A replaces each word
by its form; mode B uses another form for every second word of the lexicon and moves the first word to the end. A
one-pass model trained by cross-entropy mixes the two, which is neither; an energy knows better. Words are two
syllables, and no word of one language is one of the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine_fast.config import SyntheticConfig
from engine_fast.data.text import write_lines

SPLITS = ("train", "valid", "test")
_VOWELS = "aeiou"
_SOURCE_CONSONANTS = "bdgklmnprst"
_TARGET_CONSONANTS = "cfhjqvwxyz"


@dataclass(frozen=True, slots=True)
class Lexicon:
    """Word forms; source[i] becomes mode_a[i] or mode_b[i]."""

    source: tuple[str, ...]
    mode_a: tuple[str, ...]
    mode_b: tuple[str, ...]

    @classmethod
    def draw(cls, num_words: int, seed: int) -> Lexicon:
        """Random forms; mode_b differs from mode_a at the odd positions."""
        generator = np.random.default_rng([seed, 0])
        source = _words(num_words, _SOURCE_CONSONANTS, generator)
        target = _words(num_words + num_words // 2, _TARGET_CONSONANTS, generator)
        mode_a, other = target[:num_words], iter(target[num_words:])
        mode_b = [next(other) if index % 2 else word for index, word in enumerate(mode_a)]
        return cls(tuple(source), tuple(mode_a), tuple(mode_b))

    def translate(self, words: list[int]) -> tuple[str, str]:
        """Both right translations of a sentence of word numbers: mode A, mode B."""
        rotated = [*words[1:], words[0]]
        return " ".join(self.mode_a[word] for word in words), " ".join(self.mode_b[word] for word in rotated)


@dataclass(frozen=True, slots=True)
class Example:
    """One sentence: the target is one of the two references."""

    source: str
    target: str
    references: tuple[str, str]


def generate(config: SyntheticConfig, *, split: str, seed: int) -> Iterator[Example]:
    """The sentences of one split, a function of (config, split, seed) alone."""
    lexicon = Lexicon.draw(config.num_words, seed)
    generator = np.random.default_rng([seed, 1 + SPLITS.index(split)])
    for _ in range({"train": config.num_train, "valid": config.num_valid, "test": config.num_test}[split]):
        length = int(generator.integers(config.min_length, config.max_length + 1))
        words = generator.integers(config.num_words, size=length).tolist()
        references = lexicon.translate(words)
        source = " ".join(lexicon.source[word] for word in words)
        yield Example(source, references[int(generator.integers(2))], references)


def write_split(config: SyntheticConfig, directory: Path, *, split: str, seed: int) -> list[Path]:
    """Write one split as files: source, target, reference of mode A, of mode B. Returns the four paths."""
    examples = list(generate(config, split=split, seed=seed))
    columns = {
        "source": [example.source for example in examples],
        "target": [example.target for example in examples],
        "mode_a": [example.references[0] for example in examples],
        "mode_b": [example.references[1] for example in examples],
    }
    paths = [directory / f"{split}.{name}" for name in columns]
    for path, lines in zip(paths, columns.values(), strict=True):
        write_lines(path, lines)
    return paths


def _words(count: int, consonants: str, generator: np.random.Generator) -> list[str]:
    # Two small sets of syllables, one for each place: byte-pair merges then meet every word with few pieces in between.
    num_syllables = math.isqrt(max(count - 1, 0)) + 1
    syllables = [consonant + vowel for consonant in consonants for vowel in _VOWELS]
    while len(syllables) < 2 * num_syllables:
        syllables = [first + second for first in syllables for second in syllables]
    chosen = generator.permutation(len(syllables))[: 2 * num_syllables]
    first, second = chosen[:num_syllables], chosen[num_syllables:]
    words = [syllables[one] + syllables[two] for one in first for two in second]
    return [words[position] for position in generator.permutation(len(words))[:count]]
