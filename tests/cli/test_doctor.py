"""engine-fast doctor: each thing that can be missing is found, and told what to do about."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from engine_fast import extension
from engine_fast.cli import doctor
from engine_fast.cli.main import app
from engine_fast.data.catalog import CATALOG
from engine_fast.errors import BuildError


def found(probe: Callable[[], Iterable[doctor.Check]]) -> dict[str, doctor.Check]:
    return {check.name: check for check in probe()}


def test_this_environment_can_train() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["training_works"] is True
    states = {check["name"]: check["state"] for check in report["checks"]}
    for name in ("Python", "engine-fast", "torch", "deepspeed", "engine_fast._C", "DeepSpeed", "disk"):
        assert states[name] == "ok"
    assert {check["group"] for check in report["checks"]} == {"installed", "compiled", "usable"}
    assert all(check["advice"] for check in report["checks"] if check["state"] != "ok")


def test_the_table_shows_every_check_and_the_exit_code_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [
        doctor.Check("installed", "torch", "ok", "2.13"),
        doctor.Check("installed", "transformers", "absent", "optional, extra [hf]", "pip install 'engine-fast[hf]'"),
        doctor.Check("usable", "disk", "broken", "0.1 GB free", "free some"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda: checks)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    for text in ("torch", "2.13", "extra [hf]", "broken", "free some", "Training cannot work here yet: disk."):
        assert text in result.output
    monkeypatch.setattr(doctor, "examine", lambda: checks[:2])
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "Training works here." in result.output


def test_a_missing_package_is_broken_and_a_missing_extra_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["no-such-package>=1", 'no-such-extra; extra == "hf"', 'no-such-tool; extra == "dev"', "numpy"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    checks = found(doctor.packages)
    assert checks["no-such-package"].state == "broken"
    assert "make install" in checks["no-such-package"].advice
    assert checks["no-such-extra"].state == "absent"
    assert checks["no-such-extra"].advice == "pip install 'engine-fast[hf]'"
    assert checks["numpy"].state == "ok"
    assert "no-such-tool" not in checks


def test_a_source_tree_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert found(doctor.packages)["engine-fast"].state == "broken"


def refusing(message: str) -> Callable[[], Any]:
    def refuse() -> Any:
        raise BuildError(message)

    return refuse


def test_an_extension_that_is_missing_or_does_not_load_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "load", refusing("this processor lacks avx512f"))
    check = found(doctor.compiled)["engine_fast._C"]
    assert (check.state, check.found, check.advice) == ("broken", "does not load", "this processor lacks avx512f")
    monkeypatch.setattr(extension, "build_info", refusing("not compiled. Run make"))
    check = found(doctor.compiled)["engine_fast._C"]
    assert (check.state, check.advice) == ("broken", "not compiled. Run make")


def test_a_slower_build_than_the_processor_allows_is_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    info = {"isa": "default", "torch": "2", "cuda": "13.0", "compiler": "g++"}
    monkeypatch.setattr(extension, "build_info", lambda: info)
    monkeypatch.setattr(extension, "load", lambda: None)
    monkeypatch.setattr(extension, "cpu_features", lambda: extension.ISA_FEATURES["avx2"])
    checks = found(doctor.compiled)
    assert checks["instruction set"].state == "absent"
    assert "has avx2" in checks["instruction set"].advice
    assert checks["CUDA"].state == "ok"
    bf16 = found(doctor.processor)["bf16 on the CPU"]
    assert (bf16.state, bf16.advice) == ("absent", "Use precision: fp32 on this processor.")


def test_a_deepspeed_that_fails_or_hangs_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: no hjson\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    check = found(doctor.deepspeed_imports)["DeepSpeed"]
    assert check.state == "broken"
    assert "ImportError: no hjson" in check.found

    def hang(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("python", 1)

    monkeypatch.setattr(subprocess, "run", hang)
    check = found(doctor.deepspeed_imports)["DeepSpeed"]
    assert check.state == "broken"
    assert "hangs" in check.found


def test_gpu_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert found(doctor.gpu)["GPU"].found == "torch is a CPU build"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    check = found(doctor.gpu)["GPU"]
    assert (check.state, "nvidia-smi" in check.advice) == ("absent", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    assert found(doctor.gpu)["GPU"].found == "card 0, card 1"


def test_a_full_disk_is_broken_and_missing_tools_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000_000))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert found(doctor.disk)["disk"].state == "broken"
    assert {name: check.state for name, check in found(doctor.tools).items()} == {"g++": "absent", "nvcc": "absent"}


def test_corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_FAST_DATA", str(tmp_path))
    check = found(doctor.corpora)["corpora"]
    assert (check.state, check.found) == ("absent", f"none of the catalog in {tmp_path}")
    assert "ENGINE_FAST_DATA" in check.advice
    (tmp_path / CATALOG["multi30k_de_en"].folder).mkdir()
    check = found(doctor.corpora)["corpora"]
    assert (check.state, check.found) == ("ok", f"multi30k_de_en in {tmp_path}")
