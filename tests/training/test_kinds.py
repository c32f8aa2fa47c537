"""Any teacher trains any student: LSTM and transformer, BiLSTM tagger and CMLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine_fast.decoding import Translator
from engine_fast.errors import CheckpointError, ConfigError
from engine_fast.models import Student, Teacher, load_model
from engine_fast.training.export import export
from engine_fast.training.stages import train_cmlm, train_engine, train_teacher

from .conftest import ARCHITECTURE, lines_of, make_config, weights_of

LSTM = {
    "kind": "lstm", "embedding_width": 16, "encoder_width": 16, "decoder_width": 24,
    "encoder_layers": 1, "decoder_layers": 1, "max_positions": 32, "dropout": 0.1,
}  # fmt: skip
TAGGER = {"kind": "bilstm", "embedding_width": 16, "width": 16, "layers": 1, "max_positions": 32, "dropout": 0.1}
TEACHERS = {"transformer": ARCHITECTURE, "lstm": LSTM}
STUDENTS = {"cmlm": ARCHITECTURE, "tagger": TAGGER}
LEARNING = {
    "teacher__optim__lr": 5e-3, "cmlm__optim__lr": 5e-3, "engine__optim__lr": 2e-3, "engine__max_updates": 40,
}  # fmt: skip


def config_of(teacher: str, student: str, **changed):
    own = {
        "teacher__architecture": TEACHERS[teacher], "cmlm__architecture": STUDENTS[student],
        "engine__architecture": STUDENTS[student],
    }  # fmt: skip
    return make_config(**{**own, **LEARNING, **changed})


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """Stage directories of each network, trained once."""
    root, made = tmp_path_factory.mktemp("kinds"), {}

    def get(kind: str) -> Path:
        if kind not in made:
            directory = made[kind] = root / kind
            if kind in TEACHERS:
                train_teacher(config_of(kind, "cmlm"), prepared, directory)
            else:
                corpora = prepared.split("train"), prepared.split("valid")
                train_cmlm(config_of("lstm", kind), prepared, corpora[0], directory, valid_corpus=corpora[1])
        return made[kind]

    return get


@pytest.mark.parametrize("kind", [*TEACHERS, *STUDENTS])
def test_a_network_learns_and_is_stored_as_what_it_is(prepared, trained, tmp_path, kind):
    directory = trained(kind)
    losses = [line["loss"] for line in lines_of(directory, "valid")]
    assert losses[-1] < losses[0] - 0.1
    role = Teacher if kind in TEACHERS else Student
    loaded = load_model(directory / "model", kind="teacher" if role is Teacher else "student")
    assert isinstance(loaded.model, role)
    assert loaded.model.kind == kind
    (text,) = Translator(loaded).translate([next(iter(prepared.references("valid")[0]))])
    assert isinstance(text, str)
    export(directory, tmp_path / "exported", "latest", say=print)
    assert load_model(tmp_path / "exported").model.kind == kind


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_any_student_minimises_the_energy_of_any_teacher(prepared, trained, tmp_path, teacher, student):
    before = weights_of(trained(teacher))
    corpus, valid = prepared.split("train"), prepared.split("valid")
    train_engine(
        config_of(teacher, student), prepared, corpus, tmp_path / "engine", valid_corpus=valid,
        teacher_dir=trained(teacher), cmlm_dir=trained(student),
    )  # fmt: skip
    lines = lines_of(tmp_path / "engine", "valid")
    assert lines[-1]["relaxed_energy"] < lines[0]["relaxed_energy"] - 0.05
    assert load_model(tmp_path / "engine" / "model").model.kind == student
    assert weights_of(trained(teacher)) == before


@pytest.mark.parametrize(("teacher", "student"), [("lstm", "cmlm"), ("transformer", "tagger"), ("lstm", "tagger")])
def test_weights_are_shared_by_transformers_only(prepared, trained, tmp_path, teacher, student):
    config = config_of(teacher, student, cmlm__from_teacher=True)
    with pytest.raises(ConfigError, match=r"cmlm.from_teacher = True, expected false: the teacher is a (lstm|trans)"):
        train_cmlm(
            config, prepared, prepared.split("train"), tmp_path / "x",
            valid_corpus=prepared.split("valid"), teacher_dir=trained(teacher),
        )  # fmt: skip


def test_input_feeding_is_not_sharded(prepared, trained, tmp_path):
    feeding = {**LSTM, "input_feeding": True}
    with pytest.raises(ConfigError, match=r"teacher.zero_stage = 3, expected less than 3 for an LSTM with input feed"):
        train_teacher(
            config_of("lstm", "cmlm", teacher__architecture=feeding, teacher__zero_stage=3), prepared, tmp_path / "x"
        )
    train_teacher(
        config_of("lstm", "cmlm", teacher__architecture=feeding, teacher__max_updates=1), prepared, tmp_path / "teacher"
    )
    with pytest.raises(ConfigError, match=r"engine.teacher_placement = 'sharded', expected replicated for an LSTM"):
        train_engine(
            config_of("lstm", "tagger", engine__teacher_placement="sharded"), prepared, prepared.split("train"),
            tmp_path / "engine", valid_corpus=prepared.split("valid"),
            teacher_dir=tmp_path / "teacher", cmlm_dir=trained("tagger"),
        )  # fmt: skip


def test_an_lstm_is_not_compiled(prepared, tmp_path):
    with pytest.raises(ConfigError, match=r"compile = true with architecture.kind = 'lstm'"):
        train_teacher(config_of("lstm", "cmlm", teacher__compile=True), prepared, tmp_path / "x")


def test_a_model_of_the_wrong_kind_is_refused(prepared, plain_teacher, tmp_path):
    with pytest.raises(CheckpointError, match="expected a student model"):
        train_engine(
            make_config(), prepared, prepared.split("train"), tmp_path / "engine",
            valid_corpus=prepared.split("valid"), teacher_dir=plain_teacher, cmlm_dir=plain_teacher,
        )  # fmt: skip
