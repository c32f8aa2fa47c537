"""What the service does not take, and odd text that it does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from engine_fast.errors import ConfigError
from engine_fast.inference.serving import Limits
from engine_fast.inference.serving.systems import System
from tests.serving.tiny import SCOPE

Start = Callable[..., TestClient]


def test_limits_are_kept(start: Start) -> None:
    client = start(max_sentences=3, max_characters=10, max_body=500)

    def refusal(**asked: Any) -> tuple[int, str]:
        answer = client.post("/translate", json=asked)
        return answer.status_code, answer.json()["detail"][0]["msg"]

    assert refusal(sentences=["mon"] * 4) == (422, "4 sentences, expected at most 3")
    assert refusal(text="\n" * 3) == (422, "4 sentences, expected at most 3")
    assert refusal(sentences=["mon", "x" * 11])[1].startswith("sentence 2 has 11 characters, expected at most 10")
    for name in ("iterations", "length_beam", "beam"):
        assert refusal(text="mon", **{name: 21}) == (422, "Input should be less than or equal to 20")
    assert client.post("/explain", json={"text": "x" * 11}).status_code == 422
    assert client.post("/explain", json={"text": "mon", "iterations": 21}).status_code == 422
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    stated = schemas["TranslateRequest"]["properties"]["sentences"]
    assert (stated["maxItems"], stated["items"]["maxLength"]) == (3, 10)
    assert schemas["ExplainRequest"]["properties"]["text"]["maxLength"] == 10
    too_large = client.post("/translate", json={"text": "x" * 600})
    assert (too_large.status_code, too_large.headers["connection"]) == (413, "close")
    chunks = client.post(
        "/translate", content=(b"x" * 100 for _ in range(9)), headers={"content-type": "application/json"}
    )
    assert (chunks.status_code, chunks.json()["detail"]) == (413, too_large.json()["detail"])
    assert client.post("/translate", json={"text": "mon"}).status_code == 200


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 422),
        (b"{", 422),
        (b"nothing", 422),
        (b"[]", 422),
        (b"{}", 422),
        (b'{"text": "mon", "sentences": ["mon"]}', 422),
        (b'{"text": 1}', 422),
        (b'{"text": null}', 422),
        (b'{"sentences": "mon"}', 422),
        (b'{"sentences": [null]}', 422),
        (b'{"text": "mon", "model": "other"}', 422),
        (b'{"text": "mon", "iterations": 0}', 422),
        (b'{"text": "mon", "iterations": "2"}', 422),
        (b'{"text": "mon", "beam": NaN}', 422),
        (b'{"text": "mon", "beam": 1e400}', 422),
        (b'{"text": "mon", "rerank": 1}', 422),
        (b'{"text": "mon", "bean": 1}', 422),
        (b'{"text": "mon", "\\ud800": 1}', 422),
        (b'{"text": "\xff\xfe"}', 400),
        (b'{"text": ' + b"[" * 100_000, 400),
        (b'{"text": "mon", "beam": ' + b"9" * 10_000 + b"}", 400),
        (b'{"text": "mon"}', 200),
    ],
)
def test_malformed_bodies_are_refused(start: Start, content: bytes, status: int) -> None:
    answer = start().post("/translate", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["detail" if status != 200 else "translations"]


def test_what_is_not_there_is_told(start: Start, systems: dict[str, System]) -> None:
    client = start(systems={"engine": systems["engine"]})
    answer = client.post("/translate", json={"text": "mon", "model": "cmlm"})
    assert (answer.status_code, answer.json()["detail"]) == (404, "model 'cmlm' is not served here; engine are")
    assert client.get("/translate").status_code == 405
    assert client.post("/health").status_code == 405
    assert client.get("/docs").status_code == 404
    assert client.get("/no/../such%7F").status_code == 404
    assert 'path="other",status="404"' in client.get("/metrics").text


@pytest.mark.parametrize(
    "odd",
    [
        "\x00",
        "mon\x00tue",
        "\x1b[31mmon\x07",
        "mon\u2028tue",
        "mon\x85tue",
        "\ud800",
        "mon \udfff tue",
        "\U0010ffff",
        "\u202emon",
        "a\u0301" * 50,
    ],
)
def test_odd_text_is_translated_as_one_line(start: Start, odd: str) -> None:
    body = json.dumps({"sentences": ["mon", odd, "tue"]}).encode()  # with its half surrogates spelled as JSON can
    answer = start().post("/translate", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200
    first, second, third = answer.json()["translations"]
    assert "\n" not in second
    assert [first, third] == start().post("/translate", json={"text": "mon\ntue"}).json()["translations"]


def test_control_characters_are_spaces(start: Start) -> None:
    client = start()
    odd, even = (client.post("/translate", json={"text": text}).json() for text in ("mon\x00tue\x1fwed", "mon tue wed"))
    assert odd["translations"] == even["translations"]


def test_a_body_that_does_not_come_is_not_waited_for(start: Start) -> None:
    client = start(body_seconds=0.05)
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(30)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(client.app(SCOPE, receive, send))
    assert sent[0]["status"] == 408


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_queue = 5"):
        Limits(max_queue=5)
    with pytest.raises(ConfigError, match="timeout_seconds = 0"):
        Limits(timeout_seconds=0)
