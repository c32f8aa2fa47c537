"""Shards: what goes in comes out; damage is named; nothing half-written is ever visible."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from engine_fast.data.corpus import ParallelCorpus
from engine_fast.data.shards import ShardWriter
from engine_fast.data.symbols import EOS, PAD
from engine_fast.errors import DataError, VocabularyError

PAIRS = [([7 + i % 5] * (i % 6) + [EOS], [70000 + i] * (i % 4) + [EOS]) for i in range(23)]


def written(directory: Path, pairs: Iterable[tuple[list[int], list[int]]] = PAIRS, size: int = 5) -> Path:
    with ShardWriter(directory, source_fingerprint="s", target_fingerprint="t", shard_sentences=size) as writer:
        for pair in pairs:
            writer.add(*pair)
    return directory


@pytest.mark.parametrize("size", [1, 5, 23, 1000])
@pytest.mark.parametrize("offset", [0, 65000])
def test_round_trip(tmp_path: Path, size: int, offset: int) -> None:
    pairs = [([n + offset for n in one], other) for one, other in PAIRS]
    corpus = ParallelCorpus.open(written(tmp_path / "c", pairs, size))
    assert len(corpus) == 23
    for index, (source, target) in enumerate(pairs):
        assert corpus.source(index).tolist() == source
        assert corpus.target(index).tolist() == target
    assert corpus.source_lengths.tolist() == [len(one) for one, _ in pairs]
    assert corpus.target_lengths.dtype == np.int32
    assert (corpus.source_fingerprint, corpus.target_fingerprint) == ("s", "t")
    assert len(list((tmp_path / "c").glob("*.shard"))) == -(-23 // size)


def test_small_ids_take_two_bytes(tmp_path: Path) -> None:
    wide, narrow = written(tmp_path / "w", size=50), written(tmp_path / "n", [([9, EOS], [5, EOS])] * 23, 50)
    types = [json.loads((path / "manifest.json").read_text())["shards"][0]["dtype"] for path in (wide, narrow)]
    assert types == ["<u4", "<u2"]


def test_collate_pads_right_and_keeps_order(tmp_path: Path) -> None:
    corpus = ParallelCorpus.open(written(tmp_path / "c"))
    batch = corpus.collate(np.array([22, 0, 9]))
    assert batch.indices.tolist() == [22, 0, 9]
    assert batch.source.tolist() == [
        [*PAIRS[i][0], *[PAD] * (batch.source.shape[1] - len(PAIRS[i][0]))] for i in (22, 0, 9)
    ]
    assert batch.num_target_tokens == sum(len(PAIRS[i][1]) for i in (22, 0, 9))
    empty = corpus.collate(np.empty(0, dtype=np.int64))
    assert empty.source.shape == empty.target.shape == (0, 0)
    assert empty.num_target_tokens == 0
    assert batch.to("cpu").target.equal(batch.target)


def test_index_out_of_range(tmp_path: Path) -> None:
    corpus = ParallelCorpus.open(written(tmp_path / "c"))
    for index in (-1, 23):
        with pytest.raises(IndexError, match=f"sentence {index} of 23"):
            corpus.source(index)


def test_damage_is_named_with_the_next_step(tmp_path: Path) -> None:
    good = written(tmp_path / "good")

    def damaged(name: str) -> Path:
        path = tmp_path / name
        shutil.copytree(good, path)
        return path

    again = "Run engine-fast prepare again"
    missing = damaged("missing")
    (missing / "00002.shard").unlink()
    with pytest.raises(DataError, match=rf"00002.shard: this shard is missing. {again}"):
        ParallelCorpus.open(missing)

    flipped = damaged("flipped") / "00001.shard"
    content = bytearray(flipped.read_bytes())
    content[-3] ^= 4
    flipped.write_bytes(content)
    with pytest.raises(DataError, match=rf"00001.shard: its checksum differs.*{again}"):
        ParallelCorpus.open(flipped.parent)
    assert len(ParallelCorpus.open(flipped.parent, verify=False)) == 23

    cut = damaged("cut") / "00000.shard"
    cut.write_bytes(cut.read_bytes()[:-2])
    for verify in (True, False):
        with pytest.raises(DataError, match=rf"00000.shard: has \d+ bytes, expected \d+.*{again}"):
            ParallelCorpus.open(cut.parent, verify=verify)

    for text in ("{", "{}", '{"version": 1}', "[]", '{"version": 99}'):
        (good / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=rf"manifest.json: .*{again}"):
            ParallelCorpus.open(good)
    with pytest.raises(DataError, match=rf"manifest.json: is missing.*{again}"):
        ParallelCorpus.open(tmp_path / "nothing")


def test_vocabulary_mismatch_is_refused(tmp_path: Path) -> None:
    corpus = ParallelCorpus.open(written(tmp_path / "c"))
    corpus.require_vocabularies("s", "t")
    with pytest.raises(VocabularyError, match=r"its target ids were made with vocabulary t, .* uses u"):
        corpus.require_vocabularies("s", "u")


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[list[int], list[int]]]:
        yield from PAIRS
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        written(tmp_path / "c", failing(), 2)
    assert list(tmp_path.iterdir()) == []


def test_an_older_corpus_survives_a_failed_rewrite_and_is_replaced_by_a_good_one(tmp_path: Path) -> None:
    directory = written(tmp_path / "c")
    with pytest.raises(DataError, match="cannot store these ids"):
        written(directory, [([5, -1], [EOS])])
    with pytest.raises(DataError, match="a side without ids"):
        written(directory, [([5, EOS], [])])
    assert len(ParallelCorpus.open(directory)) == 23
    written(directory, PAIRS[:4])
    assert len(ParallelCorpus.open(directory)) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_directory_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match="was not written by this command"):
        written(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk(tmp_path: Path) -> None:
    with (
        file_size_limit(1000),
        pytest.raises(DataError, match=r"cannot be written \(File too large\). Free some space"),
    ):
        written(tmp_path / "c", PAIRS * 20, 1000)
    assert list(tmp_path.iterdir()) == []


def test_read_only_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:  # permissions bind everyone but root
            os.seteuid(65534)
        with pytest.raises(DataError, match=r"cannot be written \(Permission denied\).*may write to"):
            written(tmp_path / "c")
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o755)
