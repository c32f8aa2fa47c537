"""A run whose teacher exists already: of Hugging Face, of fairseq, of ours."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_fast.config import Architecture, RunConfig, SyntheticConfig, dump_config
from engine_fast.data.corpus import ParallelCorpus
from engine_fast.data.prepared import Prepared
from engine_fast.data.symbols import BOS, MASK, PAD
from engine_fast.data.synthetic import write_split
from engine_fast.decoding import generate
from engine_fast.distributed import start
from engine_fast.errors import CheckpointError, ConfigError, VocabularyError
from engine_fast.models import Transformer, load_model
from engine_fast.models.fairseq import import_fairseq
from engine_fast.recipes.execute import run_graph
from engine_fast.recipes.run import run
from engine_fast.recipes.stages import build_stages
from engine_fast.training import train_engine, train_teacher
from tests.recipes.micro import micro_config

STUDENT = {
    "width": 16, "ffn_width": 32, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "max_positions": 48,
    "tie": "all", "norm": "pre",
}  # fmt: skip


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Marian with pieces for the words of the micro corpus."""
    pytest.importorskip("transformers")
    from tests.models import hf_models

    place = tmp_path_factory.mktemp("marian")
    source, target, *_ = write_split(SyntheticConfig(num_words=12, num_train=120), place, split="train", seed=3)
    texts = tuple(path.read_text(encoding="utf-8").splitlines() for path in (source, target))
    return hf_models.marian(place / "model", texts=texts)


def config_for(path: Path, updates: int = 6, *, engine: dict[str, Any] | None = None, **pretrained: Any) -> RunConfig:
    students = {"architecture": STUDENT, "max_updates": updates, "validate_every": max(3, updates // 4)}
    teacher = {"pretrained": {"path": str(path), **pretrained}}
    return micro_config(teacher=teacher, cmlm=students, engine=engine or students)


def until(stage: str, config: RunConfig, out: Path) -> list[str]:
    """Run the stages up to `stage` in order; what they said."""
    said: list[str] = []
    world = start(config.runtime)
    stages = build_stages(config, out, world=world, say=said.append)
    names = [each.name for each in stages]
    run_graph(stages[: names.index(stage) + 1], out, world=world, say=said.append)
    return said


def test_a_corpus_is_prepared_and_distilled_by_a_marian(marian: Path, tmp_path: Path) -> None:
    config = config_for(marian)
    said = until("distill", config, tmp_path)
    assert any("data.vocabulary has no effect" in line for line in said)
    prepared = Prepared.open(tmp_path / "prepare" / "data")
    loaded = load_model(tmp_path / "teacher" / "model", kind="teacher")
    assert loaded.model.kind == "huggingface"
    assert prepared.source_vocabulary.fingerprint == loaded.source_vocabulary.fingerprint
    assert prepared.target_vocabulary.fingerprint == loaded.target_vocabulary.fingerprint
    assert {part["kind"] for part in prepared.report["vocabularies"].values()} == {"given"}

    # Distilled by the network's own generate: the same search again gives the same ids.
    corpus = ParallelCorpus.open(tmp_path / "distill" / "corpus")
    found = generate(loaded.model, torch.tensor([corpus.source(5).tolist()]), beam=config.distill.beam)
    assert corpus.target(5).tolist() == found[0][0].tokens
    assert all(not {BOS, PAD, MASK} & set(corpus.target(i).tolist()) for i in range(len(corpus)))

    assert any("done before" in line for line in until("teacher", config, tmp_path))


def test_another_file_of_the_same_path_is_noticed(marian: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(marian, tmp_path / "marian"))
    out = tmp_path / "run"
    until("teacher", config_for(copied), out)
    settings = json.loads((copied / "generation_config.json").read_text())
    (copied / "generation_config.json").write_text(json.dumps(settings | {"num_beams": 7}))
    said = until("teacher", config_for(copied), out)
    assert not any("done before" in line for line in said)


def test_a_model_directory_of_ours_is_taken_as_it_is(marian: Path, tmp_path: Path) -> None:
    until("teacher", config_for(marian), tmp_path / "first")
    directory = tmp_path / "first" / "teacher"
    until("teacher", config_for(directory), tmp_path / "second")  # the stage directory around it will do
    first, second = (load_model(tmp_path / run / "teacher" / "model") for run in ("first", "second"))
    ids = torch.tensor([[7, 9, 2]])
    assert torch.equal(first.model(ids, ids), second.model(ids, ids))  # type: ignore[operator]
    assert second.card["pretrained"] == str(directory)
    with pytest.raises(ConfigError, match=r"teacher\.pretrained\.prompt = 'x'"):
        until("teacher", config_for(directory, prompt="x"), tmp_path / "third")


def test_a_teacher_of_other_vocabularies_is_refused(marian: Path, tmp_path: Path) -> None:
    from tests.models import hf_models

    config = config_for(marian)
    until("prepare", config, tmp_path / "run")
    other = hf_models.marian(tmp_path / "other")
    prepared = Prepared.open(tmp_path / "run" / "prepare" / "data")
    with pytest.raises(VocabularyError, match="Prepare it with this configuration"):
        train_teacher(config_for(other), prepared, tmp_path / "teacher")
    student = {"architecture": STUDENT | {"max_positions": 65}}
    longer = micro_config(teacher={"pretrained": {"path": str(marian)}}, cmlm=student, engine=student)
    with pytest.raises(ConfigError, match=r"cmlm\.architecture\.max_positions = 65, expected at most 64"):
        until("teacher", longer, tmp_path / "longer")
    backwards = micro_config(teacher={"pretrained": {"path": str(marian)}, "right_to_left": True})
    with pytest.raises(ConfigError, match=r"teacher\.right_to_left"):
        train_teacher(backwards, prepared, tmp_path / "teacher")


def test_a_path_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # without waiting for a network
    with pytest.raises(CheckpointError, match="neither a directory here, nor found on the Hugging Face hub"):
        until("prepare", config_for(tmp_path / "absent"), tmp_path / "run")


def test_sharding_recomputing_and_tiling_change_no_step(marian: Path, tmp_path: Path) -> None:
    """The table and the head are lent out as modules of their own, so that ZeRO-3 finds them whole."""
    config = config_for(marian)
    until("cmlm", config, tmp_path)
    prepared = Prepared.open(tmp_path / "prepare" / "data")
    losses = []
    for number, extra in enumerate(
        ({}, {"teacher_placement": "sharded", "teacher_checkpointing": True, "head_memory": "recompute"})
    ):
        out = tmp_path / f"engine {number}"
        engine = {"architecture": STUDENT, "max_updates": 3, "valid_bleu_sentences": 0, **extra}
        train_engine(
            config_for(marian, engine=engine), prepared, ParallelCorpus.open(tmp_path / "distill" / "corpus"), out,
            valid_corpus=prepared.split("valid"), teacher_dir=tmp_path / "teacher", cmlm_dir=tmp_path / "cmlm",
        )  # fmt: skip
        lines = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        losses.append([line["loss"] for line in lines if line["kind"] == "train"])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
def test_a_marian_trains_a_student_end_to_end(marian: Path, tmp_path: Path) -> None:
    """prepare to report by the command; the student learns to please the Marian, and reloads without transformers."""
    config = config_for(marian, updates=80)
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    command = [sys.executable, "-m", "engine_fast.cli.main", "run", str(tmp_path / "config.yaml"), "--out"]
    subprocess.run([*command, str(tmp_path / "run")], check=True)
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert {row["system"] for row in results["systems"]} >= {"teacher-greedy", "teacher-beam", "cmlm", "engine"}
    energy = {(row["system"], row["iterations"]): row["energy"] for row in results["systems"]}
    assert energy["engine-oracle", 1] < energy["cmlm-oracle", 1]
    lines = (tmp_path / "run" / "engine" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    relaxed = [line["relaxed_energy"] for line in map(json.loads, lines) if "relaxed_energy" in line]
    assert relaxed[-1] < relaxed[0]
    code = (
        "import sys; sys.modules['transformers'] = None; from engine_fast.models import load_model; "
        "print(load_model(sys.argv[1], kind='student').model.kind)"
    )
    student = str(tmp_path / "run" / "engine" / "model")
    assert subprocess.run([sys.executable, "-c", code, student], capture_output=True, text=True).stdout == "cmlm\n"


@pytest.mark.slow
def test_a_fairseq_checkpoint_trains_a_student_end_to_end(tmp_path: Path) -> None:
    from tests.models.test_fairseq import fairseq_state

    source, target, *_ = write_split(SyntheticConfig(num_words=12, num_train=120), tmp_path, split="train", seed=3)
    sizes = []
    for side, path in (("source", source), ("target", target)):
        words = sorted(set(path.read_text(encoding="utf-8").split()))
        (tmp_path / f"{side}.txt").write_text("".join(f"{word} 1\n" for word in words), encoding="utf-8")
        sizes.append(len(words) + 5)
    architecture = Architecture(**{**STUDENT, "tie": "none", "norm": "post"})
    names = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    names |= {f"max_{side}_positions": 48 for side in ("source", "target")}
    state = fairseq_state(Transformer(architecture, *sizes), "fork")
    torch.save({"model": state, "args": argparse.Namespace(**names)}, tmp_path / "checkpoint.pt")
    files = tmp_path / "checkpoint.pt", tmp_path / "source.txt", tmp_path / "target.txt"
    import_fairseq(*files, tmp_path / "teacher")

    students = {"architecture": STUDENT | {"tie": "none"}}
    teacher = {"pretrained": {"path": str(tmp_path / "teacher")}}
    config = micro_config(teacher=teacher, cmlm=students, engine=students)
    results = run(config, tmp_path / "run", say=lambda line: None)
    assert results is not None
    assert {row["system"] for row in results["systems"]} >= {"teacher-greedy", "teacher-beam", "cmlm", "engine"}
    shared = {
        stage: load_model(tmp_path / "run" / stage / "model").source_vocabulary.fingerprint
        for stage in ("teacher", "cmlm", "engine")
    }
    assert set(shared.values()) == {load_model(tmp_path / "teacher").source_vocabulary.fingerprint}
