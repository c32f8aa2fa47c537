"""What every test shares: one thread, a fixed seed, hypothesis without a stopwatch."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import pytest
import torch
from hypothesis import settings

settings.register_profile("engine_fast", deadline=None, max_examples=60, derandomize="CI" in os.environ)
settings.load_profile("engine_fast")


@pytest.fixture(scope="session")
def root() -> Path:
    """The source tree."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
