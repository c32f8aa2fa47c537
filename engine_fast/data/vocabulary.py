"""Text to ids and back. One interface, three kinds: a SentencePiece model, a fairseq dictionary of ready tokens, or
(engine_fast.data.pieces) SentencePiece's segmentation over a list of pieces that came from elsewhere.

In every vocabulary <s> 0, <pad> 1, </s> 2, <unk> 3, <mask> 4 (engine_fast.data.symbols). Text can never produce 0, 1, 2
or 4: a sentence that contains the characters "</s>" is spelled out, or becomes <unk>.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from engine_fast.data.pieces import PieceVocabulary
from engine_fast.data.symbols import MASK, UNK
from engine_fast.data.text import normalise
from engine_fast.data.vocabulary_parts import SILENT, SYMBOLS, check_ids, read_content, save_content
from engine_fast.errors import VocabularyError


class Vocabulary(Protocol):
    """What models, decoders and corpora ask of a vocabulary."""

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the content: equal exactly when ids mean the same."""
        ...

    def __len__(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Ids of one line, without an end symbol; the text is normalised first (engine_fast.data.text.normalise)."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """encode() of many lines; other Python threads run meanwhile."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids: <s>, <pad>, </s> and <mask> are dropped, <unk> is shown."""
        ...

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The surface of each id, special symbols included."""
        ...

    def save(self, directory: Path, stem: str) -> str:
        """Write a new file `stem` + suffix into the directory; returns its name, load_vocabulary() reads it."""
        ...


class SentencePieceVocabulary:
    """A trained SentencePiece model, held as its serialised bytes."""

    suffix = ".model"

    def __init__(self, content: bytes, origin: str = "SentencePiece model") -> None:
        """Raises VocabularyError: not a model, or one whose special ids are not this project's."""
        self._content = content
        self.fingerprint = hashlib.sha256(content).hexdigest()
        try:
            processor: Any = sentencepiece.SentencePieceProcessor(model_proto=content)
        except Exception as error:  # SentencePiece raises several plain kinds
            raise VocabularyError(
                f"{origin}: is not a SentencePiece model ({error}). Restore it or prepare again."
            ) from error
        got = {symbol: processor.piece_to_id(symbol) for symbol in SYMBOLS}
        if got != SYMBOLS or any(not processor.is_control(number) for number in SILENT):
            raise VocabularyError(
                f"{origin}: its special ids are {got}, expected control symbols {SYMBOLS}. "
                "Train the vocabulary with engine-fast prepare."
            )
        self._processor = processor

    def __len__(self) -> int:
        return int(self._processor.get_piece_size())

    def __getstate__(self) -> bytes:
        return self._content

    def __setstate__(self, content: bytes) -> None:
        self.__init__(content)  # type: ignore[misc]

    def encode(self, text: str) -> list[int]:
        return list(self._processor.encode(normalise(text)))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return list(self._processor.encode([normalise(text) for text in texts], num_threads=1))

    def decode(self, ids: Iterable[int]) -> str:
        kept = [int(number) for number in ids if int(number) not in SILENT]
        self._check(kept)
        return str(self._processor.decode(kept)) if kept else ""

    def pieces(self, ids: Iterable[int]) -> list[str]:
        numbers = [int(number) for number in ids]
        self._check(numbers)
        return [str(self._processor.id_to_piece(number)) for number in numbers]

    def save(self, directory: Path, stem: str) -> str:
        return save_content(directory, stem + self.suffix, self._content)

    @classmethod
    def load(cls, path: Path) -> SentencePieceVocabulary:
        return cls(read_content(path), str(path))

    def _check(self, ids: list[int]) -> None:
        check_ids(ids, len(self))


class DictionaryVocabulary:
    """White-space tokens from a fairseq dict.txt ("token count" a line); decode() joins "@@ " subwords.

    Ids: <s> 0, <pad> 1, </s> 2, <unk> 3, then <mask> 4 if `mask`, then the lines of the file in order.
    """

    suffix = ".dict.txt"
    _HEADER = "# engine_fast mask="

    def __init__(self, tokens: Sequence[str], *, mask: bool = True) -> None:
        """Raises VocabularyError when a token stands twice."""
        self.mask = mask
        specials = [symbol for symbol, number in SYMBOLS.items() if mask or number != MASK]
        self._tokens = [*specials, *tokens]
        self._ids = {token: number for number, token in enumerate(self._tokens)}
        if len(self._ids) != len(self._tokens):
            twice = Counter(self._tokens).most_common(1)[0][0]
            raise VocabularyError(f"the dictionary holds {twice!r} twice, expected each token once.")
        self._silent = {self._ids[symbol] for symbol in specials} - {UNK}
        self.fingerprint = hashlib.sha256("\n".join(self._tokens).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._tokens)

    def encode(self, text: str) -> list[int]:
        ids = (self._ids.get(token, UNK) for token in normalise(text).split())
        return [UNK if number in self._silent else number for number in ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        tokens = self.pieces(number for number in ids if int(number) not in self._silent)
        return (" ".join(tokens) + " ").replace("@@ ", "").strip()

    def pieces(self, ids: Iterable[int]) -> list[str]:
        numbers = [int(number) for number in ids]
        check_ids(numbers, len(self))
        return [self._tokens[number] for number in numbers]

    def save(self, directory: Path, stem: str) -> str:
        first = 5 if self.mask else 4
        lines = [f"{self._HEADER}{int(self.mask)}", *(f"{token} 1" for token in self._tokens[first:])]
        return save_content(directory, stem + self.suffix, ("\n".join(lines) + "\n").encode())

    @classmethod
    def load(cls, path: Path, *, mask: bool | None = None) -> DictionaryVocabulary:
        """Read a fairseq dict.txt, or what save() wrote (which remembers `mask`). mask=None: as saved, else True.

        Raises VocabularyError: not readable, a line without a count, a token given twice.
        """
        tokens: list[str] = []
        for number, line in enumerate(read_content(path).decode("utf-8", errors="replace").split("\n"), start=1):
            if number == 1 and line.startswith(cls._HEADER):
                mask = line == f"{cls._HEADER}1" if mask is None else mask
                continue
            if not line:
                continue
            token, space, count = line.rpartition(" ")
            if not space or not count.lstrip("-").isdigit():
                raise VocabularyError(f"{path}: line {number} is {line!r}, expected a token, a space and its count.")
            tokens.append(token)
        try:
            return cls(tokens, mask=mask is not False)
        except VocabularyError as error:
            raise VocabularyError(f"{path}: {error}") from error


def load_vocabulary(path: Path) -> Vocabulary:
    """Read a vocabulary file, .model, .dict.txt or .pieces.json. Raises VocabularyError."""
    if path.name.endswith(DictionaryVocabulary.suffix) or path.name == "dict.txt":
        return DictionaryVocabulary.load(path)
    if path.name.endswith(SentencePieceVocabulary.suffix):
        return SentencePieceVocabulary.load(path)
    if path.name.endswith(PieceVocabulary.suffix):
        return PieceVocabulary.load(path)
    raise VocabularyError(
        f"{path}: a vocabulary file ends in .model (SentencePiece), .dict.txt (fairseq) or .pieces.json (imported)."
    )


def save_pair(directory: Path, source: Vocabulary, target: Vocabulary) -> dict[str, str]:
    """Write both sides' vocabularies, one file if they are one; returns {"source": name, "target": name}."""
    if source.fingerprint == target.fingerprint:
        return dict.fromkeys(("source", "target"), target.save(directory, "joint"))
    return {"source": source.save(directory, "source"), "target": target.save(directory, "target")}
