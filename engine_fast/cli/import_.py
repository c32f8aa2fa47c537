"""`engine-fast import`: a fairseq-style checkpoint becomes a model directory."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Kind(StrEnum):
    """What the checkpoint is; auto looks for length classes, which only a CMLM has."""

    auto = "auto"
    transformer = "transformer"
    cmlm = "cmlm"


def import_(
    checkpoint: Annotated[
        Path, typer.Argument(help="fairseq checkpoint (.pt) of a transformer or of an ENGINE or Mask-Predict CMLM.")
    ],
    source_dict: Annotated[Path, typer.Option(help="The source side's dict.txt.")],
    target_dict: Annotated[Path, typer.Option(help="The target side's dict.txt.")],
    out: Annotated[Path, typer.Option(help="Model directory to write.")],
    kind: Annotated[Kind, typer.Option(help="What the checkpoint is.")] = Kind.auto,
) -> None:
    """Turn a fairseq-style checkpoint and its two dict.txt into a model directory."""
    from engine_fast.models.fairseq import import_fairseq

    architecture = import_fairseq(checkpoint, source_dict, target_dict, out, None if kind is Kind.auto else kind.value)
    typer.echo(
        f"{out}: {architecture.encoder_layers}+{architecture.decoder_layers} layers, width {architecture.width}, "
        f"{architecture.heads} heads, {architecture.positions} positions, embeddings tied: {architecture.tie}"
    )
