"""What a person sees while a stage trains: a bar on a terminal, otherwise a line now and then."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_UNITS = (
    ("loss", "loss {:.3f}"),
    ("energy", "energy {:.2f}"),
    ("lr", "lr {:.2e}"),
    ("tokens_per_second", "{:,.0f} tokens/s"),
)


class Reporter:
    """Rank 0 reports to standard error; the other ranks are silent."""

    def __init__(self, stage: str, *, total: int, silent: bool = False, every: float = 15.0) -> None:
        self._stage, self._total, self._silent, self._every = stage, total, silent, every
        self._console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._first, self._started, self._last = 0, time.monotonic(), -math.inf
        if not silent and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"), TimeElapsedColumn(), TimeRemainingColumn(),
                console=self._console,
            )  # fmt: skip
            self._task = self._bar.add_task(stage, total=total, text="")

    def start_at(self, update: int) -> None:
        """Begin to count time, from this update."""
        self._first, self._started = update, time.monotonic()
        if self._bar is not None:
            self._bar.reset(self._task, completed=update)
            self._bar.start()

    def advance(self, update: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=update)

    def show(self, update: int, values: dict[str, Any]) -> None:
        """The newest averages."""
        text = "  ".join(form.format(values[name]) for name, form in _UNITS if name in values)
        if self._bar is not None:
            self._bar.update(self._task, completed=update, text=text)
        elif not self._silent and time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            pace = (self._last - self._started) / max(1, update - self._first)
            left = time.strftime("%H:%M:%S", time.gmtime(pace * (self._total - update)))
            print(f"{self._stage} {update}/{self._total}  {text}  {left} left", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._silent:
            return
        if self._bar is not None:
            self._bar.console.print(f"{self._stage}: {text}", markup=False, soft_wrap=True)
        else:
            print(f"{self._stage}: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
