"""What is pressed at the launcher's terminal, as a number that its loops look at."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Signals:
    """SIGINT, SIGTERM and SIGHUP, counted; every wait of the launcher ends with the first."""

    def __init__(self) -> None:
        self.count = 0
        self.given_up = threading.Event()

    def __call__(self) -> int:
        return self.count

    def note(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        self.given_up.set()

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Count them in this block; afterwards they do again what they did before.

        One that was ignored when this process started stays so: nohup means it.
        """
        wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        numbers = [number for number in wanted if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self.note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
