"""prepare(): counts, contents, determinism, reuse, and what a kill or a full disk leaves."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from engine_fast.config import FilterConfig, VocabularyConfig
from engine_fast.data import prepare as prepare_module
from engine_fast.data.prepare import Prepared, PrepareReport, prepare
from engine_fast.data.symbols import EOS
from engine_fast.data.vocabulary import SentencePieceVocabulary
from engine_fast.errors import ConfigError, DataError, VocabularyError

from .conftest import Corpus
from .test_shards import file_size_limit

Pairs = list[tuple[str, str]]


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
@pytest.mark.parametrize("joint", [True, False])
def test_from_files_to_ids_and_back(files: Corpus, text: Pairs, tmp_path: Path, suffix: str, joint: bool) -> None:
    config = files(suffix, vocabulary=VocabularyConfig(size=90, joint=joint), shard_sentences=100)
    report = prepare(config, tmp_path / "out", seed=1)
    prepared = Prepared.open(tmp_path / "out")
    assert prepared.joint == joint == (prepared.source_vocabulary is prepared.target_vocabulary)
    assert prepared.sources("valid") == [source for source, _ in text[:50]]
    assert prepared.references("test") == [[target for _, target in text[50:80]]]
    corpus = prepared.split("train")
    assert len(corpus) == report.splits["train"].kept == 600
    assert len(list((tmp_path / "out" / "train").glob("*.shard"))) == 6
    assert prepared.sources("train") == [source for source, _ in text]
    assert prepared.references("train") == [[target for _, target in text]]
    assert corpus.target(599)[-1] == EOS
    assert corpus.target(599).tolist() == [*prepared.target_vocabulary.encode(text[599][1]), EOS]
    assert report.splits["train"].target.num_ids == int(corpus.target_lengths.sum())
    assert report.splits["train"].source.longest == corpus.source_lengths.max()
    assert report.splits["train"].source.unknown_share == 0
    assert report.vocabularies["source"].size == len(prepared.source_vocabulary) == 90
    assert (report.vocabularies["source"] == report.vocabularies["target"]) == joint
    assert report.vocabularies["target"].sha256 == prepared.target_vocabulary.fingerprint
    assert prepared.report["splits"]["train"]["kept"] == 600
    assert prepared.is_valid_translation("valid") is None
    assert PrepareReport.read(tmp_path / "out") == report


def test_every_rule_is_counted(files: Corpus, text: Pairs, tmp_path: Path) -> None:
    source, target = text[0]
    bad = [("", target), (source, " \t"), ("nopi nopi", "nopi  nopi"), text[3], (text[4][0], text[5][1])]
    bad += [(" ".join([source] * 30), " ".join([target] * 30)), (" ".join([source] * 5), target), text[3]]
    config = files(train=text + bad, filters=FilterConfig(max_tokens=100, max_ratio=3.0))
    report = prepare(config, tmp_path / "out", seed=1).splits["train"]
    assert report.dropped == {"empty": 2, "identical": 1, "duplicate": 2, "too_long": 1, "ratio": 1}
    assert (report.read, report.kept, report.longer_than_limit) == (608, 601, 0)
    kept = Prepared.open(tmp_path / "out").split("train")
    assert len(kept) == 601
    assert max(kept.source_lengths.max(), kept.target_lengths.max()) <= 100

    loose = FilterConfig(max_tokens=100, drop_duplicates=False, drop_identical=False)
    report = prepare(files(train=text + bad, filters=loose), tmp_path / "loose", seed=1).splits["train"]
    assert report.dropped == {"empty": 2, "identical": 0, "duplicate": 0, "too_long": 1, "ratio": 1}


def test_valid_and_test_keep_every_line(files: Corpus, text: Pairs, tmp_path: Path) -> None:
    held = [*text[:5], text[0], ("", ""), ("nopi", "nopi"), (" ".join([text[0][0]] * 20), "x")]
    config = files(valid=held, filters=FilterConfig(max_tokens=40))
    report = prepare(config, tmp_path / "out", seed=1).splits["valid"]
    assert (report.read, report.kept, report.longer_than_limit, report.dropped) == (9, 9, 1, {})
    prepared = Prepared.open(tmp_path / "out")
    assert prepared.sources("valid") == [source for source, _ in held]
    corpus = prepared.split("valid")
    assert len(corpus) == 9
    assert corpus.source(6).tolist() == [EOS]


def test_unknown_characters_are_reported(files: Corpus, text: Pairs, tmp_path: Path) -> None:
    report = prepare(files(valid=[("Ωmega nopi", text[0][1])]), tmp_path / "out", seed=1).splits["valid"]
    assert report.source.unknown_share > 0 == report.target.unknown_share


def test_the_demo_corpus_has_two_reference_streams(demo: Prepared) -> None:
    mode_a, mode_b = demo.references("valid")
    assert len(mode_a) == len(mode_b) == len(demo.sources("valid")) == 60
    right = demo.is_valid_translation("valid")
    assert right is not None
    corpus = demo.split("valid")
    for index in range(60):
        assert right[index] == {mode_a[index], mode_b[index]}
        assert demo.target_vocabulary.decode(corpus.target(index)) in right[index]
    with pytest.raises(DataError, match="no split 'dev', expected train, valid, test"):
        demo.split("dev")


def test_same_input_same_bytes_whatever_the_workers(files: Corpus, tmp_path: Path) -> None:
    for kind in ("bpe", "unigram"):
        for name, workers in (("one", 1), ("three", 3)):
            config = files(vocabulary=VocabularyConfig(kind=kind, size=80), workers=workers)
            prepare(config, tmp_path / kind / name, seed=1)
        assert tree(tmp_path / kind / "one") == tree(tmp_path / kind / "three")


def test_a_sample_trains_the_vocabulary(files: Corpus, tmp_path: Path) -> None:
    whole = prepare(files(), tmp_path / "whole", seed=1)
    sampled = prepare(files(vocabulary=VocabularyConfig(size=100, sample=300)), tmp_path / "sampled", seed=1)
    assert whole.vocabularies["source"].sha256 != sampled.vocabularies["source"].sha256


def test_the_sample_shrinks_when_the_text_would_not_fit(
    files: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(files(), tmp_path / "whole", seed=1)
    seen: list[int] = []
    train = prepare_module.train_sentencepiece

    def counting(lines: Iterable[str], **settings: Any) -> SentencePieceVocabulary:
        kept = list(lines)
        seen.append(sum(map(len, kept)))
        return train(kept, **settings)

    monkeypatch.setattr(prepare_module, "train_sentencepiece", counting)
    monkeypatch.setitem(prepare_module._MOST_CHARACTERS, "bpe", 10_000)
    small = prepare(files(), tmp_path / "small", seed=1)
    assert 9_000 < seen[0] < 11_000
    assert whole.vocabularies["source"].sha256 != small.vocabularies["source"].sha256


def test_an_equal_preparation_is_reused_and_a_changed_one_is_not(files: Corpus, text: Pairs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not prepare(files(), out, seed=1).reused
    before = (out / "report.json").stat().st_mtime_ns
    again = prepare(files(".gz", workers=1), out, seed=1)  # other containers: the bytes of the input differ
    assert not again.reused
    assert prepare(files(".gz"), out, seed=1).reused
    assert (out / "report.json").stat().st_mtime_ns >= before
    assert not prepare(files(valid=text[:49]), out, seed=1).reused
    assert not prepare(files(filters=FilterConfig(max_tokens=30)), out, seed=1).reused
    shard = next(out.glob("train/*.shard"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert not prepare(files(filters=FilterConfig(max_tokens=30)), out, seed=1).reused
    Prepared.open(out).split("train")
    assert {path.name for path in tmp_path.iterdir() if "partial" in path.name} == set()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"train": []}, DataError, "are empty"),
        ({"test": []}, DataError, "are empty"),
        ({"train": [("", "x")] * 5}, DataError, "no sentence to learn from"),
        ({"filters": FilterConfig(max_tokens=2)}, DataError, "every pair was dropped"),
        ({"vocabulary": VocabularyConfig(size=90000)}, ConfigError, "size = 90000, expected at most"),
    ],
)
def test_bad_input_leaves_nothing(
    files: Corpus, tmp_path: Path, change: dict[str, object], error: type[Exception], message: str
) -> None:
    config = files(**change)
    (tmp_path / "out").mkdir()
    with pytest.raises(error, match=message):
        prepare(config, tmp_path / "out" / "p", seed=1)
    assert list((tmp_path / "out").iterdir()) == []


def test_changed_text_or_vocabulary_is_refused(files: Corpus, tmp_path: Path) -> None:
    prepare(files(), tmp_path / "out", seed=1)
    for name in ("valid.source.txt", "test.reference0.txt", "joint.model"):
        copy = tmp_path / f"copy-{name}"
        shutil.copytree(tmp_path / "out", copy)
        (copy / name).write_bytes((copy / name).read_bytes() + b"\n")
        with pytest.raises(DataError, match=rf"{name}: its checksum is not the recorded one"):
            Prepared.open(copy)
        (copy / name).unlink()
        with pytest.raises(DataError, match=rf"{name}: cannot be read"):
            Prepared.open(copy)
    (tmp_path / "out" / "report.json").write_text("{}")
    with pytest.raises(DataError, match=r"report.json: is damaged"):
        Prepared.open(tmp_path / "out")
    with pytest.raises(DataError, match=r"no prepared corpus here.*engine-fast prepare"):
        Prepared.open(tmp_path / "elsewhere")


def test_shards_of_another_vocabulary_are_refused(files: Corpus, tmp_path: Path) -> None:
    prepare(files(), tmp_path / "one", seed=1)
    prepare(files(vocabulary=VocabularyConfig(size=80)), tmp_path / "two", seed=1)
    shutil.rmtree(tmp_path / "one" / "train")
    shutil.copytree(tmp_path / "two" / "train", tmp_path / "one" / "train")
    with pytest.raises(VocabularyError, match="were made with vocabulary"):
        Prepared.open(tmp_path / "one").split("train")


def test_full_disk_leaves_nothing(files: Corpus, tmp_path: Path) -> None:
    config = files()
    (tmp_path / "out").mkdir()
    with file_size_limit(3000), pytest.raises(DataError, match=r"cannot be written \(File too large\)"):
        prepare(config, tmp_path / "out" / "p", seed=1)
    assert list((tmp_path / "out").iterdir()) == []


def child(action: Callable[[], object]) -> int:
    """Run in a process of its own; returns its id. It exits with 0, or with 1 after an exception."""
    process = os.fork()
    if process == 0:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return process


def test_kill_9_leaves_nothing_half_written(files: Corpus, text: Pairs, tmp_path: Path) -> None:
    config = files(train=text * 15, valid=text * 5, filters=FilterConfig(drop_duplicates=False), shard_sentences=2000)
    expected = prepare(config, tmp_path / "reference", seed=1)
    out = tmp_path / "out" / "p"

    def partial(pattern: str) -> Callable[[], bool]:
        return lambda: any((tmp_path / "out").glob(f".p.partial-*/{pattern}"))

    stages = [partial("hashes"), partial("joint.model"), partial(".train.partial-*/00001.shard"), partial("train")]
    for reached in stages:
        process = child(lambda: prepare(config, out, seed=1))
        limit = time.monotonic() + 60
        while not reached() and time.monotonic() < limit:
            time.sleep(0.0005)
        os.kill(process, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
        assert not out.exists()
        assert len(list((tmp_path / "out").iterdir())) == 1  # removed by the next run, which finds its lock free
    assert prepare(config, out, seed=1) == expected
    assert tree(out) == tree(tmp_path / "reference")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["p"]  # what the killed runs left is gone


def test_two_runs_at_once_do_not_disturb_each_other(files: Corpus, tmp_path: Path) -> None:
    config = files()
    out = tmp_path / "out" / "p"
    processes = [child(lambda: prepare(config, out, seed=1)) for _ in range(2)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    assert 0 in codes  # when both end in the same instant, one of them is told that the directory is taken
    Prepared.open(out).split("train")


def test_real_text(multi30k: Prepared) -> None:
    train = multi30k.report["splits"]["train"]
    assert train["read"] == 29000
    assert 28900 < train["kept"] <= 29000
    assert train["kept"] + sum(train["dropped"].values()) == 29000
    assert multi30k.report["splits"]["valid"]["kept"] == len(multi30k.references("valid")[0]) == 1014
    assert multi30k.report["splits"]["test"]["kept"] == 1000
    vocabulary = multi30k.source_vocabulary
    lines = multi30k.sources("test")
    decoded = [vocabulary.decode(ids) for ids in vocabulary.encode_batch(lines)]
    assert sum(one == other for one, other in zip(lines, decoded, strict=True)) >= 998  # rare characters are unknown
