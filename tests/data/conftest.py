"""Small corpora, made or real, for the data tests."""

from __future__ import annotations

import gzip
import lzma
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from engine_fast.config import DataConfig, SyntheticConfig, TextPair, VocabularyConfig
from engine_fast.data import synthetic
from engine_fast.data.prepare import Prepared, prepare

Corpus = Callable[..., DataConfig]
COMPRESS = {".gz": lambda text: gzip.compress(text, mtime=0), ".xz": lzma.compress}  # equal text, equal bytes


@pytest.fixture(autouse=True)
def _no_cache_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_FAST_CACHE", str(tmp_path / "cache"))


def write(path: Path, lines: Sequence[str]) -> Path:
    """A text file, compressed as its suffix says."""
    path.write_bytes(COMPRESS.get(path.suffix, bytes)("".join(line + "\n" for line in lines).encode()))
    return path


@pytest.fixture
def text() -> list[tuple[str, str]]:
    """600 pairs of the generated language, one mode."""
    config = SyntheticConfig(num_train=600)
    return [(example.source, example.references[0]) for example in synthetic.generate(config, split="train", seed=0)]


@pytest.fixture
def files(tmp_path: Path, text: list[tuple[str, str]]) -> Corpus:
    """A configuration over written files; train, valid and test may be replaced by other pairs."""

    def make(suffix: str = "", **settings: object) -> DataConfig:
        splits: dict[str, object] = {"train": text, "valid": text[:50], "test": text[50:80]}
        splits |= {name: settings.pop(name) for name in list(settings) if name in splits}
        pairs = {}
        for split, rows in splits.items():
            sides = [
                write(tmp_path / f"{split}.{side}{suffix}", [row[i] for row in rows]) for i, side in enumerate("ab")
            ]
            pairs[split] = TextPair(source=str(sides[0]), target=str(sides[1]))
        settings.setdefault("vocabulary", VocabularyConfig(size=100))
        return DataConfig(**pairs, **settings)

    return make


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The prepared demo corpus, small."""
    directory = tmp_path_factory.mktemp("demo") / "prepared"
    config = DataConfig(
        source_language="src",
        target_language="tgt",
        synthetic=SyntheticConfig(num_train=4000, num_valid=60, num_test=40),
        vocabulary=VocabularyConfig(size=256),
        shard_sentences=1500,
    )
    prepare(config, directory, seed=3)
    return Prepared.open(directory)


@pytest.fixture(scope="session")
def shared_data(root: Path) -> Path:
    """The directory of real corpora; skips where it is absent."""
    path = Path(os.environ.get("ENGINE_FAST_DATA") or root.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no real corpora at {path}: set ENGINE_FAST_DATA")
    return path


@pytest.fixture(scope="session")
def multi30k(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """multi30k, joint vocabulary of 5000; skips where it is absent."""
    root = shared_data / "multi30k_deen"
    if not root.is_dir():
        pytest.skip(f"no multi30k_deen in {shared_data}")
    directory = tmp_path_factory.mktemp("multi30k") / "prepared"
    config = DataConfig(corpus="multi30k_de_en", root=str(root), vocabulary=VocabularyConfig(size=5000))
    prepare(config, directory, seed=1)
    return Prepared.open(directory)
