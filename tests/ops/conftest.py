"""Every test that asks for `device` runs on the CPU and, where there is one and kernels for it, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine_fast import ops
from tests.ops.cases import DEVICES


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _fused() -> Iterator[None]:
    """The compiled operators or an error: never the reference against itself."""
    with ops.using("fused"):
        yield
