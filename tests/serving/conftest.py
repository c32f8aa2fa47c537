from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from engine_fast.inference.serving import Limits, create_app
from engine_fast.inference.serving.systems import System
from tests.serving.tiny import make_systems


@pytest.fixture(scope="session")
def systems() -> dict[str, System]:
    return make_systems()


@pytest.fixture
def start(systems: dict[str, System]) -> Iterator[Callable[..., TestClient]]:
    """A client of a service that is ready; start(max_queue=8, ...) with other limits, start(systems=...) of others."""
    with ExitStack() as stack:

        def started(*, systems: dict[str, Any] = systems, **limits: Any) -> TestClient:
            app: FastAPI = create_app(systems, Limits(**limits))
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield started
