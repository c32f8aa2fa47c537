"""engine-fast prepare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from engine_fast.config import load_config
from engine_fast.data.filters import RULES
from engine_fast.data.prepare import PrepareReport
from engine_fast.data.prepare import prepare as prepare_corpus


def prepare(
    config: Annotated[
        Path, typer.Argument(help="A YAML file, see configs/: its data section, seed and teacher.pretrained are used.")
    ],
    out: Annotated[
        Path, typer.Option("--out", help="Directory to write; replaced when it holds an older preparation.")
    ],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, repeatable.")] = None,
    allow_unverified: Annotated[
        bool, typer.Option("--allow-unverified", help="Accept a downloaded archive whose checksum nobody stated.")
    ] = False,
) -> None:
    """Clean a parallel corpus, train its vocabulary and write id shards."""
    changes = [*(overrides or []), *(["data.allow_unverified=true"] if allow_unverified else [])]
    settings = load_config(config, changes)
    given = None
    if settings.teacher.pretrained is not None:
        from engine_fast.training.pretrained import vocabularies_of

        given = vocabularies_of(settings.teacher.pretrained)
    report = prepare_corpus(settings.data, out, seed=settings.seed, given=given)
    console = Console()
    for table in tables(report):
        console.print(table)
    if report.reused:
        console.print(f"{out}: already prepared from the same input, nothing was done.")
    else:
        console.print(f"{out}: {report.seconds:.1f} s, {report.pairs_per_second:,.0f} pairs/s.")


def tables(report: PrepareReport) -> list[Table]:
    """The report for a person: pairs by rule, lengths, vocabularies."""
    pairs = Table(
        "split", "read", *(rule.replace("_", " ") for rule in RULES), "kept", "kept, over the limit", title="Pairs"
    )
    lengths = Table("split", "side", "ids", "mean", "median", "95%", "longest", "unknown", title="Lengths in pieces")
    for split, part in report.splits.items():
        dropped = [f"{part.dropped[rule]:,}" if rule in part.dropped else "-" for rule in RULES]
        pairs.add_row(split, f"{part.read:,}", *dropped, f"{part.kept:,}", f"{part.longer_than_limit:,}")
        for language, side in ((report.source_language, part.source), (report.target_language, part.target)):
            lengths.add_row(
                split,
                language,
                f"{side.num_ids:,}",
                f"{side.mean:.1f}",
                f"{side.median:g}",
                f"{side.percentile_95:g}",
                str(side.longest),
                f"{side.unknown_share:.4%}",
            )
    vocabularies = Table("side", "file", "kind", "pieces", "sha256", title="Vocabularies")
    for name, vocabulary in report.vocabularies.items():
        vocabularies.add_row(name, vocabulary.file, vocabulary.kind, f"{vocabulary.size:,}", vocabulary.sha256[:16])
    for table in (pairs, lengths):
        for column in table.columns[2 if table is lengths else 1 :]:
            column.justify = "right"
    return [pairs, lengths, vocabularies]
