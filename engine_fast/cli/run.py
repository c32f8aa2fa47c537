"""`engine-fast run`: a whole recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def run(
    config: Annotated[Path, typer.Argument(help="YAML file, see configs/.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Directory of the run; the same one continues it.", show_default=False)],
    base: Annotated[
        Path | None, typer.Option(help="YAML file to put this one over, in place of its own `base`.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="section.key=value", help="Override one setting; repeatable.")
    ] = None,
) -> None:
    """Prepare, train teacher, distil, train CMLM and ENGINE, evaluate, report: each stage once, resumable.

    With `table` in the file also a table of the paper, with `sweep` every trial. Shipped files are found by their
    names: configs/tables/table3.yaml.
    """
    from engine_fast.cli.output import say, show
    from engine_fast.config import dump_config, find_config, load_config

    settings = load_config(find_config(config), overrides or [], base=base and find_config(base))
    if os.environ.get("RANK", "0") == "0":
        say(dump_config(settings))
    from engine_fast.recipes.run import run as run_recipe  # torch and more: after the mistakes that need none

    results = run_recipe(settings, out, say=say)
    if results is not None:
        show(results, out)
