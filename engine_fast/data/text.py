"""Text files as streams of normalised lines: plain, .gz or .xz, strict UTF-8, NFC.

A line ends at "\\n" and nowhere else: the other characters that Python calls line ends (U+2028, form feed, ...) occur
inside real corpora, and splitting at them would shift one side against the other.
"""

from __future__ import annotations

import gzip
import io
import itertools
import lzma
import os
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal, cast

from engine_fast.errors import ConfigError, DataError

DecodingErrors = Literal["strict", "surrogateescape"]


def normalise(text: str) -> str:
    """Unicode NFC, every run of white space one space, none at either end."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def expand_path(text: str) -> Path:
    """`~` and `${NAME}` replaced; a variable that is not set raises ConfigError."""
    path = os.path.expanduser(os.path.expandvars(text))
    unset = re.search(r"\$\{?\w+\}?", path)
    if unset:
        raise ConfigError(f"{text}: {unset.group()} is not set. Set this environment variable or write the path out.")
    return Path(path)


def open_binary(path: Path) -> BinaryIO:
    """The decompressed bytes of a file, as its suffix says. Raises DataError when it cannot be opened."""
    try:
        raw = io.BufferedReader(io.FileIO(path), buffer_size=1 << 20)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.LZMAFile(raw))
    return raw


def raw_lines(stream: Iterable[bytes], origin: str) -> Iterator[bytes]:
    """The stream's lines. Raises DataError where it cannot be read on, as in a damaged archive."""
    number = 0
    try:
        for line in stream:
            yield line
            number += 1
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{origin}: damaged after line {number} ({error}). Copy or download it again.") from error


def decode_lines(
    stream: Iterable[bytes], origin: str, *, first_line: int = 1, errors: DecodingErrors = "strict"
) -> Iterator[str]:
    """Lines as text, without their ends and without the mark that may begin a file; UTF-8.

    Raises DataError as raw_lines(), and under errors="strict" for bytes that are not UTF-8, with the line's number.
    """
    for number, line in enumerate(raw_lines(stream, origin), start=first_line):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8", errors).rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{origin}: line {number} is not UTF-8 (byte {error.object[error.start]:#04x} at position "
                f"{error.start}). Convert the text, for example with iconv -t UTF-8, or remove the line."
            ) from error


def iter_lines(path: Path) -> Iterator[str]:
    """The normalised lines of a file, in constant memory. Raises DataError: not readable, or as decode_lines()."""
    with open_binary(path) as stream:
        for line in decode_lines(stream, str(path)):
            yield normalise(line)


def iter_pairs(source: Path, target: Path) -> Iterator[tuple[str, str]]:
    """Aligned lines of two files. Raises DataError naming both counts when they differ, or when both are empty."""
    sources, targets = iter_lines(source), iter_lines(target)
    count = 0
    for one, other in itertools.zip_longest(sources, targets):
        if one is None or other is None:
            rest = count + 1 + sum(1 for _ in (targets if one is None else sources))
            num_source, num_target = (count, rest) if one is None else (rest, count)
            if not min(num_source, num_target):
                empty, full = (target, source) if num_source else (source, target)
                raise DataError(
                    f"{empty} is empty (0 lines), expected the {rest} lines that {full} has. Copy or make it again."
                )
            raise DataError(
                f"{source} has {num_source} lines and {target} has {num_target}: line i of both must be one pair. "
                "Align the files again."
            )
        count += 1
        yield one, other
    if not count:
        raise DataError(f"{source} and {target} are empty, expected one sentence a line.")


def write_lines(path: Path, lines: Iterable[str]) -> int:
    """Write UTF-8 lines to a new file, flushed to the disk. Returns their number."""
    count = 0
    with path.open("xb") as stream:
        for line in lines:
            stream.write(line.encode("utf-8") + b"\n")
            count += 1
        stream.flush()
        os.fsync(stream.fileno())
    return count
