"""Which implementation runs: chosen by ENGINE_FAST_OPS or by what there is, and said aloud. Each in its own process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from engine_fast import ops
from engine_fast.errors import ConfigError


def python(script: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script with the package that lies in `directory`."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("ENGINE_FAST_OPS", "PYTHONWARNINGS")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=directory,
        env={**inherited, "PYTHONPATH": str(directory), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A folder with the package as it is before anything was compiled."""
    directory = tmp_path_factory.mktemp("bare")
    shutil.copytree(
        root / "engine_fast", directory / "engine_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return directory


IMPLEMENTATION = """
    import engine_fast
    from engine_fast import ops
    print(engine_fast.__file__)
    print(ops.implementation())
"""


@pytest.mark.parametrize(("wanted", "runs"), [("reference", "reference"), ("fused", "fused"), ("", "fused")])
def test_the_variable_chooses(root: Path, wanted: str, runs: str):
    done = python(IMPLEMENTATION, root, ENGINE_FAST_OPS=wanted)
    assert done.stdout.split()[-1:] == [runs], done.stderr
    assert "Warning" not in done.stderr


def test_another_value_is_refused(root: Path):
    done = python(IMPLEMENTATION, root, ENGINE_FAST_OPS="nonsense")
    assert done.returncode != 0
    assert "ENGINE_FAST_OPS = 'nonsense', expected fused, reference" in done.stderr


FALLBACK = """
    import warnings
    import engine_fast
    from pathlib import Path
    assert Path(engine_fast.__file__).parent.parent == Path.cwd().resolve(), engine_fast.__file__
    import torch
    from engine_fast import ops
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        z, s, w = torch.randn(3, 7), torch.randn(3, 7), torch.randn(7, 7)
        for _ in range(2):
            assert torch.equal(ops.energy(z, s, "SX"), ops.reference.energy(z, s, "SX"))
            assert torch.equal(ops.soft_embedding(z, w), ops.reference.soft_embedding(z, w))
            assert torch.equal(ops.linear_energy(z, w, s, w), ops.reference.linear_energy(z, w, s, w))
            assert torch.equal(ops.teacher_energy(z, s, w), ops.reference.teacher_energy(z, s, w))
            x, logits = ops.linear_soft_embedding_and_logits(z, w, w)
            assert torch.equal(x, ops.reference.linear_soft_embedding(z, w, w))
            assert torch.equal(logits, z @ w.T)
    for warning in caught:
        print(warning.category.__name__, warning.message)
"""


def test_without_the_extension_one_warning_says_why(bare: Path):
    done = python(FALLBACK, bare)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    for part in (
        "UserWarning engine_fast.ops runs its plain torch definitions",
        "not compiled for Python",
        "make install",
    ):
        assert part in line
    assert "ENGINE_FAST_OPS=reference silences this" in line


def test_the_reference_asked_for_is_no_reason_to_warn(bare: Path):
    done = python(FALLBACK, bare, ENGINE_FAST_OPS="reference")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_a_damaged_extension_is_named_in_the_warning(bare: Path, tmp_path: Path):
    shutil.copytree(bare / "engine_fast", tmp_path / "engine_fast")
    suffix = next(iter(__import__("importlib.machinery").machinery.EXTENSION_SUFFIXES))
    (tmp_path / "engine_fast" / f"_C{suffix}").write_bytes(b"not a library")
    done = python(FALLBACK, tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "not an extension that engine_fast built" in line


def test_fused_demanded_and_missing_is_an_error(bare: Path):
    done = python(FALLBACK, bare, ENGINE_FAST_OPS="fused")
    assert done.returncode != 0
    assert (
        "engine_fast.errors.BuildError: ENGINE_FAST_OPS = 'fused', and the compiled operators cannot be" in done.stderr
    )
    assert "make install" in done.stderr


def test_finite_checks_by_variable(root: Path):
    script = """
        import torch
        from engine_fast import ops
        ops.soft_embedding(torch.ones(2, 3), torch.full((3, 4), torch.nan))
    """
    assert python(script, root).returncode == 0
    done = python(script, root, ENGINE_FAST_CHECK_FINITE="1")
    assert "soft_embedding: table (3, 4) holds 12 values that are not finite" in done.stderr


def test_using_is_for_a_block_and_nests():
    assert ops.implementation() == "fused"
    with ops.using("reference"):
        assert ops.implementation() == "reference"
        with ops.using(check_finite=True):
            assert ops.implementation() == "reference"
        with ops.using("fused"):
            assert ops.implementation() == "fused"
        assert ops.implementation() == "reference"
    assert ops.implementation() == "fused"
    with pytest.raises(ZeroDivisionError), ops.using("reference"):
        raise ZeroDivisionError
    assert ops.implementation() == "fused"
    with pytest.raises(ConfigError, match=r"using\('fast'\): expected 'fused' or 'reference'"), ops.using("fast"):  # type: ignore[arg-type]
        pass
