"""`engine-fast demo`: the whole recipe on a generated corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Directory of the run; the same one continues it.")] = Path("runs/demo"),
    seed: Annotated[int | None, typer.Option(help="Of everything random; default: the configuration's.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="section.key=value", help="Override one setting; repeatable.")
    ] = None,
) -> None:
    """Generate a two-mode corpus, train teacher, CMLM and ENGINE on it, and show how each translates it."""
    from engine_fast.cli.output import say, show
    from engine_fast.recipes.demo import demo as run_demo

    results = run_demo(out, seed=seed, overrides=overrides or [], say=say)
    if results is not None:
        show(results, out)
