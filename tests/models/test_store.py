"""Model directories: round trip, damage, wrong vocabularies, atomic replacement."""

import json
import shutil

import pytest
import torch

from engine_fast.config import Architecture, LSTMArchitecture, TaggerArchitecture
from engine_fast.data.vocabulary import DictionaryVocabulary
from engine_fast.errors import CheckpointError, VocabularyError
from engine_fast.models import CMLM, Transformer, load_model, save_model
from engine_fast.models.lstm import Seq2Seq
from engine_fast.models.store import copy_matching, fingerprint
from engine_fast.models.tagger import Tagger

SMALL = {"width": 16, "ffn_width": 24, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "max_positions": 12}


def vocabulary(tmp_path, words, name="words"):
    path = tmp_path / f"{name}.dict.txt"
    path.write_text("".join(f"{word} 1\n" for word in words), encoding="utf-8")
    return DictionaryVocabulary.load(path)


@pytest.fixture
def saved(tmp_path):
    source = vocabulary(tmp_path, ["a", "b", "c"])
    torch.manual_seed(0)
    model = CMLM(Architecture(**SMALL, tie="all"), len(source), len(source))
    save_model(tmp_path / "model", model, source, source, card={"bleu": 12.5})
    return tmp_path / "model", model, source


@pytest.mark.parametrize("kind", [Transformer, CMLM])
@pytest.mark.parametrize("tie", ["none", "decoder"])
def test_a_directory_gives_back_the_model(tmp_path, kind, tie):
    source, target = vocabulary(tmp_path, ["a", "b"], "s"), vocabulary(tmp_path, ["x", "y", "z"], "t")
    model = kind(Architecture(**SMALL, tie=tie), len(source), len(target))
    save_model(tmp_path / "model", model, source, target)
    loaded = load_model(tmp_path / "model", dtype=torch.bfloat16)
    assert type(loaded.model) is kind
    assert loaded.model.architecture == model.architecture
    assert not loaded.model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor.bfloat16()), name
    assert loaded.source_vocabulary.fingerprint == source.fingerprint
    assert loaded.target_vocabulary.fingerprint == target.fingerprint


def test_a_joint_vocabulary_is_stored_and_loaded_once(saved):
    directory, model, _ = saved
    loaded = load_model(directory)
    assert loaded.source_vocabulary is loaded.target_vocabulary
    assert loaded.model.output.weight is loaded.model.encoder.embedding.weight
    assert loaded.card == {"bleu": 12.5}
    assert torch.equal(loaded.model.output.weight, model.output.weight)


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        (Transformer, Architecture(**SMALL)),
        (CMLM, Architecture(**SMALL)),
        (CMLM, Architecture(**SMALL, positions="learned", init="normal")),
        (Seq2Seq, LSTMArchitecture(encoder_width=4, decoder_width=6, embedding_width=5, max_positions=12)),
        (Tagger, TaggerArchitecture(width=6, embedding_width=5, max_positions=12)),
    ],
    ids=["transformer", "cmlm", "learned", "lstm", "tagger"],
)
def test_loading_draws_no_random_numbers(tmp_path, kind, architecture):
    words = vocabulary(tmp_path, ["a", "b"])
    model = kind(architecture, len(words), len(words))
    save_model(tmp_path / "model", model, words, words)
    before = torch.get_rng_state()
    loaded = load_model(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name


def test_others_may_read_the_directory(saved):
    assert saved[0].stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in saved[0].iterdir()} == {0o644}


def test_the_other_kind_is_refused(saved):
    with pytest.raises(CheckpointError, match="holds a cmlm model, expected a transformer"):
        load_model(saved[0], kind="transformer")


def test_a_missing_directory_names_itself(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no config.json here"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["truncate", "remove", "garbage", "flip"])
def test_damaged_weights_are_named(saved, damage):
    weights = saved[0] / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if damage != "remove":
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        weights.write_bytes({"truncate": content[:middle], "garbage": b"x" * 64, "flip": flipped}[damage])
    wanted = "missing or damaged" if damage == "remove" else "its bytes have changed"
    with pytest.raises(CheckpointError, match=rf"model.safetensors: {wanted}"):
        load_model(saved[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=99), "format 99, expected 1"),
        (
            lambda c: c.update(format=None, model_type="marian"),
            "a model of Hugging Face, .* engine-fast import .* --to",
        ),
        (lambda c: c.pop("architecture"), "architecture missing"),
        (lambda c: c["architecture"].update(width=-1), "architecture cannot be used"),
        (lambda c: c["architecture"].update(ffn_width=8), r"contract.weight has shape \(16, 24\), expected \(16, 8\)"),
        (lambda c: c["architecture"].update(encoder_layers=2), "is missing"),
        (lambda c: c["architecture"].update(norm="pre"), "final_norm.* is missing"),
    ],
)
def test_a_changed_config_is_named(saved, change, message):
    path = saved[0] / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_model(saved[0])


def test_a_cut_config_is_named(saved):
    path = saved[0] / "config.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read"):
        load_model(saved[0])


def test_a_changed_vocabulary_is_refused_by_hash(saved):
    path = next(saved[0].glob("joint*"))
    path.write_text(path.read_text(encoding="utf-8").replace("b 1", "d 1"), encoding="utf-8")
    with pytest.raises(VocabularyError, match=r"hash .* but the model was trained with"):
        load_model(saved[0])


def test_a_vocabulary_of_another_size_is_not_saved(tmp_path, saved):
    _, model, source = saved
    with pytest.raises(VocabularyError, match="the source vocabulary has"):
        save_model(tmp_path / "other", model, vocabulary(tmp_path, ["a"], "one"), source)
    assert not (tmp_path / "other").exists()


def test_a_failed_write_leaves_the_old_directory_whole(saved, monkeypatch):
    directory, model, source = saved

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine_fast.models.store.save_file", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        save_model(directory, model, source, source)
    assert load_model(directory).card == {"bleu": 12.5}
    assert [p.name for p in directory.parent.iterdir() if p.name.startswith(".")] == []


def test_replacing_a_directory_swaps_it_whole(saved):
    directory, model, source = saved
    model.output.weight.data.fill_(2.0)
    save_model(directory, model, source, source, card={"bleu": 13.0})
    loaded = load_model(directory)
    assert loaded.card == {"bleu": 13.0}
    assert loaded.model.output.weight.eq(2.0).all()


def test_copy_matching_takes_what_fits():
    torch.manual_seed(1)
    teacher = Transformer(Architecture(**SMALL), 9, 9)
    student = CMLM(Architecture(**{**SMALL, "ffn_width": 8}), 9, 9)
    copied, total = copy_matching(student, teacher)
    assert 0 < copied < total
    assert torch.equal(student.embedding_table, teacher.embedding_table)
    assert student.decoder.layers[0].ffn.expand.weight.shape == (8, 16)


def test_no_temporary_directory_is_left(saved):
    names = {path.name for path in saved[0].parent.iterdir()}
    assert names == {"model", "words.dict.txt"}
    shutil.rmtree(saved[0])


@pytest.mark.parametrize("change", ["weights", "architecture", "direction"])
def test_a_fingerprint_says_all_that_decides_what_a_model_computes(tmp_path, change):
    source = vocabulary(tmp_path, ["a", "b", "c"])
    torch.manual_seed(0)
    model = Transformer(Architecture(**SMALL), len(source), len(source))
    save_model(tmp_path / "one", model, source, source, card={"bleu": 1.0})
    save_model(tmp_path / "same", model, source, source, card={"bleu": 2.0})
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "same")
    if change == "weights":
        torch.nn.init.ones_(model.output.weight)
    elif change == "architecture":
        other = Transformer(Architecture(**SMALL | {"heads": 4}), len(source), len(source))
        other.load_state_dict(model.state_dict())
        model = other
    else:
        model.right_to_left = True
    save_model(tmp_path / "other", model, source, source)
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "other")


def test_a_fingerprint_needs_weights(saved):
    directory, _, _ = saved
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="Give a directory that holds a model"):
        fingerprint(directory)
