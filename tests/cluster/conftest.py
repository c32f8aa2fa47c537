"""Two nodes for the tests of a session, and the runs that every case starts from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.materials import Materials, materials
from tests.cluster.nodes import Cluster, obstacle


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := obstacle():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("keys") / "cluster") as cluster:
        yield cluster


@pytest.fixture
def cluster(running: Cluster) -> Iterator[Cluster]:
    """Both nodes on, plugged in and answering; whatever the test does to them is undone."""
    yield running
    running.ready()


@pytest.fixture(scope="session")
def made(running: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Materials:
    """Made by the first of pytest-xdist's workers that asks."""
    base = tmp_path_factory.getbasetemp()
    shared: Path = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return materials(shared / "materials", running)
