"""new_directory: what is removed, what is left alone."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine_fast.data.atomic import is_held, new_directory, only_one, replacing
from engine_fast.errors import DataError


def test_appears_whole_with_ordinary_permissions(tmp_path: Path) -> None:
    with new_directory(tmp_path / "a" / "b", marker="done") as partial:
        (partial / "done").touch()
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["b", "done"]
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_living_writer_keeps_its_sibling_and_a_dead_one_does_not(tmp_path: Path) -> None:
    dead, fresh, old = (tmp_path / f".x.partial-{name}" for name in ("dead", "fresh", "old"))
    for folder in (dead, fresh, old):
        folder.mkdir()
    (dead / ".lock").touch()
    os.utime(old, (0, 0))
    with new_directory(tmp_path / "x", marker="done") as outer:
        (outer / "done").touch()
        with new_directory(tmp_path / "x", marker="done") as inner:
            assert outer.exists()
            (inner / "done").write_text("inner")
    assert {path.name for path in tmp_path.iterdir()} == {"x", fresh.name}


def test_the_empty_current_directory_can_be_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with new_directory(Path("."), marker="done") as partial:
        (partial / "done").touch()
    assert (tmp_path / "here" / "done").exists()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(DataError, match="was not written by this command"),
        new_directory(tmp_path / "file", marker="done"),
    ):
        pass
    with pytest.raises(DataError, match="cannot be written"), new_directory(tmp_path / "file" / "x", marker="done"):
        pass


def test_only_a_file_gives_its_place_to_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link", "."):
        with pytest.raises(DataError, match="is no regular file"), replacing(tmp_path / name, "w") as file:
            file.write("x")
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "file").write_text("old")
    (tmp_path / "alias").symlink_to("file")
    with replacing(tmp_path / "alias", "w") as file:
        file.write("new")
    assert (tmp_path / "alias").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alias", "file", "link", "pipe"]


def test_a_lock_is_seen_while_its_holder_lives(tmp_path: Path) -> None:
    assert not is_held(tmp_path / "absent")
    with only_one(tmp_path):
        assert is_held(tmp_path)
        assert is_held(tmp_path), "looking does not take it"
    assert not is_held(tmp_path)
    script = "import sys, time; from engine_fast.data.atomic import only_one; from pathlib import Path\n"
    script += "with only_one(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    assert is_held(tmp_path)
    holder.kill()
    holder.communicate()
    assert not is_held(tmp_path)


def test_a_file_system_without_locks_is_worked_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    abandoned = tmp_path / ".x.partial-1"
    abandoned.mkdir()
    (abandoned / ".lock").touch()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("engine_fast.data.atomic.fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="has no locks .* See to it"), only_one(tmp_path):
        assert not is_held(tmp_path)
    with new_directory(tmp_path / "x", marker="done") as partial:
        (partial / "done").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"x", abandoned.name, ".lock"}
