"""Every system of a split, by one rank or several: the same results, resumable, and a failure that reaches all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_fast.config import RunConfig
from engine_fast.data.prepare import Prepared, prepare
from engine_fast.distributed import World
from engine_fast.errors import DistributedError, PeerError
from engine_fast.evaluation import measure
from engine_fast.evaluation.measure import evaluate_systems
from engine_fast.models import CMLM, Transformer, save_model
from tests.decoding.tiny import widen
from tests.distributed.threads import run_ranks
from tests.recipes.micro import micro_config

TIMES = {"sentences_per_second", "latency_ms", "num_ranks"}
LABELS = [
    "teacher-greedy", "teacher-beam", "cmlm.i1.k5", "cmlm.i1.k1", "cmlm-rerank.i1.k5", "cmlm-oracle.i1",
    "engine.i1.k3", "engine.i1.k1", "engine-rerank.i1.k3", "engine-oracle.i1",
]  # fmt: skip


@dataclass
class Trained:
    """A prepared corpus, and random models as a run has them; counts what is decoded and how long ranks wait."""

    config: RunConfig
    base: Path

    def on(self, size: int, out: Path, said: list[str] | None = None) -> list[Any]:
        """What evaluate_systems returned or raised, rank by rank."""

        def body(world: World) -> Any:
            return evaluate_systems(
                self.config, Prepared.open(self.base / "data"), out, world=world,
                say=[].append if said is None else said.append,
                teacher_dir=self.base / "teacher", cmlm_dir=self.base / "cmlm", engine_dir=self.base / "engine",
            )  # fmt: skip

        return run_ranks(size, body)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    base = tmp_path_factory.mktemp("trained")
    config = micro_config(
        evaluate={"beam": 2, "iterations": [1], "latency_sentences": 2, "bootstrap_samples": 20, "max_tokens": 60}
    )
    prepare(config.data, base / "data", seed=config.seed)
    vocabulary = Prepared.open(base / "data").source_vocabulary
    for seed, (role, kind) in enumerate({"teacher": Transformer, "cmlm": CMLM, "engine": CMLM}.items()):
        model = kind(config.teacher.architecture, len(vocabulary), len(vocabulary))
        widen(model, seed)
        save_model(base / role / "model", model, vocabulary, vocabulary)
    return Trained(config, base)


@pytest.fixture(scope="module")
def alone(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Results and outputs of one rank."""
    out = tmp_path_factory.mktemp("alone")
    [results] = trained.on(1, out)
    return untimed(results), outputs(out)


def untimed(results: dict[str, Any]) -> dict[str, Any]:
    assert [row["label"] for row in results["systems"]] == LABELS
    assert all(row["sentences_per_second"] > 0 and row["latency_ms"] > 0 for row in results["systems"])
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in results["systems"]]
    return {**results, "systems": rows}


def outputs(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "outputs").iterdir()}


def failing(function: Callable[..., Any], when: Callable[..., bool], error: BaseException) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            raise error
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_find_what_one_finds(trained: Trained, alone: Any, tmp_path: Path, size: int) -> None:
    said: list[str] = []
    results, *others = trained.on(size, tmp_path, said)
    assert others == [None] * (size - 1)
    assert {row["num_ranks"] for row in results["systems"]} == {size}
    assert (untimed(results), outputs(tmp_path)) == alone
    assert [line.split()[0] for line in said] == LABELS  # once each, by rank 0


def test_references_are_scored_once_for_several_evaluations(
    trained: Trained, alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And systems that nobody asked for need no model."""
    scored: list[str] = []
    share = measure.score_share

    def counting(*args: Any, label: str, **more: Any) -> Any:
        scored.append(label)
        return share(*args, label=label, **more)

    monkeypatch.setattr(measure, "score_share", counting)
    known: dict[str, float] = {}
    evaluate = trained.config.evaluate.model_copy(update={"systems": ["engine-oracle"]})
    for name in ("first", "second"):
        results = evaluate_systems(
            trained.config.model_copy(update={"evaluate": evaluate}), Prepared.open(trained.base / "data"),
            tmp_path / name, world=World(0, 1, torch.device("cpu")), say=[].append, known=known,
            teacher_dir=trained.base / "teacher", cmlm_dir=None, engine_dir=trained.base / "engine",
        )  # fmt: skip
        assert results is not None
        assert results["references"] == alone[0]["references"]
        assert [row["label"] for row in results["systems"]] == ["engine-oracle.i1"]
    assert scored == ["the references", "engine-oracle.i1", "engine-oracle.i1"]


def test_sentences_a_second_are_those_of_one_rank(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = {0: 1.5, 1: 2.5}
    share = measure.decode_share
    monkeypatch.setattr(
        measure, "decode_share", lambda *args, world, **more: (share(*args, world=world, **more)[0], spent[world.rank])
    )
    results, _ = trained.on(2, tmp_path)
    assert {row["sentences_per_second"] for row in results["systems"]} == {12 / 4.0}


def test_only_rank_0_measures_latency_and_after_all_shares(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    share, latency = measure.decode_share, measure.latency
    monkeypatch.setattr(measure, "decode_share", lambda *a, **k: (events.append("share"), share(*a, **k))[1])
    monkeypatch.setattr(measure, "latency", lambda *a, **k: (events.append("latency"), latency(*a, **k))[1])
    trained.on(2, tmp_path)
    assert events == ["share"] * 2 * len(LABELS) + ["latency"] * len(LABELS)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (1, 2)])
def test_an_interrupted_evaluation_goes_on_with_the_next_system(
    trained: Trained, alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, after: int
) -> None:
    calls: list[int] = []  # _histogram is called for the rows by rank 0 alone
    stop = failing(measure._histogram, lambda _: calls.append(1) or len(calls) == 5, KeyboardInterrupt())
    with monkeypatch.context() as patched:
        patched.setattr(measure, "_histogram", stop)
        assert isinstance(trained.on(before, tmp_path)[0], KeyboardInterrupt)
    assert sorted(path.stem for path in (tmp_path / "systems").iterdir()) == sorted(LABELS[:4])

    decoded: list[int] = []
    share = measure.decode_share
    monkeypatch.setattr(measure, "decode_share", lambda *a, **k: (decoded.append(1), share(*a, **k))[1])
    said: list[str] = []
    results, *_ = trained.on(after, tmp_path, said)
    assert len(decoded) == after * (len(LABELS) - 4)
    assert ["(measured before)" in line for line in said] == [True] * 4 + [False] * (len(LABELS) - 4)
    assert [row["num_ranks"] for row in results["systems"]] == [before] * 4 + [after] * (len(LABELS) - 4)
    assert (untimed(results), outputs(tmp_path)) == alone


def test_interrupted_among_the_latencies_nothing_is_decoded_again(
    trained: Trained, alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    stop = failing(measure.latency, lambda *_, **__: calls.append(1) or len(calls) == 3, KeyboardInterrupt())
    with monkeypatch.context() as patched:
        patched.setattr(measure, "latency", stop)
        assert isinstance(trained.on(1, tmp_path)[0], KeyboardInterrupt)
        [results] = trained.on(1, tmp_path)
    assert len(calls) == 2 + 1 + len(LABELS) - 2
    monkeypatch.setattr(measure, "decode_share", None)  # would fail if called
    monkeypatch.setattr(measure, "latency", None)
    assert trained.on(1, tmp_path) == [results]
    assert (untimed(results), outputs(tmp_path)) == alone


@pytest.mark.parametrize("where", ["decode_share", "score_share", "load_model"])
def test_an_error_of_one_rank_reaches_all(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    error = RuntimeError("out of memory")
    seen: list[int] = []

    def third_of_rank_1(*_: Any, **more: Any) -> bool:  # a load has no rank: the third of the two ranks' eight
        if "world" in more and more["world"].rank != 1:
            return False  # also when it calls after rank 1 has failed
        seen.append(1)
        return len(seen) == 3

    monkeypatch.setattr(measure, where, failing(getattr(measure, where), third_of_rank_1, error))
    outcomes = trained.on(2, tmp_path)
    assert error in outcomes
    [other] = [each for each in outcomes if each is not error]
    assert type(other) is PeerError
    assert "failed, and the others stop with it: RuntimeError: out of memory" in str(other)


def test_a_full_disk_on_rank_0_reaches_all(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(measure.Records, "store", failing(measure.Records.store, lambda *_: True, full))
    first, second = trained.on(2, tmp_path)
    assert first is full
    assert type(second) is PeerError
    assert "No space left" in str(second)


def test_ranks_of_another_version_are_refused(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2)
    seen = iter([{"torch": "2.13.0"}, {"torch": "2.12.0"}])
    monkeypatch.setattr(measure, "versions", lambda: (both.wait(60), next(seen))[1])
    outcomes = trained.on(2, tmp_path)
    assert [type(each) for each in outcomes] == [DistributedError] * 2
    assert "evaluate: the ranks do not agree" in str(outcomes[0])
    assert "versions" in str(outcomes[1])
