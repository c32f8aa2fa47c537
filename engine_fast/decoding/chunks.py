"""Numbered files that processes make together, each complete or absent, so that a kill costs the chunk at hand.

The processes share a directory and nothing else: chunks are dealt to ranks, and a rank that is done takes over what is
still missing. None waits for another.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from engine_fast.data.atomic import replacing, writing
from engine_fast.distributed.presence import beat
from engine_fast.errors import DataError


@dataclass(frozen=True, slots=True)
class Chunks:
    """The chunks of one product, which rank 0 assembles when all are there."""

    directory: Path
    count: int
    suffix: str
    is_finished: Callable[[], bool]
    """Whether the product is complete, for then the chunks may be gone."""
    rank: int = 0
    world_size: int = 1

    def path(self, number: int) -> Path:
        return self.directory / f"{number:06d}{self.suffix}"

    @property
    def paths(self) -> list[Path]:
        return [self.path(number) for number in range(self.count)]

    def make_directory(self) -> None:
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)

    def present(self) -> set[int]:
        return {number for number, path in enumerate(self.paths) if path.exists()}

    def missing(self, *, passed: Callable[[int], None]) -> Iterator[int]:
        """Numbers to make: this rank's own, then the others' from the end. On rank 0 all are there afterwards.

        passed: called with a chunk that was missing at the start and that another rank has made since.
        """
        ready = self.present()
        own = [number for number in range(self.count) if number % self.world_size == self.rank]
        others = [number for number in reversed(range(self.count)) if number % self.world_size != self.rank]
        for number in own + others:
            if number in ready:
                continue
            if self.path(number).exists() or self.is_finished():
                passed(number)
            else:
                yield number

    def write(self, number: int, fill: Callable[[IO[bytes]], None]) -> None:
        """Raises DataError when the disk refuses."""
        try:
            with replacing(self.path(number), "wb") as file:
                fill(file)
        except DataError:
            # Another rank was quicker, rank 0 has assembled everything, and the folder of chunks is gone. A file
            # server may show that before it shows the product.
            if not self.is_finished() and (self.rank == 0 or self.directory.is_dir()):
                raise

    def remove(self) -> None:
        """Once the product is complete. By every rank, after its own last chunk: it may have come late, into a folder
        that was being removed."""
        if self.is_finished():
            shutil.rmtree(self.directory, ignore_errors=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        # Since the start: sentences come many at a time, and the bar's own speed is that between two of them.
        done = task.completed - task.fields["done"]
        return Text(f"{done / task.elapsed:.1f} sentences/s" if done and task.elapsed else "", style="cyan")


@contextmanager
def progress(what: str, total: int, done: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on standard error; the function that is yielded advances it, and is a beat."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(what, total=total, completed=done, done=done)

        def advance(count: int) -> None:
            beat(f"{what}: translating")
            bar.advance(task, count)

        yield advance
