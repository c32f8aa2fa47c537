"""`engine-fast evaluate`: measure a finished run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine_fast.errors import ConfigError


def evaluate(
    run: Annotated[Path, typer.Argument(help="Directory of a run whose models are trained.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="evaluate.key=value", help="Override one setting; repeatable."),
    ] = None,
) -> None:
    """Measure every system of a run again and write results.json and report.html anew; nothing is trained."""
    from engine_fast.cli.output import require_run, say, show
    from engine_fast.config import load_config
    from engine_fast.recipes.run import run as run_recipe

    require_run(run)
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: no config.yaml here, so not a run. Give the --out of `engine-fast run` or `demo`.")
    settings = load_config(run / "config.yaml", overrides or [])
    results = run_recipe(settings, run, say=say, redo=("evaluate",), only=("evaluate", "report"))
    if results is not None:
        show(results, run)
