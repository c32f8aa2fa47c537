"""What a rank tells its guard: that it gets on, what it is doing, and how it ended.

A few bytes of memory shared with the parent process, which `engine_fast.distributed.launch.rank` passes down as an open
descriptor. Nothing here can block, fail on a full disk or raise; without a guard everything is a no-op. Python's lock
is not needed to see that a rank stands still: the guard reads the memory, and asks for tracebacks by SIGUSR1.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import signal
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

VARIABLE = "ENGINE_FAST_PRESENCE"
"""Environment: descriptor, device and inode of the shared memory, joined by colons."""
COLLECTIVE_TIMEOUT = "ENGINE_FAST_COLLECTIVE_TIMEOUT"
"""Environment: seconds for which collectives wait where the configuration leaves it open. Who watches the ranks sets it
so high that a rank that hangs is found by the watcher, and not by its peers, of which one would then seem to fail."""
DUMP_SIGNAL = signal.SIGUSR1
_PROGRESS = struct.Struct("<QIId")  # count, depth of patient phases, bytes of the text that follows, time
_TEXT_BYTES = 256
_END_AT, _END = 512, struct.Struct("<I")
_BYTES = 1 << 16
_LIMITS = {"error": 2000, "traceback": 6000}
"""Characters kept, six bytes each at worst."""


class Board:
    """The shared memory, seen from either side."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, _BYTES)

    @classmethod
    def create(cls) -> tuple[Board, int]:
        """A new one and its descriptor, which lives as long as a process holds it."""
        descriptor = os.memfd_create("engine-fast-presence")
        os.ftruncate(descriptor, _BYTES)
        return cls(descriptor), descriptor

    def progress(self) -> tuple[int, bool, str, float]:
        """(beats so far, whether in a patient phase, last text, when: seconds since 1970)."""
        count, depth, length, when = _PROGRESS.unpack_from(self._memory)
        text = self._memory[_PROGRESS.size : _PROGRESS.size + min(length, _TEXT_BYTES)]
        return count, depth > 0, text.decode("utf-8", "replace"), when

    def set_progress(self, what: str, *, deeper: int = 0) -> None:
        """One more beat; `deeper` is added to the depth of patient phases."""
        count, depth, _, _ = _PROGRESS.unpack_from(self._memory)
        text = what.encode("utf-8", "replace")[:_TEXT_BYTES]
        self._memory[_PROGRESS.size : _PROGRESS.size + len(text)] = text
        _PROGRESS.pack_into(self._memory, 0, count + 1, max(0, depth + deeper), len(text), time.time())

    def end(self) -> dict[str, Any]:
        """What the rank said about its end; empty if it said nothing."""
        (length,) = _END.unpack_from(self._memory, _END_AT)
        start = _END_AT + _END.size
        try:
            tree = json.loads(self._memory[start : start + length])
        except ValueError:
            return {}
        return tree if isinstance(tree, dict) else {}

    def set_end(self, said: Mapping[str, Any]) -> None:
        short = {
            key: value[-limit:] if isinstance(value, str) and (limit := _LIMITS.get(key, 100)) else value
            for key, value in said.items()
        }
        body = json.dumps(short).encode()
        _END.pack_into(self._memory, _END_AT, 0)
        start = _END_AT + _END.size
        self._memory[start : start + len(body)] = body
        _END.pack_into(self._memory, _END_AT, len(body))


_board: Board | None = None


def attach() -> None:
    """Find the guard's memory, once, at the start of a program; nothing happens where there is no guard."""
    global _board
    place = os.environ.pop(VARIABLE, "")  # not for this process's own children
    try:
        descriptor, device, inode = map(int, place.split(":"))
        found = os.fstat(descriptor)
        if (found.st_dev, found.st_ino) != (device, inode):
            return
        _board = Board(descriptor)
        os.set_inheritable(descriptor, False)
        faulthandler.enable()
        faulthandler.register(DUMP_SIGNAL, all_threads=True)
        # As Ctrl-C: clean up and end, where no training loop has its own way to stop. Restored to it by them.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    except (ValueError, OSError, RuntimeError):
        return  # no guard, or a standard error that cannot be dumped to


def is_watched() -> bool:
    """Whether a guard reads what is written here."""
    return _board is not None


def beat(what: str) -> None:
    """Progress was made; `what` is done next. Called often: it costs a microsecond."""
    if _board is not None:
        _board.set_progress(what)


@contextmanager
def patient(what: str) -> Iterator[None]:
    """A phase that makes no beats, however long it takes: the process has to live, no more."""
    if _board is None:
        yield
        return
    _board.set_progress(what, deeper=1)
    try:
        yield
    finally:
        _board.set_progress(f"{what}: over", deeper=-1)


def explain(kind: str, error: str, *, traceback: str = "") -> None:
    """Why this process is about to end. The first explanation stands: what follows it are consequences."""
    if _board is not None and not _board.end():
        _board.set_end({"kind": kind, "error": error, "traceback": traceback, "when": time.time()})


def finished(code: int) -> None:
    """The program's last word, with the exit code it means to have: without it an exit code of 0 is not believed."""
    if _board is not None:
        said = _board.end() or {"kind": "done" if code == 0 else "exit", "error": "", "when": time.time()}
        _board.set_end({**said, "code": code})
