"""What the commands that end in a table share: progress lines on stderr, the table on stdout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def say(line: str) -> None:
    """One line about what happens, flushed, on standard error: standard output is for results."""
    print(line, file=sys.stderr, flush=True)


def require_run(directory: Path) -> None:
    """Raises ConfigError where a sweep was the last thing that `directory` is of: it has a table, and no report."""
    from engine_fast.config import load_config
    from engine_fast.errors import ConfigError

    path = directory / "config.yaml"
    config = load_config(path) if path.is_file() else None
    if config is not None and config.sweep is not None:
        raise ConfigError(
            f"{directory}: holds a sweep, expected a single run. What it found is in "
            f"{directory / (config.table or 'sweep')}/; "
            "`engine-fast run` measures its trials again when evaluate.* changes."
        )


def show(results: dict[str, Any], out: Path) -> None:
    """The table of systems with the findings, or the table that was asked for; and where the files are."""
    from rich.console import Console

    from engine_fast.evaluation.findings import summary
    from engine_fast.evaluation.results import results_table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a log file has no width; do not wrap the table
    if "table" in results:
        directory = out / results["table"]["name"]
        print((directory / "table.md").read_text(encoding="utf-8"))
        console.print(f"{out / 'results.json'}\n{directory / 'table.md'}\n{directory / 'figure.png'}", soft_wrap=True)
        return
    console.print(results_table(results))
    for line in summary(results):
        console.print(line)
    console.print(f"{out / 'results.json'}\n{out / 'report.html'}", soft_wrap=True)
