"""report.html: one page with everything a colleague would ask about a run, and nothing fetched from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from engine_fast.evaluation.files import write_atomic
from engine_fast.evaluation.findings import fewest_passes, row_of, summary, warnings
from engine_fast.evaluation.plots import energy_figure, length_figure, speed_figure, training_figure
from engine_fast.evaluation.results import COLUMNS, format_cell, read_results

NUM_EXAMPLES = 12
STAGES = ("teacher", "cmlm", "engine")


def write_report(run: Path, path: Path) -> None:
    """Write the page of a run directory: run/evaluate/{results.json, outputs/}, run/<stage>/metrics.jsonl.

    Raises CheckpointError when the results cannot be read. Missing metrics only leave their curves out.
    """
    results = read_results(run / "evaluate" / "results.json")
    metrics = {stage: read_metrics(run / stage / "metrics.jsonl") for stage in STAGES}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("engine_fast.evaluation", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    passes = fewest_passes(results["systems"])
    shown = [("reference", "reference", "faint")] + [
        (row["label"], name, role)
        for role, name in (("teacher", "teacher-beam"), ("cmlm", "cmlm"), ("engine", "engine"))
        if (row := _shown(results["systems"], role, name, None if role == "teacher" else passes)) is not None
    ]
    page = environment.get_template("report.html.j2").render(
        results=results,
        summary=summary(results),
        warnings=warnings(results, metrics["engine"]),
        header=_header(results),
        rows=_rows(results),
        speed=Markup(speed_figure(results["systems"])),
        energy=Markup(energy_figure(results["systems"], results["references"]["energy"])),
        curves=[(stage, Markup(svg)) for stage in STAGES if (svg := training_figure(stage, metrics[stage]))],
        lengths=Markup(length_figure(results["lengths"], shown)),
        examples=_examples(run / "evaluate" / "outputs", shown),
        settings=[(title, _flatten(tree)) for title, tree in _sections(results)],
    )
    write_atomic(path, page)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; [] where there is none. Of lines repeated after a resume the last stands."""
    if not path.is_file():
        return []
    lines: dict[tuple[Any, Any], dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
            lines[line["kind"], line["update"]] = line
        except (ValueError, KeyError, TypeError):
            continue  # half a line, from a crash while writing it
    return sorted(lines.values(), key=lambda line: float(line["update"]))


def mark_repeats(text: str) -> list[tuple[str, bool]]:
    """The words of a line, each with whether it equals the word before it."""
    words = text.split()
    return [(word, number > 0 and word == words[number - 1]) for number, word in enumerate(words)]


def _header(results: dict[str, Any]) -> list[tuple[str, str]]:
    return [(title, key) for title, key, _ in COLUMNS if any(row.get(key) is not None for row in results["systems"])]


def _rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Cells as text; `best` marks the highest BLEU of each role, oracle lengths left out."""
    forms = {key: form for _, key, form in COLUMNS}
    best: dict[str, float] = {}
    for row in results["systems"]:
        if not row["oracle_length"]:
            role = _role(row)
            best[role] = max(best.get(role, 0.0), row["bleu"])
    return [
        {
            "role": _role(row),
            "cells": [(key, format_cell(row, key, forms[key])) for _, key in _header(results)],
            "best": not row["oracle_length"] and row["bleu"] == best[_role(row)],
            "oracle": row["oracle_length"],
        }
        for row in results["systems"]
    ]


def _role(row: dict[str, Any]) -> str:
    return str(row["system"]).split("-")[0]


def _shown(systems: Sequence[dict[str, Any]], role: str, name: str, passes: int | None) -> dict[str, Any] | None:
    """The row that stands for a network: `name`, or where that was not measured the first that was."""
    return row_of(systems, name, passes) or next((row for row in systems if _role(row) == role), None)


def _examples(outputs: Path, shown: Sequence[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """Sentences to look at: half where the baseline repeats most, half spread evenly over the split."""
    sources = _lines(outputs / "source.txt")
    references = [_lines(path) for path in sorted(outputs.glob("reference-*.txt"))]
    systems = [(name, color, _lines(outputs / f"{label}.txt")) for label, name, color in shown if label != "reference"]
    baseline = next((lines for name, _, lines in systems if name == "cmlm"), systems[0][2])
    repeats = [sum(repeated for _, repeated in mark_repeats(line)) for line in baseline]
    worst = sorted(range(len(sources)), key=lambda i: (-repeats[i], i))[: NUM_EXAMPLES // 2]
    step = max(1, len(sources) // (NUM_EXAMPLES - len(worst)))
    spread = [i for i in range(step // 2, len(sources), step) if i not in worst]
    chosen = [*worst, *spread][:NUM_EXAMPLES]
    return [
        {
            "number": i + 1,
            "source": sources[i],
            "references": [stream[i] for stream in references],
            "outputs": [(name, color, mark_repeats(lines[i])) for name, color, lines in systems],
        }
        for i in chosen
    ]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def _sections(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    config = results["config"]
    plain = {key: value for key, value in config.items() if not isinstance(value, dict)}
    others = ("versions", "machine", "seconds", "hashes", "corpus")
    return [
        ("run", plain),
        *((key, value) for key, value in config.items() if isinstance(value, dict) and value),
        *((key, results[key]) for key in others),
    ]


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs = []
    for key, value in tree.items():
        if isinstance(value, dict):
            pairs += _flatten(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return pairs
