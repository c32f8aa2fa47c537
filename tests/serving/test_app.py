"""The service over HTTP: what it answers, what it refuses, and what becomes of those who leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from engine_fast.decoding import Translator
from engine_fast.errors import CheckpointError, VocabularyError
from engine_fast.inference.serving import load_systems
from engine_fast.inference.serving.systems import System
from engine_fast.models import save_model
from tests.decoding.tiny import WORDS, DictionaryVocabulary, make_student, make_teacher, save_tiny
from tests.serving.tiny import SCOPE, Held, plain

Start = Callable[..., TestClient]
LINES = ["mon tue wed", "", "sun sat", "fri", "thu thu mon sun tue"]


@pytest.fixture
def held(systems: dict[str, System]) -> Held:
    return Held(systems["engine"])


@pytest.mark.parametrize("model", ["engine", "cmlm", "teacher", None])
def test_translations_are_the_models_own_in_order(start: Start, systems: dict[str, System], model: str | None) -> None:
    answer = start().post("/translate", json={"sentences": LINES} | ({"model": model} if model else {}))
    assert answer.status_code == 200
    content = answer.json()
    assert content["model"] == (model or "engine")
    assert content["translations"] == plain(systems[model or "engine"], LINES)
    assert content["translations"][1] == ""
    assert content["warnings"] == []
    assert "details" not in content


def test_text_is_lines_and_settings_reach_the_model(start: Start, systems: dict[str, System]) -> None:
    client = start()
    text = "\n".join(LINES)
    for settings in ({"iterations": 4}, {"length_beam": 1}, {"length_beam": 4, "rerank": True}):
        content = client.post("/translate", json={"text": text, **settings}).json()
        assert content["translations"] == plain(systems["engine"], LINES, **settings)
    assert client.post("/translate", json={"text": ""}).json()["translations"] == [""]
    assert client.post("/translate", json={"sentences": []}).json()["translations"] == []


def test_details_tell_tokens_scores_and_what_was_not_understood(start: Start) -> None:
    long = " ".join(["mon"] * 40)
    client = start()
    content = client.post("/translate", json={"sentences": ["mon bla tue", long], "details": True}).json()
    first, second = content["details"]
    assert first["tokens"][-1] == "</s>"
    assert first["score"] == pytest.approx(first["log_probability"] / (len(first["tokens"]) - 1))
    assert (first["num_source_tokens"], first["num_unknown"], first["truncated"]) == (4, 1, False)
    assert (second["num_source_tokens"], second["truncated"]) == (24, True)
    assert content["warnings"] == ["1 of 2 sentences, the first number 2, were too long and were cut"]
    content = client.post("/translate", json={"sentences": ["mon bla", "bla bla"]}).json()
    assert content["warnings"] == [
        "75% of the pieces are unknown to the vocabulary; is this the language of the model?"
    ]


def test_what_has_no_effect_is_told(start: Start) -> None:
    client = start()
    asked = {"text": "mon", "iterations": 2, "beam": 3, "length_beam": 2, "rerank": True}
    told = client.post("/translate", json=asked).json()["warnings"]
    assert told == ["beam: without effect"]
    told = client.post("/translate", json=asked | {"model": "teacher"}).json()["warnings"]
    assert told == [f"{name}: without effect" for name in ("iterations", "length_beam", "rerank")]


def test_reranking_needs_a_teacher(start: Start, systems: dict[str, System]) -> None:
    alone = System("engine", systems["engine"].translator, None)
    client = start(systems={"engine": alone})
    told = client.post("/translate", json={"text": "mon", "rerank": True}).json()
    assert told["warnings"] == ["rerank: without effect"]
    assert client.get("/health").json()["reranks"] is False
    assert client.post("/explain", json={"text": "mon"}).json()["energy"] is None


def test_requests_that_come_together_share_a_batch(start: Start, held: Held) -> None:
    client = start(systems={"engine": held})
    with ThreadPoolExecutor(17) as pool:
        with held.holding():
            first = pool.submit(client.post, "/translate", json={"text": "mon"})
            assert held.begun.wait(30)
            others = [
                pool.submit(client.post, "/translate", json={"sentences": [WORDS[i % 7], "sun"]}) for i in range(16)
            ]
            while client.app.state.service._workers["engine"].num_waiting < 32:
                pass
        answers = [other.result().json()["translations"] for other in others]
        assert first.result().status_code == 200
    assert held.batches == [1, 32]
    assert answers == [plain(held._system, [WORDS[i % 7], "sun"]) for i in range(16)]
    metrics = client.get("/metrics").text
    assert 'engine_fast_batch_sentences_sum{model="engine"} 34.0' in metrics  # the warm-up is one


def test_a_full_queue_says_when_to_come_back(start: Start, held: Held) -> None:
    client = start(systems={"engine": held}, max_queue=4, max_sentences=4)
    with ThreadPoolExecutor(2) as pool, held.holding():
        pool.submit(client.post, "/translate", json={"text": "mon"})
        assert held.begun.wait(30)
        waiting = pool.submit(client.post, "/translate", json={"sentences": ["mon", "tue", "wed"]})
        while client.app.state.service._workers["engine"].num_waiting < 3:
            pass
        answer = client.post("/translate", json={"sentences": ["mon", "tue"]})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        held.gate.set()
        assert waiting.result().status_code == 200
    assert client.post("/translate", json={"sentences": ["mon", "tue"]}).status_code == 200


def test_a_request_that_takes_too_long_is_given_up_and_dropped(start: Start, held: Held) -> None:
    client = start(systems={"engine": held}, timeout_seconds=0.05)
    with ThreadPoolExecutor(2) as pool, held.holding():
        running = pool.submit(client.post, "/translate", json={"text": "mon"})
        assert held.begun.wait(30)
        waiting = pool.submit(client.post, "/translate", json={"text": "tue\nwed"})
        assert [running.result().status_code, waiting.result().status_code] == [504, 504]
    held.gate.set()
    while client.app.state.service._workers["engine"].num_waiting:
        pass
    assert held.batches == [1]
    assert 'engine_fast_dropped_requests_total{reason="timeout"} 2.0' in client.get("/metrics").text


def test_what_a_client_that_left_was_waiting_for_is_dropped(start: Start, held: Held) -> None:
    client = start(systems={"engine": held})
    body = json.dumps({"text": "tue\nwed"}).encode()
    sent: list[Any] = []

    async def leave() -> None:
        messages = [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]

        async def receive() -> Any:
            return messages.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        await client.app(SCOPE, receive, send)

    with ThreadPoolExecutor(1) as pool, held.holding():
        running = pool.submit(client.post, "/translate", json={"text": "mon"})
        assert held.begun.wait(30)
        asyncio.run(leave())
        assert sent[0]["status"] == 499
        held.gate.set()
        assert running.result().status_code == 200
    assert client.post("/translate", json={"text": "sun"}).status_code == 200
    assert held.batches == [1, 1]
    assert 'engine_fast_dropped_requests_total{reason="disconnected"} 1.0' in client.get("/metrics").text


def test_a_failure_is_told_without_its_inside_and_the_service_lives(start: Start, held: Held) -> None:
    client = start(systems={"engine": held})
    held.error = MemoryError("at 0x7f")
    answer = client.post("/translate", json={"text": "mon"})
    assert answer.status_code == 500
    assert answer.json() == {"detail": "a sentence could not be translated (MemoryError)"}
    held.error = None
    assert client.post("/translate", json={"text": "mon"}).status_code == 200


def test_health_says_what_is_served(start: Start) -> None:
    answer = start().get("/health")
    content = answer.json()
    assert (answer.status_code, content["status"]) == (200, "ready")
    assert [(each["name"], each["student"], each["length_beam"]) for each in content["models"]] == [
        ("engine", True, 3), ("teacher", False, 3), ("cmlm", True, 5),
    ]  # fmt: skip
    assert content["versions"]["torch"] == torch.__version__


def test_a_dead_thread_and_an_ending_service_are_not_healthy(start: Start) -> None:
    client = start()
    service = client.app.state.service
    service._workers["cmlm"].close(30)
    answer = client.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "failed")
    assert client.post("/translate", json={"text": "mon", "model": "cmlm"}).status_code == 503
    assert service.stop()
    assert client.get("/health").json()["status"] == "stopping"
    answer = client.post("/translate", json={"text": "mon"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_two_services_in_one_process_count_by_themselves(start: Start) -> None:
    one, other = start(), start()
    for _ in range(3):
        one.post("/translate", json={"text": "mon tue"})
    assert 'engine_fast_requests_total{path="/translate",status="200"} 3.0' in one.get("/metrics").text
    assert 'engine_fast_tokens_total{model="engine",side="source"} 9.0' in one.get("/metrics").text
    assert 'path="/translate"' not in other.get("/metrics").text
    assert 'engine_fast_queue_sentences{model="cmlm"} 0.0' in other.get("/metrics").text


def test_the_page_allows_itself_and_nothing_else(start: Start) -> None:
    client = start()
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in policy
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "src=", "//cdn", "https:"):
        assert word not in answer.text
    for path in ("/", "/health", "/metrics", "/nothing"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]


def test_systems_are_loaded_by_name_and_must_fit_together(tmp_path: Any) -> None:
    teacher = save_tiny(tmp_path / "teacher", make_teacher())
    student = save_tiny(tmp_path / "student", make_student())
    loaded = load_systems(student, teacher=teacher, cmlm=student)
    assert list(loaded) == ["engine", "teacher", "cmlm"]
    assert loaded["engine"].teacher is loaded["teacher"].loaded.model
    assert list(load_systems(teacher)) == ["teacher"]
    assert isinstance(loaded["cmlm"].translator, Translator)
    for arguments in ({"teacher": student}, {"cmlm": teacher}):
        with pytest.raises(CheckpointError, match="Give the other directory"):
            load_systems(student, **arguments)
    with pytest.raises(CheckpointError, match="is a teacher already"):
        load_systems(teacher, teacher=teacher)
    other = DictionaryVocabulary(WORDS[::-1])
    save_model(tmp_path / "other", make_teacher().float(), other, other)
    with pytest.raises(VocabularyError, match="the teacher's source vocabulary"):
        load_systems(student, teacher=tmp_path / "other")
