"""Training of SentencePiece vocabularies."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from typing import Literal

import sentencepiece

from engine_fast.data.symbols import BOS, EOS, PAD, UNK
from engine_fast.data.vocabulary import SentencePieceVocabulary
from engine_fast.errors import ConfigError, DataError

_LONGEST_BYTES = 4192
"""SentencePiece skips longer lines while training; they still encode."""
_THREADS = 16
"""On every machine: the order of unigram's sums, and the bytes of any model, depend on it."""


def train_sentencepiece(
    lines: Iterable[str],
    *,
    kind: Literal["bpe", "unigram"],
    size: int,
    character_coverage: float = 1.0,
    exact: bool = True,
    name: str = "data.vocabulary",
) -> SentencePieceVocabulary:
    """Train on normalised lines (streamed once). The same lines and settings give the same bytes.

    The text is taken as it is (identity normalisation), so decode(encode(x)) == x for every normalised x whose
    characters were covered.
    exact=False takes fewer pieces where the text holds no more.
    Raises ConfigError naming the largest or smallest possible size; DataError when there is no line to learn from.
    """
    content = io.BytesIO()
    stream = _Counted(lines)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=stream,
            model_writer=content,
            model_type=kind,
            vocab_size=size,
            character_coverage=character_coverage,
            bos_id=BOS,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            control_symbols=["<mask>"],
            normalization_rule_name="identity",
            hard_vocab_limit=exact,
            max_sentence_length=_LONGEST_BYTES,
            num_threads=_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        _explain(str(error), name, size, stream.count)
        raise ConfigError(f"{name}: SentencePiece could not train: {error}") from error
    return SentencePieceVocabulary(content.getvalue(), name)


def _explain(message: str, name: str, size: int, num_lines: int) -> None:
    if not num_lines or "sentences_.empty()" in message:
        raise DataError(f"{name}: there is no sentence to learn from. Check the training files and data.filters.")
    largest = re.search(r"too high \(\d+\).*<= (\d+)", message)
    if largest:
        raise ConfigError(
            f"{name}.size = {size}, expected at most {largest.group(1)}: these {num_lines} lines hold no more "
            f"pieces. Set {name}.size={largest.group(1)} or lower, or give more text."
        )
    smallest = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if smallest:
        raise ConfigError(
            f"{name}.size = {size}, expected at least {smallest.group(1)}, the number of characters and special "
            f"symbols. Raise it or lower {name}.character_coverage."
        )


class _Counted:
    """An iterator that remembers how many non-empty lines it gave."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.count += bool(line)
        return line
