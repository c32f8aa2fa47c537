"""Right-to-left teachers and ensembles through whole stages: trained, saved, continued, refused."""

import json
import shutil

import pytest
import torch

from engine_fast.data.vocabulary import DictionaryVocabulary
from engine_fast.distributed import start
from engine_fast.errors import CheckpointError, ConfigError, VocabularyError
from engine_fast.models import Transformer, load_model, save_model
from engine_fast.models.store import fingerprint
from engine_fast.recipes.stages import build_stages
from engine_fast.training import Interrupted, train_engine
from engine_fast.training.ensemble import member_hashes
from engine_fast.training.export import export

from .conftest import ARCHITECTURE, Teach, lines_of, make_config, stop_at, weights_of


@pytest.fixture(scope="module")
def backward(prepared, tmp_path_factory):
    """A right-to-left teacher of another width. Not to be written to."""
    architecture = {**ARCHITECTURE, "width": 8, "ffn_width": 24}
    teach = Teach(prepared, tmp_path_factory.mktemp("backward"))
    return teach(teacher__right_to_left=True, teacher__architecture=architecture)


@pytest.fixture
def student(prepared, plain_teacher, cmlm):
    def train(directory, **settings):
        train_engine(
            make_config(**{"engine__max_updates": 8, "engine__valid_bleu_sentences": 4, **settings}), prepared,
            prepared.split("train"), directory,
            valid_corpus=prepared.split("valid"), teacher_dir=plain_teacher, cmlm_dir=cmlm,
        )  # fmt: skip
        return directory

    return train


def member(path, **settings):
    return {"engine__ensemble": [{"path": str(path), **settings}]}


# ---------------------------------------------------------------- a teacher that reads from right to left


def test_a_trained_teacher_stays_right_to_left(backward, plain_teacher, tmp_path):
    assert load_model(backward / "model").model.right_to_left
    assert not load_model(plain_teacher / "model").model.right_to_left
    export(backward, tmp_path / "exported", "latest", say=print)
    assert load_model(tmp_path / "exported", kind="teacher").model.right_to_left
    loaded = load_model(backward / "model")
    save_model(tmp_path / "copied", loaded.model, loaded.source_vocabulary, loaded.target_vocabulary)  # without a card
    assert load_model(tmp_path / "copied").model.right_to_left


def test_its_training_is_another_and_learns(backward):
    losses = [line["loss"] for line in lines_of(backward, "valid")]
    assert losses[-1] < losses[0]
    assert all(line["bleu"] >= 0 for line in lines_of(backward, "valid"))


# ---------------------------------------------------------------- ensembles

EVERYTHING = {
    "engine__o1": "GX",
    "engine__o1_temperature": {"start": 1.5, "end": 0.2},
    "engine__predicted_lengths": True,
    "engine__repetition_weight": 0.5,
    "engine__teacher_dropout": True,
}


def test_a_stage_with_everything_goes_on_as_if_nothing_had_been(
    student, backward, plain_teacher, tmp_path, monkeypatch
):
    settings = {**EVERYTHING, **member(backward, weight=0.5)}
    whole = student(tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Interrupted):
            student(tmp_path / "parts", **settings)
    state = json.loads((tmp_path / "parts" / "checkpoints" / "update-00000005" / "state.json").read_text())
    torch.manual_seed(99)
    parts = student(tmp_path / "parts", **settings)
    assert weights_of(parts) == weights_of(whole)
    assert lines_of(parts, "train") == lines_of(whole, "train")
    assert all(line["repetition"] > 0 for line in lines_of(whole, "train"))
    valid = lines_of(whole, "valid")
    assert [line["gap"] for line in valid] == pytest.approx([a["energy"] - a["relaxed_energy"] for a in valid])
    inputs = json.loads((whole / "run.json").read_text())["inputs"]
    for name, directory in (("teacher", plain_teacher), ("teacher 2", backward)):
        assert inputs[f"{name} model"] == state[name] == fingerprint(directory / "model")


def test_each_part_changes_what_is_learnt(student, backward, tmp_path):
    """A setting that were ignored would leave the plain student."""
    parts = [
        {}, member(backward), member(backward, weight=0.5), {"engine__o1_temperature": {}},
        {"engine__predicted_lengths": True}, {"engine__repetition_weight": 0.5},
    ]  # fmt: skip
    settings = {"engine__valid_bleu_sentences": 0, "engine__max_updates": 3}
    found = {weights_of(student(tmp_path / str(number), **{**settings, **part})) for number, part in enumerate(parts)}
    assert len(found) == len(parts)


def test_a_changed_member_is_noticed(student, backward, teach, tmp_path):
    other = teach(teacher__max_updates=2)
    place = tmp_path / "member"
    shutil.copytree(backward, place)
    directory = student(tmp_path / "engine", **member(place))
    before = weights_of(directory)
    student(directory, **member(place))
    assert weights_of(directory) == before  # finished, and left alone
    shutil.rmtree(place)
    shutil.copytree(other, place)
    with pytest.raises(CheckpointError, match=r"holds checkpoints of a run whose teacher 2 model was .*; now it is"):
        student(directory, **member(place))


def test_a_recipe_notices_a_changed_member_too(backward, plain_teacher, tmp_path):
    place = tmp_path / "member"

    def settings_of(teacher, **settings):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(teacher, place)
        config = make_config(**settings)
        stages = build_stages(config, tmp_path / "run", world=start(config.runtime), say=print)
        return next(stage.settings for stage in stages if stage.name == "engine")

    one, same, other = (settings_of(each, **member(place)) for each in (backward, backward, plain_teacher))
    assert one == same != other
    assert one["members"] == member_hashes(make_config(**member(backward)).engine)
    assert "members" not in settings_of(backward)


def test_a_member_is_found_through_the_environment(backward, monkeypatch):
    monkeypatch.setenv("TEACHERS", str(backward.parent))
    config = make_config(**member("${TEACHERS}/teacher"))
    assert member_hashes(config.engine) == member_hashes(make_config(**member(backward / "model")).engine)


def test_a_missing_member_is_named(student, backward, tmp_path):
    with pytest.raises(ConfigError, match=r"engine.ensemble\[0\].path = '.*nowhere', expected a teacher's model"):
        student(tmp_path / "engine", **member(tmp_path / "nowhere"))
    shutil.copytree(backward / "model", tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"There must be config.json and model.safetensors; train that teacher first"):
        student(tmp_path / "engine", **member(tmp_path / "half"))
    assert not (tmp_path / "engine").exists()


def test_a_student_is_no_member(student, cmlm, tmp_path):
    with pytest.raises(CheckpointError, match="holds a cmlm model, expected a teacher model"):
        student(tmp_path / "engine", **member(cmlm))


def test_a_member_of_other_words_is_refused(student, backward, tmp_path):
    words = DictionaryVocabulary(["a", "b", "c"])
    model = Transformer(load_model(backward / "model").model.architecture, len(words), len(words))
    save_model(tmp_path / "other", model, words, words)
    with pytest.raises(VocabularyError, match=r"other: its source vocabulary is .*, the corpus was prepared with"):
        student(tmp_path / "engine", **member(tmp_path / "other"))
