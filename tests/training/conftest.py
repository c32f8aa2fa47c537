"""A corpus and a configuration so small that a whole stage trains in about a second."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine_fast.config import RunConfig, parse_config
from engine_fast.data.prepare import Prepared, prepare
from engine_fast.training import loop, train_cmlm, train_teacher
from engine_fast.training.metrics import read_metrics

ARCHITECTURE = {
    "width": 16, "ffn_width": 32, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "norm": "pre",
    "max_positions": 32, "tie": "all",
}  # fmt: skip
STAGE: dict[str, Any] = {
    "architecture": ARCHITECTURE,
    "max_updates": 12,
    "batch": {"max_tokens": 256},
    "optim": {"lr": 1e-3, "warmup_updates": 4, "clip_norm": 1.0},
    "validate_every": 4,
    "checkpoint_every": 4,
    "log_every": 3,
    "valid_bleu_sentences": 8,
}
DATA = {
    "source_language": "src",
    "target_language": "tgt",
    "synthetic": {
        "num_words": 20, "min_length": 3, "max_length": 6, "num_train": 300, "num_valid": 24, "num_test": 4,
    },
    "pretokenised": True,
    "vocabulary": {"size": 100},
    "filters": {"max_tokens": 32, "drop_duplicates": False},
}  # fmt: skip

Configure = Callable[..., RunConfig]


def make_config(**overrides: Any) -> RunConfig:
    """The tiny configuration; `stage__section__key=value` changes one setting of it."""
    tree: dict[str, Any] = {
        "seed": 3,
        "data": DATA,
        "teacher": yaml.safe_load(yaml.safe_dump(STAGE)),
        "cmlm": {**yaml.safe_load(yaml.safe_dump(STAGE)), "data": "references"},
        "engine": {**yaml.safe_load(yaml.safe_dump(STAGE)), "data": "references"},
        "runtime": {"device": "cpu", "threads": 1, "tensorboard": False, "min_free_bytes": 0},
    }
    for key, value in overrides.items():
        *parents, leaf = key.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return parse_config(tree)


def weights_of(directory: Path) -> bytes:
    return (directory / "model" / "model.safetensors").read_bytes()


def checkpoints(directory: Path) -> list[str]:
    """Names of what stands under checkpoints/."""
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def lines_of(directory: Path, kind: str) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    clock = {"seconds", "tokens_per_second"}
    records = [record for record in read_metrics(directory / "metrics.jsonl") if record["kind"] == kind]
    return [{name: value for name, value in record.items() if name not in clock} for record in records]


class Teach:
    """Train a teacher into a directory of the test."""

    def __init__(self, prepared: Prepared, root: Path) -> None:
        self._prepared, self._root = prepared, root

    def __call__(self, name: str = "teacher", **overrides: Any) -> Path:
        directory = self._root / name
        train_teacher(make_config(**overrides), self._prepared, directory)
        return directory


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus") / "data"
    prepare(make_config().data, directory, seed=3)
    return directory


@pytest.fixture(scope="session")
def prepared(data_dir: Path) -> Prepared:
    return Prepared.open(data_dir)


@pytest.fixture
def teach(prepared: Prepared, tmp_path: Path) -> Teach:
    return Teach(prepared, tmp_path)


@pytest.fixture(scope="session")
def plain_teacher(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run of the tiny configuration leaves. Not to be written to."""
    return Teach(prepared, tmp_path_factory.mktemp("plain"))()


@pytest.fixture(scope="session")
def cmlm(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished CMLM stage of two updates; only read from."""
    directory = tmp_path_factory.mktemp("cmlm") / "cmlm"
    corpus, valid = prepared.split("train"), prepared.split("valid")
    train_cmlm(make_config(cmlm__max_updates=2), prepared, corpus, directory, valid_corpus=valid)
    return directory


@contextlib.contextmanager
def failing_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int, error: BaseException) -> Any:
    """Let `owner.name` work for some calls, then raise."""
    real, count = getattr(owner, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            raise error
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, wrapped)
        yield


def stop_at(monkeypatch: pytest.MonkeyPatch, update: int) -> None:
    """A SIGTERM that arrives during the given update."""
    real = loop.Trainer._update

    def update_and_stop(self: Any) -> None:
        real(self)
        if self.progress.update == update:
            self._stop.request(15, None)

    monkeypatch.setattr(loop.Trainer, "_update", update_and_stop)
