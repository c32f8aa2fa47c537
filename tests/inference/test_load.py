"""engine_fast.load: what it picks, what it warns of, and one clear error for each way a directory can be wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import engine_fast
from engine_fast.data.vocabulary import DictionaryVocabulary
from engine_fast.decoding import DecodeSettings, Translator
from engine_fast.energies import discrete_energy
from engine_fast.errors import CheckpointError, ConfigError, DataError, EngineFastError, VocabularyError
from engine_fast.inference.load import load, pick_device
from engine_fast.models import load_model, save_model, set_precision
from tests.decoding.tiny import SHAPE, WORDS, make_teacher, save_tiny


def test_it_is_what_the_parts_are_by_hand(student: Path) -> None:
    lines = ["mon tue wed", "", "sun sat"]
    by_hand = Translator(load_model(student), DecodeSettings(iterations=3, length_beam=2)).translate(lines)
    assert engine_fast.load(student, iterations=3, length_beam=2).translate(lines) == by_hand
    assert engine_fast.load is load
    assert not any(weight.requires_grad for weight in load(student).loaded.model.parameters())


def test_importing_the_package_stays_light() -> None:
    code = "import sys, engine_fast; assert 'torch' not in sys.modules; engine_fast.load; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        engine_fast.lode  # noqa: B018 - looked up, to fail


def test_the_card_the_settings_and_the_teacher_decide_the_rest(student: Path, teacher: Path, tmp_path: Path) -> None:
    loaded = load_model(student)
    save_model(
        tmp_path / "k", loaded.model, loaded.source_vocabulary, loaded.target_vocabulary, card={"length_beam": 7}
    )
    assert [load(path).settings.length_beam for path in (student, tmp_path / "k")] == [3, 7]
    assert load(tmp_path / "k", length_beam=2).settings.length_beam == 2
    assert load(student, n_best=5).settings.length_beam == 5
    assert load(teacher, n_best=8).settings.beam == 8
    short = make_teacher()
    short = type(short)(short.architecture.model_copy(update={"max_positions": 9}), 12, 12)
    save_tiny(tmp_path / "short", short)
    assert load(student).max_positions == SHAPE["max_positions"]
    assert load(student, teacher=tmp_path / "short").max_positions == 9
    assert load(student, teacher=tmp_path / "short", max_positions=5).max_positions == 5


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_model_and_teacher_are_brought_to_the_precision(student: Path, teacher: Path, precision: str) -> None:
    if precision == "int8" and "onednn" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no int8 products")
    translator = load(student, teacher=teacher, precision=precision)
    by_hand = load_model(student), load_model(teacher)
    for loaded in by_hand:
        set_precision(loaded.model, precision)
    rescore = partial(discrete_energy, by_hand[1].model)
    lines = ["mon tue wed", "sun sat", "thu"]
    expected = Translator(by_hand[0], DecodeSettings(max_positions=24), rescore).translate_n_best(lines)
    assert list(translator.translate_n_best(lines)) == list(expected)


def test_what_has_no_effect_is_told(student: Path, teacher: Path) -> None:
    with pytest.warns(UserWarning, match="iterations, teacher: without effect on a transformer model"):
        load(teacher, teacher=teacher, iterations=2)
    with pytest.warns(UserWarning, match="beam, length_penalty: without effect on a cmlm model"):
        load(student, beam=2, length_penalty=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(student, teacher=teacher, length_penalty=0.5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"foo": 1}, "setting = 'foo', expected one of [^.]*\\.$"),
        ({"iteration": 2}, "setting = 'iteration', expected one of .*Did you mean 'iterations'"),
        ({"iterations": 0}, "iterations = 0, expected a whole number, at least 1"),
        ({"iterations": "4"}, "iterations = '4', expected a whole number"),
        ({"length_beam": True}, "length_beam = True, expected a whole number"),
        ({"max_positions": 8.0}, "max_positions = 8.0, expected a whole number"),
        ({"max_length": 5}, "max_length = 5, expected a pair of numbers"),
        ({"length_penalty": None}, "length_penalty = None, expected a number"),
        ({"device": None}, "device = None, expected auto, cpu, cuda"),
        ({"device": "meta"}, "device = 'meta', expected auto, cpu, cuda"),
        ({"precision": "fp8"}, "precision = 'fp8', expected one of fp32, bf16, int8"),
        ({"device": "gpu"}, "device = 'gpu', expected auto, cpu, cuda"),
        ({"cuda_graphs": True, "device": "cpu"}, "cuda_graphs = True on cpu, expected a GPU"),
        ({"cuda_graphs": "yes"}, "cuda_graphs = 'yes', expected true or false"),
        ({"too_long": "drop"}, "too_long = 'drop', expected truncate, split or refuse"),
    ],
)
def test_a_wrong_setting_is_named(student: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(student, **wrong)


def test_one_string_is_not_a_list_of_sentences(student: Path) -> None:
    with pytest.raises(DataError, match=r"one string, 'mon tue', was given, expected a list"):
        load(student).translate("mon tue")
    with pytest.raises(DataError, match=r"one string, 'mon tue', was given, expected a list"):
        next(load(student).stream("mon tue"))


@pytest.mark.parametrize("line", [None, b"mon", 3])
def test_what_is_no_text_is_named(student: Path, line: Any) -> None:
    with pytest.raises(DataError, match=f"line 2: a {type(line).__name__}, expected text"):
        load(student).translate(["mon", line])


def test_each_rank_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert [str(pick_device(name)) for name in ("auto", "cuda", "cuda:1", "cpu")] == [
        "cuda:0",
        "cuda:0",
        "cuda:1",
        "cpu",
    ]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [str(pick_device(name)) for name in ("auto", "cuda", "cuda:0", "cpu")] == [
        "cuda:1",
        "cuda:1",
        "cuda:0",
        "cpu",
    ]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="'cuda:2', expected one of the 2 GPUs"):
        pick_device("auto")


def test_a_teacher_of_another_kind_or_vocabulary_is_refused(student: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a cmlm model, expected a teacher model"):
        load(student, teacher=student)
    vocabulary = DictionaryVocabulary(WORDS[::-1])
    save_model(tmp_path / "other", make_teacher().float(), vocabulary, vocabulary)
    with pytest.raises(VocabularyError, match="the teacher's source vocabulary is"):
        load(student, teacher=tmp_path / "other")


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        change(config)
        (directory / "config.json").write_text(json.dumps(config))

    return damage


def _cut(name: str) -> Callable[[Path], None]:
    return lambda d: (d / name).write_bytes((d / name).read_bytes()[:40]) and None


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, "no config.json here, so not a model directory"),
    "a file": (lambda d: (shutil.rmtree(d), d.write_text("x")), "no config.json here"),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json here"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors: missing or damaged"),
    "no vocabulary": (lambda d: (d / "joint.dict.txt").unlink(), "joint.dict.txt"),
    "cut config": (_cut("config.json"), "config.json: cannot be read"),
    "cut weights": (_cut("model.safetensors"), "model.safetensors: its bytes have changed"),
    "cut vocabulary": (_cut("joint.dict.txt"), "joint.dict.txt"),
    "binary config": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json: cannot be read"),
    "config a list": (lambda d: (d / "config.json").write_text("[1]"), "config.json: format"),
    "newer": (_config(lambda c: c.update(format=99)), "format 99, expected 1"),
    "another kind": (_config(lambda c: c.update(kind="rnn")), "with kind transformer or lstm"),
    "kind a list": (_config(lambda c: c.update(kind=["cmlm"])), "with kind transformer or lstm"),
    "no architecture": (_config(lambda c: c.pop("architecture")), "architecture missing"),
    "a wrong architecture": (_config(lambda c: c["architecture"].update(width=-1)), "architecture cannot be used"),
    "architecture a word": (_config(lambda c: c.update(architecture="big")), "architecture missing"),
    "another width": (_config(lambda c: c["architecture"].update(ffn_width=64)), "has shape"),
    "vocabularies a word": (_config(lambda c: c.update(vocabularies="joint")), "vocabularies"),
    "one vocabulary": (_config(lambda c: c["vocabularies"].pop("target")), "vocabularies"),
    "no vocabulary file": (_config(lambda c: c["vocabularies"]["source"].pop("file")), "vocabularies"),
    "no vocabulary hash": (_config(lambda c: c["vocabularies"]["source"].pop("hash")), "vocabularies"),
    "no sum": (_config(lambda c: c.update(weights={})), "weights"),
    "card a list": (_config(lambda c: c.update(card=[3])), "card"),
    "a wrong length beam": (_config(lambda c: c["card"].update(length_beam="many")), "length_beam = 'many'"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_directory_is_one_clear_error(student: Path, tmp_path: Path, case: str) -> None:
    damage, message = DAMAGES[case]
    directory = tmp_path / "model"
    shutil.copytree(student, directory)
    damage(directory)
    with pytest.raises(EngineFastError, match=message) as raised:
        load(directory)
    assert str(directory) in str(raised.value)
    assert "\n" not in str(raised.value).partition("(")[0]
