"""setup.py and the Makefile: what is missing is said before anything is compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine_fast import extension


def build(root: Path, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        f"--build-lib={directory}/lib",
        f"--build-temp={directory}/temp",
    ]
    return subprocess.run(
        command, cwd=root, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize(
    ("environment", "messages"),
    [
        ({"ENGINE_FAST_CUDA": "1", "CUDA_HOME": "/nonexistent"}, ["ENGINE_FAST_CUDA = '1' needs", "a CUDA toolkit"]),
        ({"ENGINE_FAST_CUDA": "yes"}, ["ENGINE_FAST_CUDA = 'yes', expected one of auto, 0, 1"]),
        (
            {"ENGINE_FAST_CPU_ISA": "sse9"},
            ["ENGINE_FAST_CPU_ISA = 'sse9', expected one of auto, default, avx2, avx512"],
        ),
        ({"CXX": "no-such-compiler"}, ["compiler 'no-such-compiler' was not found", "apt-get install g++"]),
    ],
)
def test_a_build_that_cannot_work_says_why(
    root: Path, tmp_path: Path, environment: dict[str, str], messages: list[str]
) -> None:
    run = build(root, tmp_path, **environment)
    assert run.returncode != 0
    for message in messages:
        assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.slow
def test_a_plain_build_records_what_it_is(root: Path, tmp_path: Path) -> None:
    run = build(root, tmp_path, ENGINE_FAST_CPU_ISA="default", ENGINE_FAST_CUDA="0")
    assert run.returncode == 0, run.stderr
    (file,) = tmp_path.rglob("*.so")
    info = extension.read_build_info(file)
    assert info["isa"] == "default"
    assert info["cuda"] is None
    assert "-mavx" not in info["flags"]


def make(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "install", *arguments]
    return subprocess.run(
        command, cwd=root, env={**inherited, **environment}, capture_output=True, text=True, timeout=60, check=False
    )


def test_make_install_names_a_missing_python_and_compiler(root: Path, tmp_path: Path) -> None:
    run = make(root, f"VENV={tmp_path}/venv", "PYTHON=no-such-python")
    assert run.returncode != 0
    assert "no-such-python was not found. Install Python 3.11 or later" in run.stderr

    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\ncase $1 in --version) echo Python 3.9.1;; *) exit 1;; esac\n")
    old.chmod(0o755)
    run = make(root, f"VENV={tmp_path}/venv", f"PYTHON={old}")
    assert run.returncode != 0
    assert "Python 3.9.1 found, 3.11 or later is needed" in run.stderr

    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
    run = make(root, f"VENV={tmp_path}/venv", CXX="no-such-compiler")
    assert run.returncode != 0
    assert "C++ compiler no-such-compiler was not found" in run.stderr
