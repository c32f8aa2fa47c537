"""results.json: what was measured, with what, from what; and its table for a terminal."""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from engine_fast import __version__, extension
from engine_fast.errors import CheckpointError

_PACKAGES = ("torch", "deepspeed", "sacrebleu", "sentencepiece", "numpy", "pydantic", "safetensors")


def versions() -> dict[str, str]:
    """Version of everything that can change a figure; a package that is not installed is left out."""
    found = {"engine_fast": __version__, "python": platform.python_version(), **_installed()}
    if extension.available():
        info = extension.build_info()
        found["engine_fast._C"] = ", ".join(f"{key} {info[key]}" for key in sorted(info))
    return found


@cache
def _installed() -> dict[str, str]:
    """Versions of _PACKAGES: reading them takes ten milliseconds, and a sweep asks for each trial."""
    found = {}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """What the speeds were measured on, without naming the host."""
    found: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def read_results(path: Path) -> dict[str, Any]:
    """Raises CheckpointError for a file that is missing or is not a results file."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree["systems"], list):
            raise TypeError("systems is not a list")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: no results can be read ({type(error).__name__}: {error}). "
            "Run `engine-fast run` to its end, or `engine-fast evaluate` on the run directory."
        ) from error
    return dict(tree)


def results_table(results: dict[str, Any]) -> Table:
    """One line per system; columns that no system has are left out."""
    table = Table(title=f"{results['name']}: {results['split']} split, {results['references']['sentences']} sentences")
    rows = results["systems"]
    columns = [column for column in COLUMNS if any(row.get(column[1]) is not None for row in rows)]
    for title, key, _ in columns:
        table.add_column(title, justify="left" if key == "system" else "right", no_wrap=True)
    for number, row in enumerate(rows):
        group = row["system"].split("-")[0]
        following = rows[number + 1]["system"].split("-")[0] if number + 1 < len(rows) else group
        table.add_row(*(format_cell(row, key, form) for _, key, form in columns), end_section=group != following)
    table.caption = (
        f"energy: nats a sentence under the teacher; references {results['references']['energy']:.2f}. "
        f"p: paired bootstrap against {results['baseline']}."
    )
    return table


# title, key in a row of results.json, format
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("system", "system", ""),
    ("passes", "iterations", "d"),
    ("beam", "length_beam", "d"),
    ("BLEU", "bleu", ".2f"),
    ("+-", "bleu_interval", ".2f"),
    ("p", "p_value", ".3f"),
    ("chrF", "chrf", ".1f"),
    ("energy", "energy", ".2f"),
    ("valid", "valid", ".1%"),
    ("repeated", "repetition", ".2%"),
    ("length", "length_ratio", ".3f"),
    ("right", "length_accuracy", ".1%"),
    ("sentences/s", "sentences_per_second", ".1f"),
    ("ms alone", "latency_ms", ".1f"),
)


def format_cell(row: dict[str, Any], key: str, form: str) -> str:
    """A table cell; a missing value is empty. The beam is a teacher's hypotheses or a student's lengths."""
    value = row.get(key)
    if value is None and key == "length_beam":
        value = row.get("beam")
    return "" if value is None else format(value, form)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
