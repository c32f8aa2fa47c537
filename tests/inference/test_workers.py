"""Several processes give what one gives, in order; one that dies is an error that names it."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine_fast.data.text import decode_lines
from engine_fast.errors import CheckpointError, ConfigError, DataError, DistributedError
from engine_fast.inference import workers
from engine_fast.inference.load import load
from engine_fast.inference.workers import Workers, use_threads

SETTINGS = {"length_beam": 2, "iterations": 2, "n_best": 2, "window": 4, "too_long": "refuse"}
LINES = ["mon tue", "", "wed", "thu fri sat", "sun\u2028mon", "unknown words", "tue"] * 5


@pytest.fixture(scope="module")
def pool(student: Path) -> Iterator[Workers]:
    with Workers(student, num_workers=2, threads=1, **SETTINGS) as started:
        yield started


def test_the_text_the_hypotheses_and_the_report_are_those_of_one_process(pool: Workers, student: Path) -> None:
    alone = load(student, **SETTINGS)
    with pytest.warns(UserWarning, match=r"of 35 lines.*pieces are unknown") as told:
        assert list(pool.translate_n_best(LINES)) == list(alone.translate_n_best(LINES))
    assert len({str(warning.message) for warning in told}) == 1
    assert pool.report == alone.report
    assert list(pool.stream([])) == []
    assert pool.report.num_lines == 0
    lengths = [3 + place % 4 for place in range(9)]
    found, expected = (list(one.stream(["mon tue"] * 9, lengths=lengths)) for one in (pool, alone))
    assert found == expected
    assert len(set(found)) > 1


def test_few_windows_are_held(pool: Workers) -> None:
    held = most = 0

    def lines() -> Iterator[str]:
        nonlocal held, most
        for number in range(200):
            held += 1
            most = max(most, held)
            yield ["mon", "tue wed", ""][number % 3]

    for _ in pool.stream(lines()):
        held -= 1
    assert held == 0
    assert most <= 4 * 4 + 4


def test_an_error_of_a_line_comes_when_its_turn_has_come(pool: Workers) -> None:
    for _ in range(2):  # the workers go on afterwards
        out = pool.stream(["mon"] * 9 + ["mon " * 30] + ["mon"] * 30, first_line=101)
        before = []
        with pytest.raises(DataError, match="line 110: 31 tokens"):
            before.extend(out)
    stream = decode_lines([b"mon\n"] * 5 + [b"\xff\n"] + [b"mon\n"] * 5, "standard input")
    out = pool.stream(stream)
    assert all(next(out) for _ in range(4))
    with pytest.raises(DataError, match="standard input: line 6 is not UTF-8"):
        next(out)


def test_a_stream_may_be_left_early(pool: Workers) -> None:
    out = pool.stream(["mon"] * 40)
    next(out)
    out.close()
    assert list(pool.stream(["tue", "wed"])) == list(pool.stream(["tue", "wed"]))


def test_warnings_come_once_and_a_worker_that_dies_is_named(teacher: Path) -> None:
    with pytest.warns(UserWarning, match="iterations, teacher: without effect") as told:
        pool = Workers(teacher, num_workers=2, threads=1, teacher=teacher, iterations=2, window=2)
    assert len(told) == 1
    with pool:
        os.kill(pool.pids[1], signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(DistributedError, match=r"worker 2 of 2 was killed by SIGKILL while translating lines"):
                list(pool.stream(["mon"] * 20))


def test_what_load_refuses_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a model directory"):
        Workers(tmp_path, num_workers=1)


def test_wrong_numbers_and_gpus_are_refused(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="workers = 0, expected at least 1"):
        Workers(student, num_workers=0)
    with pytest.raises(ConfigError, match="threads = 0, expected at least 1"):
        use_threads(0)
    monkeypatch.setattr(workers, "pick_device", lambda _: torch.device("cuda", 0))
    with pytest.raises(ConfigError, match=r"workers = 2, expected device cpu.*engine-fast launch"):
        Workers(student, num_workers=2)


def test_each_process_has_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        use_threads(None, 4)
        assert torch.get_num_threads() == before
        monkeypatch.delenv("OMP_NUM_THREADS")
        use_threads(None, 4)
        assert torch.get_num_threads() == 2
        use_threads(3, 4)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use_threads(None, 1)
