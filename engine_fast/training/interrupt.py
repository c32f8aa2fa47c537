"""Ctrl-C and SIGTERM end a run after the update in hand; a second signal ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and has saved its state. The message says where, and how to continue."""


class Stop:
    """Set by the first signal; the loop looks at it between updates."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def request(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt("stopped at once by a second signal; the last checkpoint is kept.")
        self.signal = signal.Signals(number)


@contextmanager
def catching_signals() -> Iterator[Stop]:
    """Route SIGINT and SIGTERM to the returned Stop; outside the main thread, where Python allows none, do nothing."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.request) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
