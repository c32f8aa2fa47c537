from __future__ import annotations

from pathlib import Path

import pytest

from tests.decoding.tiny import make_student, make_teacher, save_tiny


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "teacher", make_teacher())


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "student", make_student())
