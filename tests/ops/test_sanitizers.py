"""The C++ built otherwise: with sanitizers, and for the weaker instruction sets that wheels for other machines use.

Each build lies beside a copy of the package and of these tests in a folder of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine_fast import extension

pytestmark = pytest.mark.slow

ISAS = [isa for isa, features in extension.ISA_FEATURES.items() if features <= extension.cpu_features()]
SANITIZE = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined"
MEMORY = ("agreement", "infinities", "properties", "noise", "overwrite", "raw_operators", "tiles")
NUMBERS = ("agreement", "tolerance", "infinities", "properties", "noise", "determinism")


def build(root: Path, directory: Path, isa: str, flags: str = "") -> Path:
    """A folder that holds engine_fast compiled for `isa` and the tests."""
    tree = directory / "tree"
    compiler = directory / "g++"  # flags behind all others, and a name that torch trusts
    compiler.write_text(f'#!/bin/sh\nexec g++ "$@" {flags}\n')
    compiler.chmod(0o755)
    environment = {"ENGINE_FAST_CPU_ISA": isa, "ENGINE_FAST_CUDA": "0", "CXX": str(compiler)}
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={tree}", f"--build-temp={directory}/temp"]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, **environment}, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (file,) = (tree / "engine_fast").glob("_C*.so")
    built = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(root / "engine_fast", tree / "engine_fast", ignore=built, dirs_exist_ok=True)
    shutil.copytree(root / "tests" / "ops", tree / "tests" / "ops", ignore=built)
    shutil.copy(root / "tests" / "conftest.py", tree / "tests")
    shutil.copy(root / "pyproject.toml", tree)
    assert extension.read_build_info(file)["isa"] == isa
    return tree


def run(tree: Path, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "ENGINE_FAST_"))}
    return subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env={**inherited, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "CI": "1", **environment},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


def assert_passes(tree: Path, subjects: tuple[str, ...], **environment: str) -> None:
    which = run(tree, ["-c", "from engine_fast import extension; print(extension.load().__file__)"], **environment)
    assert Path(which.stdout.strip()).parent == tree / "engine_fast", which.stdout + which.stderr
    files = [f"tests/ops/test_{subject}.py" for subject in subjects]
    done = run(tree, ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files], **environment)
    reports = "\n".join(log.read_text(errors="replace")[:4000] for log in sorted(tree.glob("report.*")))
    assert not reports, reports
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


def library(name: str) -> str:
    found = subprocess.run(
        ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert Path(found).is_absolute(), f"{name} was not found: gcc's sanitizers are not installed"
    return found


@pytest.mark.parametrize("isa", ISAS)
def test_address_and_undefined_behaviour_sanitizers_are_silent(isa: str, root: Path, tmp_path: Path):
    tree = build(root, tmp_path, isa, SANITIZE)
    (file,) = (tree / "engine_fast").glob("_C*.so")
    assert b"__asan_report" in file.read_bytes()
    assert b"__ubsan_handle" in file.read_bytes()
    # The interpreter was not built with them, so their libraries come first; libstdc++ too, whose throw they wrap.
    preload = " ".join(library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so"))
    options = f"halt_on_error=1:print_stacktrace=1:log_path={tree}/report"
    assert_passes(tree, MEMORY, LD_PRELOAD=preload, ASAN_OPTIONS=f"detect_leaks=0:{options}", UBSAN_OPTIONS=options)


@pytest.mark.parametrize("isa", ISAS[:-1])
def test_a_build_for_weaker_machines_computes_the_same(isa: str, root: Path, tmp_path: Path):
    """The strongest is what every other test has run."""
    assert_passes(build(root, tmp_path, isa), NUMBERS)
