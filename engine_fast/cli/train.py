"""`engine-fast train`: one stage of a recipe by itself, on one process or under a launcher."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer

from engine_fast.errors import ConfigError

StageOption = Literal["teacher", "cmlm", "engine"]


def train(
    config: Annotated[Path, typer.Argument(help="YAML file, see configs/.", show_default=False)],
    stage: Annotated[StageOption, typer.Option(help="What to train.", show_default=False)],
    data: Annotated[Path, typer.Option(help="Directory that `engine-fast prepare` wrote.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Directory of the stage; the same one continues it.", show_default=False)],
    distilled: Annotated[
        Path | None, typer.Option(help="Directory that `engine-fast distill` wrote, if the stage trains on it.")
    ] = None,
    teacher: Annotated[Path | None, typer.Option(help="Teacher: needed by engine, and by cmlm.from_teacher.")] = None,
    student: Annotated[Path | None, typer.Option(help="CMLM that the engine stage starts from.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="section.key=value", help="Override one setting; repeatable.")
    ] = None,
) -> None:
    """Train one stage: teacher, cmlm or engine. Interrupted, the same command goes on.

    Several processes: `deepspeed --module engine_fast.cli.main train ...`, or `torchrun -m` likewise.
    """
    from engine_fast.config import load_config
    from engine_fast.data.atomic import only_one
    from engine_fast.data.corpus import ParallelCorpus
    from engine_fast.data.prepared import Prepared

    settings = load_config(config, overrides or [])
    if stage == "engine":
        for option, path in (("--teacher", teacher), ("--student", student)):
            if path is None:
                raise ConfigError(f"--stage engine needs {option}: a model directory, or the directory of its stage.")
    prepared = Prepared.open(data)
    corpus = prepared.split("train")
    if stage != "teacher" and getattr(settings, stage).data == "distilled":
        if distilled is None:
            raise ConfigError(
                f"{stage}.data = 'distilled' needs --distilled: a directory that `engine-fast distill` wrote. "
                f"Or train on the corpus itself with --set {stage}.data=references."
            )
        if not distilled.is_dir():
            raise ConfigError(
                f"--distilled {distilled}: no such directory. Give the one that `engine-fast distill` wrote."
            )
        corpus = ParallelCorpus.open(distilled / "corpus" if (distilled / "corpus").is_dir() else distilled)
    valid = prepared.split("valid")

    from engine_fast.training import train_cmlm, train_engine, train_teacher

    with only_one(out) if os.environ.get("RANK", "0") == "0" else nullcontext():
        if stage == "teacher":
            train_teacher(settings, prepared, out)
        elif stage == "cmlm":
            train_cmlm(settings, prepared, corpus, out, valid_corpus=valid, teacher_dir=teacher)
        else:
            assert teacher is not None
            assert student is not None
            train_engine(settings, prepared, corpus, out, valid_corpus=valid, teacher_dir=teacher, cmlm_dir=student)
