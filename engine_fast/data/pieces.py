"""A vocabulary that another toolkit made: its SentencePiece model cuts the text, its own list numbers the pieces."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from engine_fast.data.symbols import UNK
from engine_fast.data.text import normalise
from engine_fast.data.vocabulary_parts import SILENT, SYMBOLS, check_ids, read_content, save_content
from engine_fast.errors import VocabularyError

_FORMAT = 1
_SPACE = "\u2581"
"""How SentencePiece writes the start of a word."""


class PieceVocabulary:
    """SentencePiece's segmentation over a list of pieces: <s>, <pad>, </s>, <unk>, <mask>, then theirs in their order.

    Marian has one list and two segmentations, so its two sides are two vocabularies whose ids mean the same pieces.
    """

    suffix = ".pieces.json"

    def __init__(
        self, model: bytes, pieces: Sequence[str], silent: Iterable[int] = (), *, origin: str = "SentencePiece model"
    ) -> None:
        """model: a serialised SentencePiece model. pieces: all of them, the five symbols first. silent: further ids
        that text never becomes and decoding drops (language codes, sentinels, rows without a piece).

        Raises VocabularyError: not a model, other symbols, a piece twice, a list that lacks most of the model's pieces.
        """
        self._pieces = list(pieces)
        if self._pieces[: len(SYMBOLS)] != list(SYMBOLS):
            raise VocabularyError(
                f"{origin}: its first pieces are {self._pieces[:5]}, expected {list(SYMBOLS)}. Import it again."
            )
        self._silent = SILENT | set(silent)
        if max(self._silent) >= len(self._pieces):
            raise VocabularyError(
                f"{origin}: names id {max(self._silent)} as silent, of {len(self._pieces)} pieces. Import it again."
            )
        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:  # SentencePiece raises several plain kinds
            raise VocabularyError(
                f"{origin}: is not a SentencePiece model ({error}). Restore it or import again."
            ) from error
        spoken = [number for number in range(len(self._pieces)) if number not in self._silent]
        self._ids = {self._pieces[number]: number for number in spoken}
        if len(self._ids) != len(spoken):
            twice = next(self._pieces[number] for number in spoken if self._ids[self._pieces[number]] != number)
            raise VocabularyError(f"{origin}: the list holds {twice!r} twice, expected each piece once.")
        own = self._own_pieces()
        known = sum(piece in self._ids for piece in own)
        if 2 * known < len(own):
            raise VocabularyError(
                f"{origin}: the list knows {known} of this model's {len(own)} pieces. "
                "The two belong to different models: put the right files together."
            )
        content = {
            "format": _FORMAT,
            "model": base64.b64encode(model).decode(),
            "pieces": self._pieces,
            "silent": sorted(self._silent - SILENT),
        }
        self._content = (json.dumps(content, ensure_ascii=False, indent=0) + "\n").encode()
        self.fingerprint = hashlib.sha256(self._content).hexdigest()

    def __len__(self) -> int:
        return len(self._pieces)

    def __getstate__(self) -> bytes:
        return self._content

    def __setstate__(self, content: bytes) -> None:
        self.__dict__.update(self._parse(content, "pickled vocabulary").__dict__)

    def encode(self, text: str) -> list[int]:
        return self._numbers(self._processor.encode(normalise(text), out_type=str))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        cut = self._processor.encode([normalise(text) for text in texts], out_type=str, num_threads=1)
        return [self._numbers(pieces) for pieces in cut]

    def decode(self, ids: Iterable[int]) -> str:
        kept = [int(number) for number in ids if int(number) not in self._silent]
        return str(self._processor.decode_pieces(self.pieces(kept))) if kept else ""

    def pieces(self, ids: Iterable[int]) -> list[str]:
        numbers = [int(number) for number in ids]
        check_ids(numbers, len(self))
        return [self._pieces[number] for number in numbers]

    def surface(self, text: str) -> str:
        """What decode(encode(text)) is where every piece is known: the text after SentencePiece's normalisation."""
        return normalise(str(self._processor.normalize(normalise(text))).replace(_SPACE, " "))

    def sample_lines(self, *, lines: int = 8, words: int = 8) -> list[str]:
        """Text whose words are pieces that begin a word, evenly spaced over them."""
        found = [piece[1:] for piece in self._own_pieces() if piece[1:].isalpha() and piece.startswith(_SPACE)]
        found = [word for word in found if self.surface(word) == word]
        step = max(1, len(found) // (lines * words))
        chosen = found[::step][: lines * words]
        return [" ".join(chosen[start : start + words]) for start in range(0, len(chosen), words)]

    def save(self, directory: Path, stem: str) -> str:
        return save_content(directory, stem + self.suffix, self._content)

    @classmethod
    def load(cls, path: Path) -> PieceVocabulary:
        """Read what save() wrote. Raises VocabularyError: not readable, of another format, not one of ours."""
        return cls._parse(read_content(path), str(path))

    @classmethod
    def _parse(cls, content: bytes, origin: str) -> PieceVocabulary:
        try:
            found = json.loads(content)
            if found["format"] != _FORMAT:
                raise VocabularyError(f"{origin}: format {found['format']!r}, expected {_FORMAT}. Import it again.")
            model = base64.b64decode(found["model"], validate=True)
            pieces, silent = found["pieces"], found["silent"]
            if not all(isinstance(piece, str) for piece in pieces):
                raise TypeError("pieces are strings")
            return cls(model, pieces, silent, origin=origin)
        except (ValueError, KeyError, TypeError, binascii.Error) as error:
            raise VocabularyError(f"{origin}: is damaged ({error}). Restore it or import again.") from error

    def _numbers(self, pieces: Iterable[str]) -> list[int]:
        return [self._ids.get(piece, UNK) for piece in pieces]

    def _own_pieces(self) -> list[str]:
        """Of the SentencePiece model, without its symbols and bytes."""
        size = self._processor.get_piece_size()
        return [
            str(self._processor.id_to_piece(number))
            for number in range(size)
            if not (
                self._processor.is_control(number)
                or self._processor.is_unknown(number)
                or self._processor.is_byte(number)
            )
        ]
