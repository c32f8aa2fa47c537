"""`engine-fast distill`: the teacher's translations of the training sources, as a corpus."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer

from engine_fast.cli.translate import Device, Precision, place_among_processes


def distill(
    model: Annotated[Path, typer.Option(help="Teacher directory.")],
    data: Annotated[Path, typer.Option(help="Directory that `engine-fast prepare` wrote.")],
    out: Annotated[Path, typer.Option(help="Where corpus/, source.txt and target.txt go.")],
    beam: Annotated[int, typer.Option(min=1, help="Hypotheses kept.")] = 5,
    length_penalty: Annotated[float, typer.Option(min=0, help="Scores are divided by length to this power.")] = 1.0,
    n_best: Annotated[int, typer.Option(min=1, help="Translations written per source.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Source tokens times beam per batch.")] = 8192,
    chunk_sentences: Annotated[int, typer.Option(min=1, help="Sentences per resumable chunk.")] = 2000,
    split: Annotated[Literal["train", "valid", "test"], typer.Option(help="Split to translate.")] = "train",
    precision: Annotated[Precision, typer.Option(help="Of the search.")] = "fp32",
    device: Annotated[Device, typer.Option(help="auto = cuda where there is one.")] = "auto",
) -> None:
    """Translate the training sources with the teacher's beam search. Interrupted, the same command goes on.

    Started by a launcher (RANK and WORLD_SIZE are set), the processes share the work.
    """
    from engine_fast.config import DistillConfig
    from engine_fast.data.atomic import only_one
    from engine_fast.data.prepared import Prepared
    from engine_fast.decoding.distill import distill as run
    from engine_fast.inference.load import pick_device
    from engine_fast.models import load_model

    rank, world_size = place_among_processes()
    where = pick_device(device)
    config = DistillConfig(
        beam=beam,
        length_penalty=length_penalty,
        n_best=n_best,
        max_tokens=max_tokens,
        chunk_sentences=chunk_sentences,
        precision=precision,
    )
    teacher = load_model(model, kind="teacher")
    prepared = Prepared.open(data)
    with only_one(out) if rank == 0 else nullcontext():
        corpus = run(teacher, prepared, config, out, split=split, rank=rank, world_size=world_size, device=where)
    if corpus is not None:
        print(f"{out}: {len(corpus)} pairs", file=sys.stderr)
