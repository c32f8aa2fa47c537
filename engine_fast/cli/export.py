"""`engine-fast export`: a model directory from a stage's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    stage: Annotated[Path, typer.Argument(help="Directory of a trained stage, finished or not.", show_default=False)],
    to: Annotated[Path, typer.Option(help="Model directory to write.", show_default=False)],
    checkpoint: Annotated[
        str,
        typer.Option(metavar="best|latest|update-N|best-N", help="Which of its checkpoints; their checksums count."),
    ] = "best",
) -> None:
    """Turn a checkpoint into a model directory: model.safetensors, config.json, vocabulary. Needs no GPU."""
    from engine_fast.cli.output import say
    from engine_fast.training.export import export as write

    name = write(stage, to, checkpoint, say=say)
    typer.echo(f"{to}: the weights of {name}")
