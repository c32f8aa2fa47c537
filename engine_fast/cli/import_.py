"""`engine-fast import`: a fairseq-style checkpoint becomes a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def import_(
    checkpoint: Annotated[Path, typer.Argument(help="A transformer's, or an ENGINE or Mask-Predict CMLM's, .pt file.")],
    source_dict: Annotated[Path, typer.Option(help="The source side's dict.txt.")],
    target_dict: Annotated[Path, typer.Option(help="The target side's dict.txt.")],
    out: Annotated[Path, typer.Option(help="Model directory to write.")],
    kind: Annotated[
        Literal["auto", "transformer", "cmlm"], typer.Option(help="auto: a CMLM if it has length classes.")
    ] = "auto",
) -> None:
    """Turn a fairseq-style checkpoint and its two dict.txt into a model directory."""
    from engine_fast.models.fairseq import import_fairseq

    architecture = import_fairseq(checkpoint, source_dict, target_dict, out, None if kind == "auto" else kind)
    typer.echo(
        f"{out}: {architecture.encoder_layers}+{architecture.decoder_layers} layers, width {architecture.width}, "
        f"{architecture.heads} heads, {architecture.positions} positions, embeddings tied: {architecture.tie}"
    )
