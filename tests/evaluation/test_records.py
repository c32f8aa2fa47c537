"""A record counts only for what it was made from, and only with its translations as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine_fast.evaluation.records import Measured, Records
from engine_fast.evaluation.systems import System

SYSTEM = System("cmlm", "cmlm", iterations=4, length_beam=5)
MEASURED = Measured(
    {"label": SYSTEM.label, "bleu": 0.1 + 0.2, "beam": None}, {"3": 2}, ["ein", "", "z\x85wei\r \u2028"]
)


@pytest.fixture
def records(tmp_path: Path) -> Records:
    found = Records(tmp_path, {"beam": 5})
    found.store(SYSTEM, MEASURED)
    return found


def test_what_was_stored_comes_back(records: Records, tmp_path: Path) -> None:
    assert records.load(SYSTEM) == MEASURED
    assert Records(tmp_path, {"beam": 5}).load(SYSTEM) == MEASURED
    assert (tmp_path / "outputs" / "cmlm.i4.k5.txt").read_bytes().count(b"\n") == 3


def test_another_system_or_other_inputs_find_nothing(records: Records, tmp_path: Path) -> None:
    assert records.load(System("engine", "engine", iterations=4, length_beam=5)) is None
    assert records.load(System("cmlm", "cmlm", iterations=4, length_beam=5, rerank=True)) is None  # the same label
    assert Records(tmp_path, {"beam": 6}).load(SYSTEM) is None


@pytest.mark.parametrize("name", ["outputs/cmlm.i4.k5.txt", "systems/cmlm.i4.k5.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damage_means_measuring_again(records: Records, tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:-4])
    assert records.load(SYSTEM) is None
