"""How a translation came about, as the service tells it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient

from engine_fast.config import LSTMArchitecture, TaggerArchitecture
from engine_fast.decoding import Translator
from engine_fast.energies import discrete_energy
from engine_fast.inference.serving.systems import System
from engine_fast.models import LoadedModel
from engine_fast.models.lstm import Seq2Seq
from engine_fast.models.tagger import Tagger
from tests.decoding.tiny import make_vocabulary, pad
from tests.serving.tiny import plain

Start = Callable[..., TestClient]


def test_a_student_is_explained(start: Start, systems: dict[str, System]) -> None:
    asked = {"text": "mon bla wed", "iterations": 3, "length_beam": 4}
    content = start().post("/explain", json=asked).json()
    assert content["translation"] == plain(systems["engine"], ["mon bla wed"], iterations=3, length_beam=4)[0]
    assert [token["text"] for token in content["source"]] == ["mon", "<unk>", "wed"]
    assert (content["num_unknown"], content["truncated"]) == (1, False)
    (chosen,) = [each for each in content["candidates"] if each["chosen"]]
    assert chosen["score"] == max(each["score"] for each in content["candidates"])
    assert len({each["tokens"] for each in content["candidates"]}) == 4
    assert 0 < sum(each["probability"] for each in content["candidates"]) <= 1
    probabilities = [each["probability"] for each in content["candidates"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert len(content["passes"]) == 3
    assert all(token["predicted"] for token in content["passes"][0])
    assert 1 <= sum(token["predicted"] for token in content["passes"][1]) < chosen["tokens"] or chosen["tokens"] == 1
    last = content["passes"][-1]
    assert " ".join(token["text"] for token in last) == content["translation"] == chosen["translation"]
    logs = [math.log(token["probability"]) for token in last]
    assert sum(logs) / len(logs) == pytest.approx(chosen["score"])
    for before, token in zip([None, *last], last, strict=False):
        assert token["repeated"] == (before is not None and before["text"] == token["text"])
    vocabulary, teacher = systems["engine"].loaded.target_vocabulary, systems["engine"].teacher
    source, target = (pad([[*vocabulary.encode(text), 2]]) for text in ("mon bla wed", content["translation"]))
    if "<unk>" not in content["translation"]:
        energy = discrete_energy(teacher, source, target).item()
        assert content["energy"] == pytest.approx(energy)
        assert chosen["energy"] == pytest.approx(energy)
    assert 0 < sum(token["energy"] for token in last) < content["energy"]


def test_reranking_chooses_by_energy_in_the_explanation_too(start: Start, systems: dict[str, System]) -> None:
    client = start()
    for line in ["sun sat", "fri", "thu thu mon sun tue"]:
        content = client.post("/explain", json={"text": line, "length_beam": 5, "rerank": True}).json()
        (chosen,) = [each for each in content["candidates"] if each["chosen"]]
        assert chosen["energy"] / (chosen["tokens"] + 1) == pytest.approx(
            min(each["energy"] / (each["tokens"] + 1) for each in content["candidates"])
        )
        assert content["translation"] == plain(systems["engine"], [line], length_beam=5, rerank=True)[0]
        assert content["energy"] == pytest.approx(chosen["energy"])


def test_a_teacher_is_explained(start: Start, systems: dict[str, System]) -> None:
    content = start().post("/explain", json={"text": "mon tue", "model": "teacher", "beam": 3}).json()
    assert content["translation"] == plain(systems["teacher"], ["mon tue"], beam=3)[0]
    assert content["candidates"] == []
    (tokens,) = content["passes"]
    for token in tokens:
        assert token["energy"] == pytest.approx(-math.log(token["probability"]))
    assert content["energy"] > sum(token["energy"] for token in tokens)


def test_nothing_is_explained_too(start: Start) -> None:
    content = start().post("/explain", json={"text": " \t "}).json()
    assert (content["translation"], content["passes"], content["candidates"]) == ("", [[]], [])


def test_an_lstm_teacher_and_a_tagger_are_explained_too(start: Start) -> None:
    vocabulary = make_vocabulary()
    teacher = Seq2Seq(LSTMArchitecture(embedding_width=8, encoder_width=8, decoder_width=8, max_positions=24), 12, 12)
    student = Tagger(TaggerArchitecture(embedding_width=8, width=8, max_positions=24), 12, 12)
    systems = {
        name: System(name, Translator(LoadedModel(model.eval(), vocabulary, vocabulary, {})), teacher)
        for name, model in (("engine", student), ("teacher", teacher))
    }
    client = start(systems=systems)
    content = client.post("/explain", json={"text": "mon tue", "iterations": 4}).json()
    assert len(content["passes"]) == 1
    assert content["energy"] > 0
    told = client.post("/translate", json={"text": "mon tue", "iterations": 4}).json()
    assert (told["warnings"], told["translations"]) == (["iterations: without effect"], [content["translation"]])
    assert client.post("/explain", json={"text": "mon tue", "model": "teacher"}).json()["energy"] > 0
