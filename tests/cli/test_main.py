"""The program as a whole: what it lists, how it fails, what it does not import."""

from __future__ import annotations

import errno
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine_fast import __version__
from engine_fast.cli.main import COMMANDS, app
from engine_fast.errors import DataError

RUNNER = CliRunner()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], Any]:
    """Replace `engine-fast report` by a command that raises, and call it."""

    def call(error: BaseException) -> Any:
        def report() -> None:
            raise error

        module = types.ModuleType("engine_fast.cli.report")
        module.report = report  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "engine_fast.cli.report", module)
        return RUNNER.invoke(app, ["report"])

    return call


def test_help_lists_every_command() -> None:
    result = RUNNER.invoke(app, ["--help"])
    assert result.exit_code == 0
    for name in COMMANDS:
        assert f" {name} " in result.output


def test_version() -> None:
    result = RUNNER.invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"{__version__}\n")


def test_help_is_fast_because_torch_stays_out() -> None:
    script = "import sys; from engine_fast.cli.main import app; app(['--help'], standalone_mode=False); "
    script += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_explains_itself(name: str) -> None:
    result = RUNNER.invoke(app, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage" in result.output


def test_unknown_command_exits_with_2() -> None:
    result = RUNNER.invoke(app, ["trian"])
    assert result.exit_code == 2
    assert "trian" in result.output


def test_a_named_mistake_is_one_message_and_exit_2(command: Callable[[BaseException], Any]) -> None:
    result = command(DataError("corpus.de: 3 lines, corpus.en: 4 lines. Align them."))
    assert result.exit_code == 2
    assert result.stderr == "engine-fast: corpus.de: 3 lines, corpus.en: 4 lines. Align them.\n"
    assert result.stdout == ""


def test_an_interrupt_exits_with_130_and_says_what_is_kept(command: Callable[[BaseException], Any]) -> None:
    class Interrupted(KeyboardInterrupt):
        """As training raises it."""

    result = command(Interrupted("saved at update 12"))
    assert (result.exit_code, result.stderr) == (130, "engine-fast: saved at update 12\n")
    assert command(KeyboardInterrupt()).exit_code == 130


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "Free some space"), (errno.EROFS, "may write to"), (errno.EACCES, "may write to")],
)
def test_a_full_or_read_only_disk_is_explained(
    command: Callable[[BaseException], Any], number: int, words: str
) -> None:
    result = command(OSError(number, "the system's words", "some/file"))
    assert result.exit_code == 2
    assert "some/file: the system's words" in result.stderr
    assert words in result.stderr


def test_a_bug_keeps_its_traceback(command: Callable[[BaseException], Any]) -> None:
    result = command(ZeroDivisionError())
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_run_names_the_nearest_key(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("data: {synthetic: {}}\nteachr: {}\n")
    result = RUNNER.invoke(app, ["run", str(config), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "teachr is not a known key. Did you mean 'teacher'?" in result.stderr
    assert not (tmp_path / "out").exists()


def test_run_refuses_a_missing_config(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["run", str(tmp_path / "none.yaml"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "none.yaml" in result.stderr


def test_run_refuses_a_file_as_its_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine\n")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        result = RUNNER.invoke(app, ["demo", "--out", str(out)])
        assert result.exit_code == 2
        assert f"{out}: a file is in the way, expected a directory" in result.stderr
    assert (tmp_path / "file").read_text() == "mine\n"


def test_evaluate_of_nothing_says_what_to_give(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["evaluate", str(tmp_path)])
    assert result.exit_code == 2
    assert "no config.yaml here, so not a run" in result.stderr


def test_report_of_nothing_says_what_to_run(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert "engine-fast run" in result.stderr
