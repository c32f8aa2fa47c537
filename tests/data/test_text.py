"""Reading text: formats, normalisation, and every way a file can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine_fast.data.text import expand_path, iter_lines, iter_pairs, normalise
from engine_fast.errors import ConfigError, DataError

from .conftest import COMPRESS, write


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_every_format_reads_the_same(tmp_path: Path, suffix: str) -> None:
    lines = ["ein Haus", "", "zwei Häuser", "drei"]
    assert list(iter_lines(write(tmp_path / f"x.de{suffix}", lines))) == lines


def test_lines_end_at_newline_only_and_come_out_normalised(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes("\ufeffa\u0308 b\u2028c\r\n\td\u00a0 e \x0c\nlast".encode())
    assert list(iter_lines(path)) == ["ä b c", "d e", "last"]


def test_normalise_is_idempotent_and_composes() -> None:
    assert normalise("  A\u030a\t n ") == "Å n"
    assert normalise(normalise("e\u0301  x")) == normalise("e\u0301  x")


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_invalid_utf8_names_file_and_line(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"bad{suffix}", ["good", "also good"])
    with path.open("ab") as stream:  # containers of both kinds may be joined
        stream.write(COMPRESS.get(suffix, bytes)(b"caf\xe9\n"))
    with pytest.raises(DataError, match=rf"{path.name}: line 3 is not UTF-8 \(byte 0xe9 at position 3\)"):
        list(iter_lines(path))


def test_unaligned_files_give_both_counts(tmp_path: Path) -> None:
    long, short = write(tmp_path / "long", ["a"] * 7), write(tmp_path / "short", ["b"] * 4)
    with pytest.raises(DataError, match=r"long has 7 lines and .*short has 4"):
        list(iter_pairs(long, short))
    with pytest.raises(DataError, match=r"short has 4 lines and .*long has 7"):
        list(iter_pairs(short, long))


def test_one_missing_line_is_seen(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has 3 lines and .* has 2"):
        list(iter_pairs(write(tmp_path / "a", ["a"] * 3), write(tmp_path / "b", ["b"] * 2)))


def test_empty_files(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty", [])
    with pytest.raises(DataError, match="are empty"):
        list(iter_pairs(empty, empty))
    with pytest.raises(DataError, match=r"empty is empty \(0 lines\), expected the 2 lines"):
        list(iter_pairs(empty, write(tmp_path / "two", ["x", "y"])))


def test_missing_file_and_damaged_archive(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: cannot be read"):
        list(iter_lines(tmp_path / "nowhere"))
    for suffix in (".gz", ".xz"):
        path = write(tmp_path / f"cut{suffix}", [f"line {number}" for number in range(5000)])
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DataError, match=f"cut{suffix}: damaged after line"):
            list(iter_lines(path))
        path.write_bytes(b"no archive at all")
        with pytest.raises(DataError, match=f"cut{suffix}: damaged"):
            list(iter_lines(path))


def test_paths_expand_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORPORA", "/corpora")
    assert expand_path("${CORPORA}/x.de") == Path("/corpora/x.de")
    monkeypatch.delenv("CORPORA")
    with pytest.raises(ConfigError, match="CORPORA"):
        expand_path("${CORPORA}/x.de")
