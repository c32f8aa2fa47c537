"""engine_fast._C: the batch packer against its definition, and every way in which loading must refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_fast import extension
from engine_fast.errors import BuildError


def pack(
    source: list[int], target: list[int], order: list[int], max_tokens: int, max_sentences: int = 1000
) -> list[int]:
    offsets = extension.load().pack_batches(
        np.array(source, np.int32), np.array(target, np.int32), np.array(order, np.int64), max_tokens, max_sentences
    )
    assert offsets.dtype == np.int64
    return [int(offset) for offset in offsets]


def oracle(source: list[int], target: list[int], order: list[int], max_tokens: int, max_sentences: int) -> list[int]:
    """The definition, in terms of whole batches."""
    batches: list[list[int]] = []
    for sentence in order:
        grown = [*batches[-1], sentence] if batches else [sentence]
        fits = all(len(grown) * max(side[i] for i in grown) <= max_tokens for side in (source, target))
        if batches and fits and len(grown) <= max_sentences:
            batches[-1].append(sentence)
        else:
            batches.append([sentence])
    return [0, *np.cumsum([len(batch) for batch in batches]).tolist()]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], int, int]:
    count = draw(st.integers(1, 40))
    lengths = st.lists(st.integers(0, 30), min_size=count, max_size=count)
    source, target = draw(lengths), draw(lengths)
    order = draw(st.lists(st.integers(0, count - 1), max_size=60))
    longest = max(*source, *target, 1)
    return source, target, order, draw(st.integers(longest, 6 * longest)), draw(st.integers(1, 12))


@given(problems())
def test_packer_equals_its_definition(problem: tuple[list[int], list[int], list[int], int, int]) -> None:
    assert pack(*problem) == oracle(*problem)


def test_either_side_can_close_a_batch() -> None:
    assert pack([9, 1, 1], [1, 1, 1], [0, 1, 2], 18) == [0, 2, 3]
    assert pack([1, 1, 1], [9, 1, 1], [0, 1, 2], 18) == [0, 2, 3]


def test_a_sentence_as_long_as_the_budget_stands_alone() -> None:
    assert pack([8, 8], [8, 8], [1, 0], 8) == [0, 1, 2]


def test_an_empty_order_gives_no_batch() -> None:
    assert pack([3], [3], [], 10) == [0]
    assert pack([], [], [], 10) == [0]


def test_the_largest_budget_does_not_overflow() -> None:
    assert pack([2**31 - 1] * 3, [1] * 3, [0, 1, 2], 2**63 - 1) == [0, 3]


@pytest.mark.parametrize(
    ("source", "target", "order", "max_tokens", "max_sentences", "message"),
    [
        ([3, 11], [3, 4], [0, 1], 10, 5, "source length of sentence 1 = 11, expected 0 to max_tokens = 10"),
        ([3, 4], [3, 11], [1], 10, 5, "target length of sentence 1 = 11, expected 0 to max_tokens = 10"),
        ([3, -1], [3, 4], [0, 1], 10, 5, "source length of sentence 1 = -1"),
        ([3], [3], [0, 1], 10, 5, r"order\[1\] = 1, expected an index from 0 to 0"),
        ([3], [3], [-1], 10, 5, r"order\[0\] = -1"),
        ([3], [3, 4], [0], 10, 5, "target_lengths = 2 sentences, expected as many as source_lengths, 1"),
        ([3], [3], [0], 0, 5, "max_tokens = 0, expected 1 or more"),
        ([3], [3], [0], 10, 0, "max_sentences = 0, expected 1 or more"),
    ],
)
def test_packer_names_what_it_cannot_use(
    source: list[int], target: list[int], order: list[int], max_tokens: int, max_sentences: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pack(source, target, order, max_tokens, max_sentences)


def test_packer_refuses_other_types_and_shapes_rather_than_copying() -> None:
    module, lengths, order = extension.load(), np.array([3, 4], np.int32), np.array([0, 1], np.int64)
    with pytest.raises(TypeError):
        module.pack_batches(lengths.astype(np.int64), lengths, order, 10, 5)
    with pytest.raises(ValueError, match="order = 2 dimensions, expected one dimension"):
        module.pack_batches(lengths, lengths, order.reshape(1, 2), 10, 5)


# ---------------------------------------------------------------- loading


@pytest.fixture
def fresh() -> Iterator[None]:
    """load() without what an earlier test left in its cache."""
    extension.load.cache_clear()
    yield
    extension.load.cache_clear()


def forged(directory: Path, **changes: Any) -> Path:
    """A file with a build record and nothing that could run: loading it would fail with another message."""
    record = {"isa": "default", "torch": torch.__version__, "cuda": None, **changes}
    file = directory / "_C.so"
    file.write_bytes(b"\x7fELF\0\0ENGINE_FAST_BUILD_INFO" + json.dumps(record).encode() + b"ENGINE_FAST_BUILD_INFO\0")
    return file


def test_the_record_in_the_file_is_the_one_the_module_gives() -> None:
    info = extension.build_info()
    assert info == extension.load().build_info()
    assert info["torch"] == torch.__version__
    assert info["isa"] in extension.ISA_FEATURES
    assert "-O3" in info["flags"]
    assert info["compiler"]
    assert extension.available()


@pytest.mark.usefixtures("fresh")
def test_a_processor_without_the_recorded_isa_is_refused_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = forged(tmp_path, isa="avx512")
    monkeypatch.setattr(extension, "path", lambda: file)
    monkeypatch.setattr(extension, "cpu_features", lambda: frozenset({"avx2", "fma", "avx512f"}))
    with pytest.raises(BuildError, match=r"ENGINE_FAST_CPU_ISA=avx512.* lacks avx512bw, avx512dq, avx512vl") as caught:
        extension.load()
    assert "ENGINE_FAST_CPU_ISA=avx2" in str(caught.value)
    assert not extension.available()


@pytest.mark.usefixtures("fresh")
def test_another_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = forged(tmp_path, torch="1.0.0")
    monkeypatch.setattr(extension, "path", lambda: file)
    with pytest.raises(BuildError, match=r"built for torch 1\.0\.0, and torch .* is installed.*make install"):
        extension.load()


@pytest.mark.usefixtures("fresh")
def test_nothing_compiled_says_how_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "path", lambda: None)
    with pytest.raises(BuildError, match=r"not compiled for Python .*make install"):
        extension.load()
    assert not extension.available()


@pytest.mark.parametrize("content", [b"", b"\x7fELF nothing", b'ENGINE_FAST_BUILD_INFO{"isa": }ENGINE_FAST_BUILD_INFO'])
def test_a_file_without_a_record_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "_C.so"
    file.write_bytes(content)
    with pytest.raises(BuildError, match="not an extension that engine_fast built"):
        extension.read_build_info(file)


def test_an_unknown_isa_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="names no known instruction set"):
        extension.read_build_info(forged(tmp_path, isa="sse9"))


def test_best_isa_is_the_strongest_complete_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for features, isa in ((set(), "default"), ({"avx2"}, "default"), ({"avx2", "fma", "avx512f"}, "avx2")):
        monkeypatch.setattr(extension, "cpu_features", lambda features=features: frozenset(features))
        assert extension.best_isa() == isa
    monkeypatch.setattr(extension, "cpu_features", lambda: extension.ISA_FEATURES["avx512"])
    assert extension.best_isa() == "avx512"
