"""A file to a file: the same for any number of ranks, after a kill, and for plain and compressed text."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine_fast.decoding import Translator
from engine_fast.errors import CheckpointError, ConfigError, DataError
from engine_fast.inference.files import job_of, render, require_files, translate_file
from engine_fast.inference.load import load

TEXT = (
    "\ufeffmon tue\n\nwed\u2028thu\nfri \x00sat\n" + "sun " * 40 + "\nmon\nodd words here\n\ntue".replace("\n", "\r\n")
)
LINES = TEXT.removeprefix("\ufeff").split("\n")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture(scope="module")
def translator(student: Path) -> Translator:
    return load(student, length_beam=2)


@dataclass
class Counted:
    """A translator that remembers where it was asked to begin, and is interrupted at the part that begins at `stop`."""

    inner: Translator
    asked: list[int]
    stop: int = 0

    @property
    def report(self) -> Any:
        return self.inner.report

    @property
    def max_positions(self) -> int:
        return self.inner.max_positions

    def translate_n_best(self, lines: Any, *, first_line: int = 1) -> Iterator[Any]:
        self.asked.append(first_line)
        for found in self.inner.translate_n_best(lines, first_line=first_line):
            if first_line == self.stop:
                raise KeyboardInterrupt
            yield found


def run(translator: Any, source: Path, target: Path, **options: Any) -> Any:
    options = {"job": {"model": "a"}, "part_lines": 2, "show_progress": False} | options
    return translate_file(translator, source, target, **options)


@pytest.mark.filterwarnings("ignore:of .* lines")
def test_a_file_is_translated_as_a_stream(translator: Translator, source: Path, tmp_path: Path) -> None:
    expected = "".join(f"{text}\n" for text in translator.translate(LINES))
    whole = translator.report
    with pytest.warns(UserWarning, match="of 9 lines: 1 longer than 24 tokens, the first in line 5") as told:
        assert run(translator, source, tmp_path / "out") == whole
    assert len(told) == 1
    assert (tmp_path / "out").read_text() == expected
    for suffix, opened in ((".gz", gzip.open), (".xz", lzma.open)):
        packed = tmp_path / f"in{suffix}"
        with opened(packed, "wb") as file:
            file.write(TEXT.encode())
        assert run(translator, packed, tmp_path / f"out{suffix}") == whole
        assert (tmp_path / f"out{suffix}").read_text() == expected
    (tmp_path / "nothing").touch()
    assert run(translator, tmp_path / "nothing", tmp_path / "none").num_lines == 0
    assert (tmp_path / "none").read_bytes() == b""
    assert sorted(path.name for path in tmp_path.iterdir() if "parts" in path.name) == []


@pytest.mark.filterwarnings("ignore:of .* lines")
def test_an_interrupted_file_goes_on_and_ends_the_same(translator: Translator, source: Path, tmp_path: Path) -> None:
    run(translator, source, tmp_path / "whole")
    first = Counted(translator, [], stop=5)
    with pytest.raises(KeyboardInterrupt):
        run(first, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    second = Counted(translator, [])
    run(second, source, tmp_path / "out")
    assert (first.asked, second.asked) == ([1, 3, 5], [5, 7, 9])
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    again = Counted(translator, [])
    run(again, source, tmp_path / "out")
    assert again.asked == []
    run(again, source, tmp_path / "out", job={"model": "b"})
    assert again.asked == [1, 3, 5, 7, 9]
    source.write_text("mon\n")
    assert run(translator, source, tmp_path / "out", job={"model": "b"}).num_lines == 1
    assert (tmp_path / "out").read_text() == translator.translate(["mon"])[0] + "\n"


@pytest.mark.filterwarnings("ignore:of .* lines")
def test_ranks_share_the_parts(translator: Translator, source: Path, tmp_path: Path) -> None:
    run(translator, source, tmp_path / "whole")
    other = Counted(translator, [], stop=7)  # rank 1 of 2: its own begin at 3 and 7; it dies in the second of them
    with pytest.raises(KeyboardInterrupt):
        run(other, source, tmp_path / "out", rank=1, world_size=2)
    main = Counted(translator, [])
    report = run(main, source, tmp_path / "out", rank=0, world_size=2)
    assert (other.asked, main.asked) == ([3, 7], [1, 5, 9, 7])
    assert report.num_lines == 9
    late = Counted(translator, [])
    assert run(late, source, tmp_path / "out", rank=1, world_size=2) is None
    assert late.asked == []
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert json.loads((tmp_path / "out.json").read_text())["report"]["num_lines"] == 9
    assert [path.name for path in tmp_path.iterdir() if "parts" in path.name] == []


def test_a_line_that_is_not_utf8_is_named_in_any_part(translator: Translator, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"mon\ntue\nwed\n\xe4h\nthu\n")
    with pytest.raises(DataError, match=r"in: line 4 is not UTF-8 \(byte 0xe4"):
        run(translator, tmp_path / "in", tmp_path / "out")
    with pytest.warns(UserWarning, match="of 5 lines: 1 with bytes that are not UTF-8, read as U"):
        report = run(translator, tmp_path / "in", tmp_path / "out", errors="surrogateescape")
    assert (report.num_lines, report.num_undecodable) == (5, 1)


def test_a_damaged_part_is_named(translator: Translator, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("mon\n" * 6)
    with pytest.raises(KeyboardInterrupt):
        run(Counted(translator, [], stop=5), tmp_path / "in", tmp_path / "out")
    [part] = tmp_path.glob("out.parts-*/000001.txt")
    part.write_text("mon\n")
    with pytest.raises(CheckpointError, match=r"000001.txt: damaged .*Remove the file"):
        run(translator, tmp_path / "in", tmp_path / "out")
    part.unlink()
    assert run(translator, tmp_path / "in", tmp_path / "out").num_lines == 6


def test_a_job_is_named_by_weights_vocabularies_and_settings(student: Path, teacher: Path) -> None:
    job = job_of(student, None, {"iterations": 1})
    assert job == job_of(student, None, {"iterations": 1})
    others = [
        job_of(teacher, None, {"iterations": 1}),
        job_of(student, teacher, {"iterations": 1}),
        job_of(student, None, {}),
    ]
    assert job not in others


def test_n_best_lines_have_the_number_of_their_line(student: Path, tmp_path: Path) -> None:
    translator = load(student, n_best=2)
    (tmp_path / "in").write_text("mon\ntue\n\nwed\n")
    run(translator, tmp_path / "in", tmp_path / "out", part_lines=1, n_best=2)
    found = translator.translate_n_best(["mon", "tue", "", "wed"])
    expected = [render(number, each, 2) for number, each in enumerate(found, start=1)]
    assert (tmp_path / "out").read_text().splitlines() == "\n".join(expected).splitlines()
    assert [row.split(" ||| ")[0] for row in "\n".join(expected).splitlines()] == list("0011233")


def test_files_that_do_not_go_together_are_refused(source: Path, tmp_path: Path) -> None:
    require_files(source, tmp_path / "out", 4)
    require_files(None, None, 1)
    for given, message in (
        ((None, tmp_path / "out", 1), "goes with --input FILE"),
        ((tmp_path / "no", tmp_path / "out", 1), "goes with --input FILE"),
        ((source, source, 1), "is the --input"),
        ((source, None, 2), "2 ranks cannot share standard output"),
    ):
        with pytest.raises(ConfigError, match=message):
            require_files(*given)


def test_an_output_takes_the_place_of_nobody_elses_file(source: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "folder", "link", "."):
        with pytest.raises(DataError, match="is no regular file"):
            require_files(source, tmp_path / name if name != "." else Path(), 1)
    report = tmp_path / "res.json"
    report.write_text('{"systems": []}')
    with pytest.raises(ConfigError, match=r"report would take the place of .*res.json"):
        require_files(source, tmp_path / "res", 1)
    with pytest.raises(ConfigError, match=r"report would take the place of .*res.json"):
        require_files(report, tmp_path / "res", 1)
    with pytest.raises(ConfigError, match=r"would hold plain text. Leave out .gz"):
        require_files(source, tmp_path / "out.gz", 1)
    assert report.read_text() == '{"systems": []}'


@pytest.mark.filterwarnings("ignore:of .* lines")
def test_an_older_result_may_be_replaced(translator: Translator, source: Path, tmp_path: Path) -> None:
    run(translator, source, tmp_path / "real")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    require_files(source, tmp_path / "out", 1)
    require_files(source, tmp_path / "real", 1)
    before = (tmp_path / "real").read_text()
    (tmp_path / "real").write_text("old\n")
    run(translator, source, tmp_path / "out", job={"model": "b"})
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real").read_text() == before
