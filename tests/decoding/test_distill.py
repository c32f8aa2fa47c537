from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from engine_fast.config import DistillConfig
from engine_fast.data.corpus import ParallelCorpus
from engine_fast.data.prepare import Prepared, prepare
from engine_fast.data.shards import ShardWriter
from engine_fast.data.symbols import EOS
from engine_fast.decoding import beam_search
from engine_fast.decoding import distill as module
from engine_fast.decoding.distill import distill
from engine_fast.errors import CheckpointError, ConfigError, DataError, VocabularyError
from engine_fast.models import Transformer, load_model, save_model
from tests.decoding.tiny import load_tiny, make_student, make_teacher, make_vocabulary, pad, widen
from tests.distributed.torchrun import torchrun
from tests.recipes.micro import micro_config

CONFIG = DistillConfig(beam=3, chunk_sentences=7, max_tokens=60)


class TinyPrepared:
    """What distill asks of a prepared corpus."""

    def __init__(self, directory: Path, count: int = 30, seed: int = 0) -> None:
        self.source_vocabulary = self.target_vocabulary = make_vocabulary()
        fingerprint = self.source_vocabulary.fingerprint
        rng = random.Random(seed)
        self.rows = [[*rng.choices(range(5, 12), k=rng.randint(1, 9)), EOS] for _ in range(count)]
        with ShardWriter(directory, source_fingerprint=fingerprint, target_fingerprint=fingerprint) as shards:
            for row in self.rows:
                shards.add(row, [5, EOS])
        self.directory = directory

    def split(self, name: str) -> ParallelCorpus:
        assert name == "train"
        return ParallelCorpus.open(self.directory)


@pytest.fixture
def prepared(tmp_path: Path) -> TinyPrepared:
    return TinyPrepared(tmp_path / "train")


def run(prepared: TinyPrepared, directory: Path, config: DistillConfig = CONFIG, **options) -> ParallelCorpus | None:
    return distill(load_tiny(make_teacher().float()), prepared, config, directory, show_progress=False, **options)


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_pairs_are_the_sources_with_their_beam_translations(prepared: TinyPrepared, tmp_path: Path) -> None:
    corpus = run(prepared, tmp_path / "out")
    teacher = make_teacher().float()
    best = [found[0] for found in beam_search(teacher, pad(prepared.rows), beam=3)]
    assert [corpus.source(i).tolist() for i in range(len(corpus))] == prepared.rows
    assert [corpus.target(i).tolist() for i in range(len(corpus))] == [h.tokens for h in best]
    decode = prepared.target_vocabulary.decode
    assert (tmp_path / "out" / "target.txt").read_text().splitlines() == [decode(h.tokens) for h in best]
    assert (tmp_path / "out" / "source.txt").read_text().splitlines() == [decode(row) for row in prepared.rows]
    report = json.loads((tmp_path / "out" / "distill.json").read_text())
    assert report["num_pairs"] == report["num_sources"] == 30
    assert report["num_target_tokens"] == sum(len(h.tokens) for h in best)
    assert report["mean_log_probability"] == pytest.approx(np.mean([h.log_probability for h in best]), rel=1e-5)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "corpus", "distill.json", "source.txt", "target.txt",
    ]  # fmt: skip


def test_n_best_writes_every_hypothesis_beside_its_source(prepared: TinyPrepared, tmp_path: Path) -> None:
    corpus = run(prepared, tmp_path / "out", CONFIG.model_copy(update={"n_best": 2}))
    assert len(corpus) == 60
    single = run(prepared, tmp_path / "single")
    for i in range(30):
        assert corpus.source(2 * i).tolist() == corpus.source(2 * i + 1).tolist() == prepared.rows[i]
        assert corpus.target(2 * i).tolist() == single.target(i).tolist()
        assert corpus.target(2 * i).tolist() != corpus.target(2 * i + 1).tolist()
    with pytest.raises(ConfigError, match="n_best = 4"):
        run(prepared, tmp_path / "wrong", CONFIG.model_copy(update={"n_best": 4}))


def test_an_interrupted_run_goes_on_and_ends_the_same(
    prepared: TinyPrepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(prepared, tmp_path / "straight")
    search, calls = module._search, []

    def counting(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return search(*args)

    monkeypatch.setattr(module, "_search", counting)
    with pytest.raises(KeyboardInterrupt):
        run(prepared, tmp_path / "out")
    [chunks] = (tmp_path / "out").glob("chunks-*")
    assert sorted(path.name for path in chunks.iterdir()) == ["000000.npz", "000001.npz"]
    run(prepared, tmp_path / "out")
    assert len(calls) == 3 + 3, "five chunks, two of them kept from the first run"
    assert files(tmp_path / "out") == files(tmp_path / "straight")
    run(prepared, tmp_path / "out")
    assert len(calls) == 6, "a finished run is not repeated"


def test_kill_nine_in_the_middle_of_the_work(prepared: TinyPrepared, tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from engine_fast.decoding import distill as module
        from tests.decoding.test_distill import TinyPrepared, run
        search = module._search
        def slow(*args):
            time.sleep(0.2)
            return search(*args)
        module._search = slow
        base = Path(sys.argv[1])
        run(TinyPrepared(base / "train"), base / "out")
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parents[2])
    out = tmp_path / "out"
    deadline = time.monotonic() + 60
    while len(list(out.glob("chunks-*/*.npz"))) < 2:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "distill.json").exists()
    run(prepared, out)
    run(prepared, tmp_path / "straight")
    assert files(out) == files(tmp_path / "straight")


@pytest.mark.parametrize("order", [(2, 1, 0), (0, 1, 2)])
def test_ranks_share_the_chunks_and_the_result_is_the_same(
    prepared: TinyPrepared, tmp_path: Path, order: tuple[int, ...]
) -> None:
    run(prepared, tmp_path / "straight")
    corpora: dict[int, ParallelCorpus | None] = {}

    def rank(number: int) -> None:
        corpora[number] = run(prepared, tmp_path / "out", rank=number, world_size=3)

    threads = [threading.Thread(target=rank, args=(number,)) for number in order]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert corpora.pop(0) is not None
    assert corpora == {1: None, 2: None}
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def test_a_rank_waits_for_nobody_and_its_work_is_used(
    prepared: TinyPrepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 alone makes every chunk, also those of rank 0, which it has not seen; rank 0 only assembles."""
    run(prepared, tmp_path / "straight")
    assert run(prepared, tmp_path / "out", rank=1, world_size=2) is None
    monkeypatch.setattr(module, "_search", None)  # would fail if called
    assert run(prepared, tmp_path / "out", rank=0, world_size=2) is not None
    assert run(prepared, tmp_path / "out", rank=1, world_size=2) is None
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def test_a_chunk_that_comes_after_the_end_is_no_error(
    prepared: TinyPrepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While rank 1 searches its first chunk, rank 0 does everything and removes the folder of chunks."""
    search, entered = module._search, []

    def slow(*args):
        if not entered:
            entered.append(1)
            assert run(prepared, tmp_path / "out", rank=0, world_size=2) is not None
        return search(*args)

    monkeypatch.setattr(module, "_search", slow)
    assert run(prepared, tmp_path / "out", rank=1, world_size=2) is None
    assert not list((tmp_path / "out").glob("chunks-*"))


def test_another_model_or_config_or_corpus_starts_over(prepared: TinyPrepared, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(prepared, out)
    before = [first.target(i).tolist() for i in range(30)]
    other = distill(load_tiny(make_teacher(seed=5).float()), prepared, CONFIG, out, show_progress=False)
    assert [other.target(i).tolist() for i in range(30)] != before
    greedy = run(prepared, out, CONFIG.model_copy(update={"beam": 1}))
    assert json.loads((out / "distill.json").read_text())["config"]["beam"] == 1
    assert len(greedy) == 30
    assert len(run(TinyPrepared(tmp_path / "more", count=31), out)) == 31


def test_the_callers_model_is_left_alone(prepared: TinyPrepared, tmp_path: Path) -> None:
    loaded = load_tiny(make_teacher())
    distill(loaded, prepared, CONFIG, tmp_path / "out", show_progress=False)
    assert next(loaded.model.parameters()).dtype == torch.float64
    low = CONFIG.model_copy(update={"precision": "bf16"})
    assert len(distill(loaded, prepared, low, tmp_path / "low", show_progress=False)) == 30
    assert next(loaded.model.parameters()).dtype == torch.float64


def test_what_cannot_be_used_is_refused(prepared: TinyPrepared, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="needs a teacher, got a cmlm"):
        distill(load_tiny(make_student()), prepared, CONFIG, tmp_path / "out")
    loaded = load_tiny(make_teacher())
    prepared.split = lambda name: _with_fingerprint(ParallelCorpus.open(prepared.directory))
    with pytest.raises(VocabularyError):
        distill(loaded, prepared, CONFIG, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_chunk_is_named(prepared: TinyPrepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(prepared, tmp_path / "out")
    monkeypatch.undo()
    [chunk] = (tmp_path / "out").glob("chunks-*/000002.npz")
    chunk.write_bytes(chunk.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match=r"000002.npz: damaged.*Remove the file"):
        run(prepared, tmp_path / "out")
    chunk.unlink()
    assert len(run(prepared, tmp_path / "out")) == 30


def test_a_directory_that_cannot_be_made_is_named(prepared: TinyPrepared, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file.*cannot be written"):
        run(prepared, tmp_path / "file" / "out")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_leaves_no_chunk(prepared: TinyPrepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def savez(file, **_) -> None:
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(DataError, match="Free some space"):
        run(prepared, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def _with_fingerprint(corpus: ParallelCorpus) -> ParallelCorpus:
    corpus.target_fingerprint = "0" * 64
    return corpus


def launched(base: Path, out: Path, doomed: str = "nobody") -> subprocess.CompletedProcess[str]:
    """`engine-fast distill` on two ranks; the doomed one kills itself after a chunk."""
    options = ["--model", base / "teacher", "--data", base / "data", "--out", out, "--device", "cpu"]
    options += ["--beam", "2", "--chunk-sentences", "10"]
    return torchrun(2, "tests.decoding.distill_worker", doomed, "distill", *options)


@pytest.fixture
def teacher_and_data(tmp_path: Path) -> Path:
    config = micro_config()
    prepare(config.data, tmp_path / "data", seed=1)
    vocabulary = Prepared.open(tmp_path / "data").source_vocabulary
    model = Transformer(config.teacher.architecture, len(vocabulary), len(vocabulary))
    widen(model, 1)
    save_model(tmp_path / "teacher", model, vocabulary, vocabulary)
    return tmp_path


def in_one_process(base: Path) -> dict[str, bytes]:
    config = DistillConfig(beam=2, chunk_sentences=10)
    distill(load_model(base / "teacher"), Prepared.open(base / "data"), config, base / "one", show_progress=False)
    return files(base / "one")


def test_launched_ranks_make_what_one_process_makes(teacher_and_data: Path, tmp_path: Path) -> None:
    done = launched(tmp_path, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("two: 120 pairs") == 1
    assert {name: text for name, text in files(tmp_path / "two").items() if name != ".lock"} == in_one_process(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("doomed", ["0", "1"])
def test_a_rank_that_is_killed_loses_one_chunk_at_most(teacher_and_data: Path, tmp_path: Path, doomed: str) -> None:
    out = tmp_path / "two"
    dead = launched(tmp_path, out, doomed)
    assert dead.returncode != 0
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("chunks-*/*.npz")}
    assert kept, "the killed rank had finished a chunk"
    assert not (out / "distill.json").exists()
    [chunks] = out.glob("chunks-*")
    (tmp_path / "kept").mkdir()
    for name in kept:
        os.link(chunks / name, tmp_path / "kept" / name)
    again = launched(tmp_path, out)
    assert again.returncode == 0, again.stderr[-3000:]
    assert {name: (tmp_path / "kept" / name).stat().st_mtime_ns for name in kept} == kept
    assert {name: text for name, text in files(out).items() if name != ".lock"} == in_one_process(tmp_path)
