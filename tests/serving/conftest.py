from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from engine_fast.decoding import DecodeSettings, Translator
from engine_fast.inference.serving import Limits, create_app
from engine_fast.inference.serving.systems import System
from tests.decoding.tiny import load_tiny, make_student, make_teacher


@pytest.fixture(scope="session")
def systems() -> dict[str, System]:
    """ENGINE first, as a service has them that was given all three."""
    teacher = make_teacher()
    return {
        "engine": System("engine", Translator(load_tiny(make_student()), DecodeSettings(length_beam=3)), teacher),
        "teacher": System("teacher", Translator(load_tiny(teacher), DecodeSettings(beam=2)), teacher),
        "cmlm": System("cmlm", Translator(load_tiny(make_student(seed=1)), DecodeSettings(length_beam=5)), teacher),
    }


@pytest.fixture
def start(systems: dict[str, System]) -> Iterator[Callable[..., TestClient]]:
    """A client of a service that is ready; start(max_queue=8, ...) with other limits, start(systems=...) of others."""
    with ExitStack() as stack:

        def started(*, systems: dict[str, Any] = systems, **limits: Any) -> TestClient:
            app: FastAPI = create_app(systems, Limits(**limits))
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield started
