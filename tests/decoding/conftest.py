from __future__ import annotations

import pytest
from torch import Tensor

from engine_fast.data.symbols import EOS
from engine_fast.models import CMLM, Transformer
from tests.decoding.tiny import make_student, make_teacher, pad


@pytest.fixture
def teacher() -> Transformer:
    return make_teacher()


@pytest.fixture
def student() -> CMLM:
    return make_student()


@pytest.fixture
def sources() -> Tensor:
    return pad([[5, 6, 7, 8, EOS], [9, EOS], [11, 5, 10, EOS], [7, 7, 9, 10, 6, 5, EOS]])
