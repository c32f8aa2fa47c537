"""The queue and its thread, with a job that is not a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import wait as wait_for

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_fast.inference.serving.batching import Closed, QueueFull, Worker
from engine_fast.inference.serving.limits import Limits


class Echo:
    """Answers `settings:TEXT`. While `gate` is shut a batch does not end; a text of "bad" fails its batch."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun = threading.Event()
        self.batches: list[tuple[str, list[str]]] = []

    def prepare(self, texts: Sequence[str]) -> list[str]:
        return list(texts)

    def width(self, settings: str) -> int:
        return 2 if settings == "wide" else 1

    def run(self, settings: str, prepared: Sequence[str]) -> list[str]:
        self.batches.append((settings, list(prepared)))
        self.begun.set()
        assert self.gate.wait(30)
        if "bad" in prepared:
            raise ValueError("bad")
        return [f"{settings}:{text.upper()}" for text in prepared]


@pytest.fixture
def job() -> Iterator[Echo]:
    job = Echo()
    yield job
    job.gate.set()


def busy(job: Echo, **limits: int) -> Worker:
    """A worker whose thread is held by a first batch, so that whatever comes next waits."""
    worker = Worker("echo", job, Limits(max_sentences=1, gather_seconds=0, **limits))
    worker.submit(["x"], "first")
    assert job.begun.wait(30)
    return worker


def test_what_waits_together_runs_together_and_everybody_gets_their_own(job: Echo) -> None:
    worker = busy(job)
    tickets = [worker.submit([f"a{i}", f"bb{i}"], "s") for i in range(20)]
    assert worker.num_waiting == 40
    job.gate.set()
    assert [ticket.future.result(30) for ticket in tickets] == [[f"s:A{i}", f"s:BB{i}"] for i in range(20)]
    assert [len(texts) for _, texts in job.batches] == [1, 40]
    assert worker.num_waiting == 0


def test_an_idle_worker_waits_for_company() -> None:
    job = Echo()
    job.gate.set()
    worker = Worker("echo", job, Limits(gather_seconds=0.5))
    wait_for([worker.submit([str(i)], "s").future for i in range(5)], 30)
    assert [len(texts) for _, texts in job.batches] == [5]


def test_batches_hold_equal_settings_in_the_order_of_the_oldest(job: Echo) -> None:
    worker = busy(job)
    tickets = [worker.submit([text], key) for text, key in (("a", "s"), ("b", "t"), ("c", "s"), ("d", "u"), ("e", "t"))]
    job.gate.set()
    wait_for([ticket.future for ticket in tickets], 30)
    assert job.batches[1:] == [("s", ["a", "c"]), ("t", ["b", "e"]), ("u", ["d"])]


def test_a_batch_keeps_to_its_tokens_and_the_oldest_is_in_it(job: Echo) -> None:
    worker = busy(job, batch_tokens=12)
    short, wide = (
        [worker.submit(["a" * 2], "s") for _ in range(9)],
        [worker.submit(["b" * 3], "wide") for _ in range(3)],
    )
    long = worker.submit(["c" * 20], "s")
    job.gate.set()
    wait_for([ticket.future for ticket in [*short, *wide, long]], 30)
    sizes = [[len(text) for text in texts] for _, texts in job.batches[1:]]
    assert sizes == [[2] * 6, [2] * 3, [3, 3], [3], [20]]


def test_nobody_is_overtaken_by_many(job: Echo) -> None:
    """However well the lengths of later ones fit together."""
    worker = busy(job, batch_tokens=40)
    texts = [f"{i:03}" + "x" * (i * 7 % 10) for i in range(200)]
    tickets = [worker.submit([text], "s") for text in texts]
    job.gate.set()
    wait_for([ticket.future for ticket in tickets], 60)
    order = [int(text[:3]) for _, batch in job.batches[1:] for text in batch]
    assert sorted(order) == list(range(200))
    assert max(place - number for place, number in enumerate(order)) <= 3 * 40 // 3  # batches of the shortest
    assert max(number - place for place, number in enumerate(order)) <= 2 * 40 // 3


def test_a_full_queue_refuses_and_an_abandoned_request_is_dropped(job: Echo) -> None:
    worker = busy(job, max_queue=3)
    kept = worker.submit(["a"], "s")
    given_up = worker.submit(["b", "c"], "s")
    with pytest.raises(QueueFull):
        worker.submit(["d"], "s")
    given_up.cancel()
    job.gate.set()
    assert kept.future.result(30) == ["s:A"]
    assert job.batches[1:] == [("s", ["a"])]
    with pytest.raises(CancelledError):
        given_up.future.result(30)
    assert worker.submit(["d", "e", "f"], "s").future.result(30) == ["s:D", "s:E", "s:F"]


def test_a_sentence_that_fails_takes_no_other_with_it(job: Echo) -> None:
    worker = busy(job)
    tickets = [worker.submit(texts, "s") for texts in (["a"], ["b", "bad"], ["c"])]
    job.gate.set()
    assert tickets[0].future.result(30) == ["s:A"]
    assert tickets[2].future.result(30) == ["s:C"]
    with pytest.raises(ValueError, match="bad"):
        tickets[1].future.result(30)
    assert worker.alive
    assert worker.submit(["d"], "s").future.result(30) == ["s:D"]


def test_a_job_that_cannot_prepare_fails_that_request_only(job: Echo) -> None:
    job.gate.set()
    worker = Worker("echo", job, Limits(gather_seconds=0.2))
    prepare = job.prepare
    job.prepare = lambda texts: [1 / 0 if text == "odd" else prepare([text])[0] for text in texts]
    tickets = [worker.submit(texts, "s") for texts in (["a"], ["b", "odd"], ["c"])]
    with pytest.raises(ZeroDivisionError):
        tickets[1].future.result(30)
    assert [tickets[i].future.result(30) for i in (0, 2)] == [["s:A"], ["s:C"]]
    assert worker.close(30)
    assert worker.num_waiting == 0


def test_closing_works_off_what_waits_and_takes_nothing_new(job: Echo) -> None:
    worker = busy(job)
    tickets = [worker.submit([str(i)], str(i)) for i in range(3)]
    threading.Timer(0.1, job.gate.set).start()
    assert worker.close(30)
    assert [ticket.future.result(0) for ticket in tickets] == [[f"{i}:{i}"] for i in range(3)]
    with pytest.raises(Closed):
        worker.submit(["a"], "s")


def test_closing_gives_up_after_its_time(job: Echo) -> None:
    worker = busy(job)
    left = worker.submit(["a"], "s")
    assert not worker.close(0.05)
    job.gate.set()
    with pytest.raises(Closed):
        left.future.result(30)
    assert len(job.batches) == 1


def test_no_sentences_are_answered_at_once(job: Echo) -> None:
    assert busy(job).submit([], "s").future.result(0) == []


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.sampled_from(["s", "t", "wide"]), st.lists(st.text("abc", min_size=1, max_size=9), max_size=4)),
        max_size=25,
    ),
    st.integers(1, 30),
)
def test_everybody_gets_their_own_in_order(requests: list[tuple[str, list[str]]], batch_tokens: int) -> None:
    job = Echo()
    worker = busy(job, batch_tokens=batch_tokens)
    tickets = [worker.submit(texts, key) for key, texts in requests]
    job.gate.set()
    for ticket, (key, texts) in zip(tickets, requests, strict=True):
        assert ticket.future.result(30) == [f"{key}:{text.upper()}" for text in texts]
    for key, texts in job.batches[1:]:
        assert len(texts) == 1 or job.width(key) * len(texts) * max(map(len, texts)) <= batch_tokens
    assert worker.close(30)
