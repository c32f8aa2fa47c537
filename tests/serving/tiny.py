"""The three systems of a service, tiny and random; what they say by themselves; one that can be held up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine_fast.decoding import DecodeSettings, Translator
from engine_fast.inference.serving.systems import System, Wish
from tests.decoding.tiny import load_tiny, make_student, make_teacher

SCOPE = {
    "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
    "path": "/translate", "raw_path": b"/translate", "query_string": b"", "root_path": "",
    "headers": [(b"content-type", b"application/json")], "client": ("test", 1), "server": ("test", 80),
}  # fmt: skip
"""A request for /translate as a server hands it to the application."""


def make_systems() -> dict[str, System]:
    """ENGINE first, as a service has them that was given all three."""
    teacher = make_teacher()
    return {
        "engine": System("engine", Translator(load_tiny(make_student()), DecodeSettings(length_beam=3)), teacher),
        "teacher": System("teacher", Translator(load_tiny(teacher), DecodeSettings(beam=2)), teacher),
        "cmlm": System("cmlm", Translator(load_tiny(make_student(seed=1)), DecodeSettings(length_beam=5)), teacher),
    }


def plain(system: System, lines: list[str], **settings: Any) -> list[str]:
    """What the system's own translator makes of the lines."""
    wish = system.settled(Wish(**settings))
    return list(system.translator_for(wish).stream(lines))


class Held:
    """A system whose batches wait for a gate; counts them."""

    def __init__(self, system: System) -> None:
        self._system = system
        self.gate, self.begun = threading.Event(), threading.Event()
        self.batches: list[int] = []
        self.gate.set()
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._system, name)

    def run(self, settings: Wish, prepared: list[Any]) -> list[Any]:
        self.batches.append(len(prepared))
        self.begun.set()
        assert self.gate.wait(30)
        if self.error is not None:
            raise self.error
        return self._system.run(settings, prepared)

    @contextmanager
    def holding(self) -> Iterator[None]:
        self.begun.clear()
        self.gate.clear()
        self.batches.clear()
        yield
        self.gate.set()
