"""What every kind of vocabulary shares: the symbols that are no text, the check of ids, and its file."""

from __future__ import annotations

from pathlib import Path

from engine_fast.data.atomic import write_file, writing
from engine_fast.data.symbols import BOS, EOS, MASK, PAD, UNK
from engine_fast.errors import VocabularyError

SYMBOLS = {"<s>": BOS, "<pad>": PAD, "</s>": EOS, "<unk>": UNK, "<mask>": MASK}
SILENT = frozenset({BOS, PAD, EOS, MASK})
"""What text never becomes, and decoding drops."""


def check_ids(ids: list[int], size: int) -> None:
    """Raises VocabularyError for an id that a vocabulary of `size` pieces does not have."""
    if ids and not 0 <= min(ids) <= max(ids) < size:
        wrong = next(number for number in ids if not 0 <= number < size)
        raise VocabularyError(f"id {wrong} does not exist in a vocabulary of {size}: model and vocabulary differ.")


def read_content(path: Path) -> bytes:
    """Raises VocabularyError for a file that cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise VocabularyError(f"{path}: cannot be read ({error.strerror}). Restore it or prepare again.") from error


def save_content(directory: Path, name: str, content: bytes) -> str:
    """Write a new file into the directory; returns its name."""
    with writing(directory / name):
        write_file(directory / name, content)
    return name
