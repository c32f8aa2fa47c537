"""`engine-fast report`: the page of a run, from its results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="Directory of a run that has been evaluated.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="File to write; default: report.html in the run.")] = None,
) -> None:
    """Write the run's report page: one HTML file that needs nothing else."""
    from engine_fast.cli.output import require_run
    from engine_fast.evaluation.report import write_report

    if not (run / "evaluate").is_dir():  # a run without a sweep may have been here before
        require_run(run)
    path = out or run / "report.html"
    write_report(run, path)
    typer.echo(path)
