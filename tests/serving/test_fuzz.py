"""Whatever is sent: an answer that the schema documents, no failure, and a service that still translates."""

from __future__ import annotations

import json
from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from engine_fast.inference.serving import Limits, create_app
from tests.serving.tiny import plain

LIMITS = Limits(max_sentences=20, max_characters=200, max_body=20_000, gather_seconds=0)
QUICK = settings(
    max_examples=40, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate], database=None
)


@pytest.fixture(scope="module")
def client(systems: dict[str, Any]) -> Any:
    with TestClient(create_app(systems, LIMITS)) as client:
        yield client


@pytest.fixture(scope="module")
def documented(systems: dict[str, Any]) -> Any:
    """What /openapi.json says, of an application whose life schemathesis looks after."""
    # Limits of lines and their characters in `text` are not in the schema: the usual ones are out of reach here.
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(systems, Limits(gather_seconds=0)))


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/translate"), ("POST", "/explain"), ("GET", "/health"), ("GET", "/metrics"), ("GET", "/")],
)
def test_every_answer_is_a_documented_one(documented: Any, method: str, path: str, mode: GenerationMode) -> None:
    """All of schemathesis' checks: status and body as documented, valid requests taken, invalid ones refused."""
    if method == "GET" and mode is GenerationMode.NEGATIVE:
        return  # there is nothing in the request to get wrong
    seen = set()

    @QUICK
    @given(documented[path][method].as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        answer = case.call_and_validate()
        seen.add(answer.status_code)

    check()
    if mode is GenerationMode.POSITIVE:
        assert 200 in seen
    assert seen <= {200, 404, 422} | ({200} if mode is GenerationMode.POSITIVE else {400})


# Any JSON, biased to the fields that there are.
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
TEXTS = st.text(st.characters(), max_size=40)  # half surrogate pairs included
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "sentences": st.lists(TEXTS, max_size=22) | ANYTHING,
        "text": TEXTS | ANYTHING,
        "model": st.sampled_from(["engine", "cmlm", "teacher", "other"]) | ANYTHING,
        "iterations": st.integers(-1, 25) | ANYTHING,
        "length_beam": st.integers(-1, 25) | ANYTHING,
        "beam": st.integers(-1, 25) | ANYTHING,
        "rerank": st.booleans() | ANYTHING,
        "details": st.booleans() | ANYTHING,
    },
)


@QUICK
@given(st.sampled_from(["/translate", "/explain"]), BODIES | ANYTHING)
def test_any_json_is_answered_or_refused(client: TestClient, path: str, body: Any) -> None:
    content = json.dumps(body).encode()
    answer = client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 413, 422)
    if answer.status_code == 200 and path == "/translate":
        lines = body["sentences"] if "sentences" in body else body["text"].split("\n")
        translations = answer.json()["translations"]
        assert len(translations) == len(lines)
        assert all("\n" not in text for text in translations)


@QUICK
@given(
    st.sampled_from(["/translate", "/explain"]),
    st.binary(max_size=200),
    st.sampled_from(["application/json", "text/plain", "a/b; charset=utf-7", ""]),
)
def test_any_bytes_are_refused(client: TestClient, path: str, content: bytes, kind: str) -> None:
    answer = client.post(path, content=content, headers={"content-type": kind})
    assert answer.status_code in ((400, 422) if kind == "application/json" else (415,))
    assert answer.json()["detail"]


@pytest.mark.filterwarnings("ignore:of \\d+ lines:UserWarning")
@QUICK
@given(st.lists(TEXTS, min_size=1, max_size=12))
def test_order_is_kept_whatever_the_sentences(client: TestClient, systems: dict[str, Any], lines: list[str]) -> None:
    content = json.dumps({"sentences": lines}).encode()
    answer = client.post("/translate", content=content, headers={"content-type": "application/json"})
    assert answer.json()["translations"] == plain(systems["engine"], lines)
