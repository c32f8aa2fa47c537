"""The compiled extension engine_fast._C: found, checked against this machine, then loaded.

The record of how it was built stands in the file itself, between two markers, and is read as bytes: a machine
that lacks the recorded instruction set is refused before a single instruction of the extension has run.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import json
import mmap
import platform
from pathlib import Path
from types import ModuleType
from typing import Any

from engine_fast.errors import BuildError

ISA_FEATURES: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "avx2": frozenset({"avx2", "fma"}),
    "avx512": frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"}),
}
"""What each ENGINE_FAST_CPU_ISA needs of the processor, by the names of /proc/cpuinfo; weakest first."""

_REBUILD = "Run `make install` (or `pip install --no-build-isolation --no-deps -e .`) in the source directory."
_BEGIN, _END = b"ENGINE_FAST_BUILD_INFO{", b"}ENGINE_FAST_BUILD_INFO"


@functools.cache
def cpu_features() -> frozenset[str]:
    """The processor's features as Linux names them; empty where /proc/cpuinfo does not exist."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return frozenset(flags.partition(":")[2].split())


def best_isa() -> str:
    """The strongest of ISA_FEATURES that this machine has."""
    return [isa for isa, needed in ISA_FEATURES.items() if needed <= cpu_features()][-1]


def path() -> Path | None:
    """The extension's file, or None when it was not compiled for this interpreter."""
    names = ["_C" + suffix for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    found = [file for name in names if (file := Path(__file__).with_name(name)).is_file()]
    return found[0] if found else None


def read_build_info(file: Path) -> dict[str, Any]:
    """The record inside a compiled extension, read without running it. Raises BuildError when there is none."""
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            begin = content.find(_BEGIN)
            end = content.find(_END, begin)
            if begin < 0 or end < 0:
                raise ValueError("no build record inside")
            record = json.loads(content[begin + len(_BEGIN) - 1 : end + 1])
    except (OSError, ValueError) as error:
        raise BuildError(f"{file}: is not an extension that engine_fast built ({error}). {_REBUILD}") from error
    if not isinstance(record, dict) or record.get("isa") not in ISA_FEATURES:
        raise BuildError(f"{file}: its build record {record!r} names no known instruction set. {_REBUILD}")
    return record


def build_info() -> dict[str, Any]:
    """How the extension was built: torch, isa, cuda, compiler, flags. Raises BuildError when nothing is compiled."""
    file = path()
    if file is None:
        raise BuildError(f"engine_fast._C is not compiled for Python {platform.python_version()}. {_REBUILD}")
    return read_build_info(file)


@functools.cache
def load() -> ModuleType:
    """The module engine_fast._C.

    Raises BuildError: not compiled, built for an instruction set or a torch that is not here, or damaged.
    """
    record = build_info()
    missing = ISA_FEATURES[record["isa"]] - cpu_features()
    if missing:
        raise BuildError(
            f"engine_fast._C was built with ENGINE_FAST_CPU_ISA={record['isa']}, and this processor lacks "
            f"{', '.join(sorted(missing))}. Rebuild here, or anywhere with ENGINE_FAST_CPU_ISA={best_isa()}. {_REBUILD}"
        )
    import torch  # the extension links to torch's libraries, which must be in the process first

    if record["torch"] != torch.__version__:
        raise BuildError(
            f"engine_fast._C was built for torch {record['torch']}, and torch {torch.__version__} is installed. "
            + _REBUILD
        )
    try:
        return importlib.import_module("engine_fast._C")
    except ImportError as error:
        raise BuildError(f"engine_fast._C cannot be loaded: {error}. {_REBUILD}") from error


def available() -> bool:
    """Whether load() succeeds."""
    try:
        load()
    except BuildError:
        return False
    return True
