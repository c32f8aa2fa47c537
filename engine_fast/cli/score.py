"""`engine-fast score`: energies of given translations."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine_fast.cli.translate import Device, Precision, write_lines
from engine_fast.errors import DataError

if TYPE_CHECKING:
    from engine_fast.models import LoadedModel

_WINDOW = 4096


def score(
    source: Annotated[Path, typer.Argument(help="Source text; plain, .gz or .xz.")],
    target: Annotated[Path, typer.Argument(help="Its translations, line by line.")],
    model: Annotated[Path, typer.Option(help="Teacher directory.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the longer side per batch.")] = 8192,
    precision: Annotated[Precision, typer.Option(help="Of the teacher.")] = "fp32",
    device: Annotated[Device, typer.Option(help="auto = cuda where there is one.")] = "auto",
) -> None:
    """Energy of each translation under a teacher, -log p(target | source) in nats, one per line."""
    from engine_fast.data.text import iter_pairs
    from engine_fast.inference.load import pick_device
    from engine_fast.models import load_model, set_precision

    for path in (source, target):
        if path.is_fifo():
            raise DataError(
                f"{path}: a pipe, expected a file, because it is read twice. Write the text to a file first."
            )
    for _ in iter_pairs(source, target):  # unaligned files are refused before anything is written
        pass
    teacher = load_model(model, device=pick_device(device), kind="teacher")
    set_precision(teacher.model, precision)
    write_lines(f"{energy:.6f}" for energy in _energies(teacher, iter_pairs(source, target), max_tokens))


def _energies(teacher: LoadedModel, pairs: Iterator[tuple[str, str]], max_tokens: int) -> Iterator[float]:
    import torch

    from engine_fast.data.symbols import EOS
    from engine_fast.decoding.translate import pad_rows, plan_batches
    from engine_fast.energies import discrete_energy
    from engine_fast.models import Teacher

    model = teacher.model
    assert isinstance(model, Teacher)
    device = next(model.parameters()).device
    limit = model.max_positions
    number = 0
    while window := list(islice(pairs, _WINDOW)):
        sources = [[*ids, EOS] for ids in teacher.source_vocabulary.encode_batch([pair[0] for pair in window])]
        targets = [[*ids, EOS] for ids in teacher.target_vocabulary.encode_batch([pair[1] for pair in window])]
        lengths = [max(len(one), len(other)) for one, other in zip(sources, targets, strict=True)]
        for place, length in enumerate(lengths, start=number + 1):
            if length > limit:
                raise DataError(
                    f"line {place}: {length} tokens, end symbol included, and the teacher has {limit} positions. "
                    "An energy of a part would mean nothing: split the sentence or leave the line out."
                )
        number += len(window)
        energies = [0.0] * len(window)
        for batch in plan_batches(lengths, max_tokens):
            source_BS, target_BT = (pad_rows([side[i] for i in batch]).to(device) for side in (sources, targets))
            with torch.no_grad():
                values = discrete_energy(model, source_BS, target_BT).tolist()
            for i, value in zip(batch, values, strict=True):
                energies[i] = value
        yield from energies
