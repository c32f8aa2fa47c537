"""`engine-fast export`: from a stage's checkpoints or a model directory to something that others run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="STAGE|MODEL", help="A trained stage, finished or not, or a model directory.", show_default=False
        ),
    ],
    to: Annotated[Path, typer.Option(help="Directory to write.", show_default=False)],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="best|latest|update-N|best-N",
            help="Which checkpoint of a stage, best unless given; their checksums count.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="safetensors|ctranslate2|onnx",
            help="A model directory of this project; a transformer teacher for CTranslate2; a CMLM student as ONNX "
            "with a script that needs nothing of this project.",
        ),
    ] = "safetensors",
    quantization: Annotated[
        str, typer.Option(help="ctranslate2: float32, int8, int16, float16, bfloat16 and others; onnx: float32, int8.")
    ] = "float32",
) -> None:
    """Write a model for others to run, with a README.md that says what it is and how good it is. Needs no GPU."""
    from engine_fast.cli.output import say
    from engine_fast.training.export import export as write

    name = write(source, to, checkpoint, form=form, quantization=quantization, say=say)
    typer.echo(f"{to}: the weights of {name}")
