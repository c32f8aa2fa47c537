"""What an import refuses, each with one clear error; and the command line around it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from engine_fast.cli.main import app
from engine_fast.data.symbols import PAD
from engine_fast.errors import CheckpointError, ConfigError, EngineFastError, VocabularyError
from engine_fast.models import load_model

transformers = pytest.importorskip("transformers")

from engine_fast.models.huggingface import contract  # noqa: E402
from engine_fast.models.huggingface.importing import (  # noqa: E402
    Origin,
    import_huggingface,
    load_huggingface,
    read_vocabularies,
)
from tests.models import hf_models  # noqa: E402


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("hf")
    return {
        "marian": hf_models.marian(place / "marian"),
        "t5": hf_models.t5(place / "t5"),
        "nllb": hf_models.nllb(place / "nllb"),
    }


@pytest.fixture
def copied(models, tmp_path):
    return lambda name: Path(shutil.copytree(models[name], tmp_path / name))


def refused(origin, kind=CheckpointError):
    with pytest.raises(kind) as caught:
        load_huggingface(Origin(origin) if isinstance(origin, str) else origin)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- networks that cannot teach


def test_a_decoder_alone_lacks_get_encoder(tmp_path):
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    assert "GPT2LMHeadModel has no get_encoder(), which a teacher needs" in refused(str(tmp_path / "gpt2"))


def test_an_encoder_alone_lacks_generate(tmp_path):
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    assert "BertForMaskedLM has no generate(), which a teacher needs" in refused(str(tmp_path / "bert"))


@pytest.mark.parametrize("method", ["get_encoder", "get_decoder", "get_output_embeddings", "generate"])
def test_a_missing_method_is_named(models, method):
    network = transformers.MarianMTModel.from_pretrained(models["marian"])
    setattr(network, method, None)
    with pytest.raises(CheckpointError, match=rf"MarianMTModel has no {method}\(\)"):
        contract.check_interface(network, "here")


def test_a_decoder_without_inputs_embeds_is_named(models):
    network = transformers.MarianMTModel.from_pretrained(models["marian"])

    def forward(input_ids, encoder_hidden_states, encoder_attention_mask):
        raise AssertionError

    network.get_decoder().forward = forward
    with pytest.raises(CheckpointError, match=r"MarianDecoder has no forward\(inputs_embeds=\)"):
        contract.check_interface(network, "here")


def test_a_head_that_is_no_matrix_is_named(models):
    network = transformers.MarianMTModel.from_pretrained(models["marian"])
    network.get_output_embeddings = lambda: nn.Sequential()
    with pytest.raises(CheckpointError, match=r"no get_output_embeddings\(\) -> nn.Linear"):
        contract.check_interface(network, "here")


def test_inputs_embeds_that_mean_something_else(models, monkeypatch):
    decoder = transformers.models.marian.modeling_marian.MarianDecoder
    forward = decoder.forward

    def twisted(
        self, input_ids=None, encoder_hidden_states=None, encoder_attention_mask=None, inputs_embeds=None, **kw
    ):
        twice = None if inputs_embeds is None else inputs_embeds.flip(-1)
        return forward(
            self, input_ids=input_ids, encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask, inputs_embeds=twice, **kw,
        )  # fmt: skip

    monkeypatch.setattr(decoder, "forward", twisted)
    assert "differs from forward(input_ids=) at every scale" in refused(str(models["marian"]))


def test_logits_that_are_not_the_heads(models, monkeypatch):
    model = transformers.MarianMTModel
    forward = model.forward

    def warm(self, **kw):
        output = forward(self, **kw)
        output.logits = output.logits / 2
        return output

    monkeypatch.setattr(model, "forward", warm)
    assert "its logits are not get_output_embeddings() of its decoder's states" in refused(str(models["marian"]))


def test_a_loss_of_its_own(models, monkeypatch):
    model = transformers.MarianMTModel
    forward = model.forward

    def penalised(self, labels=None, **kw):
        output = forward(self, labels=labels, **kw)
        output.loss = None if output.loss is None else output.loss + 1e-3
        return output

    monkeypatch.setattr(model, "forward", penalised)
    assert "the energy of one-hot words is" in refused(str(models["marian"]))


def test_a_decoder_that_lets_no_gradient_through(models, monkeypatch):
    decoder = transformers.models.marian.modeling_marian.MarianDecoder
    monkeypatch.setattr(decoder, "forward", torch.no_grad()(decoder.forward))
    assert "no gradient reaches" in refused(str(models["marian"]))


def test_positions_that_depend_on_the_padding_id(copied):
    """M2M100 counts positions from its padding id: one that has another id cannot be renumbered, and it is said."""
    directory = copied("nllb")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"pad_token_id": 3}))
    origin = Origin(str(directory), source_language="deu_Latn", target_language="eng_Latn")
    assert "cannot be carried over" in refused(origin)


def test_settings_that_hold_ids_in_an_unknown_form(copied):
    directory = copied("marian")
    settings = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps(settings | {"sequence_bias": [[[5], 1.0]]}))
    assert "sets sequence_bias" in refused(str(directory))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json", "source.spm"])
def test_a_missing_file(copied, name):
    directory = copied("marian")
    (directory / name).unlink()
    message = refused(str(directory))
    assert str(directory) in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json", "target.spm"])
def test_a_damaged_file(copied, name):
    directory = copied("marian")
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[: len(content) // 2])
    assert str(directory) in refused(str(directory), EngineFastError)


def test_a_missing_tensor_is_named(copied):
    directory = copied("marian")
    state = load_file(directory / "model.safetensors")
    del state["model.decoder.layers.1.fc2.bias"]
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    assert "model.decoder.layers.1.fc2.bias" in refused(str(directory))


def test_weights_as_a_pickle_of_tensors_are_read_and_one_of_anything_else_is_never_run(copied, tmp_path):
    directory = copied("marian")
    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(state, directory / "pytorch_model.bin")
    load_huggingface(Origin(str(directory)))

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save(state | {"extra": Payload()}, directory / "pytorch_model.bin")
    assert "a pickle that holds more than tensors" in refused(str(directory))
    assert not (tmp_path / "ran").exists()


def test_a_name_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # without waiting for a network
    message = refused("nobody/no-such-model-here")
    assert "nobody/no-such-model-here: neither a directory here, nor found on the Hugging Face hub" in message


def test_without_transformers(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'engine-fast[hf]'" in refused(str(models["marian"]))


def test_a_model_directory_of_another_version(models, tmp_path):
    import_huggingface(Origin(str(models["marian"])), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99, expected 1"):
        load_model(tmp_path / "model")
    config["architecture"]["network"]["model_type"] = "no-such-network"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="cannot build the network"):
        load_model(tmp_path / "model")


# ---------------------------------------------------------------- tokenizers


def test_a_tokenizer_without_a_sentencepiece_model(copied):
    directory = copied("t5")
    transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(directory)  # as newer repositories have it
    (directory / "spiece.model").unlink()
    assert "comes without a SentencePiece model, expected one of spiece.model" in refused(
        str(directory), VocabularyError
    )


def test_a_tokenizer_that_does_more_than_its_model(models, monkeypatch):
    tokenizer = transformers.MarianTokenizer
    cut = tokenizer._tokenize
    monkeypatch.setattr(tokenizer, "_tokenize", lambda self, text: cut(self, text.upper()))
    message = refused(str(models["marian"]), VocabularyError)
    assert "the source line " in message
    assert "cannot be reproduced" in message


def test_a_list_of_pieces_in_another_order_does_not_round_trip(models, monkeypatch):
    from engine_fast.data.pieces import PieceVocabulary

    monkeypatch.setattr(PieceVocabulary, "decode", lambda self, ids: "something else")
    assert "does not round-trip" in refused(str(models["marian"]), VocabularyError)


def test_a_second_list_of_pieces_that_no_setting_names(copied):
    directory = copied("marian")
    shutil.copy(directory / "vocab.json", directory / "target_vocab.json")
    message = refused(str(directory), VocabularyError)
    assert "has a target_vocab.json, but" in message
    assert 'Add "separate_vocabs": true there' in message


def test_files_of_two_models(copied):
    directory = copied("marian")
    numbers = json.loads((directory / "vocab.json").read_text())
    others = {piece if piece in ("</s>", "<unk>", "<pad>") else f"x{i}": i for piece, i in numbers.items()}
    (directory / "vocab.json").write_text(json.dumps(others))
    assert "belong to different models" in refused(str(directory), VocabularyError)


def test_more_pieces_than_rows(copied):
    directory = copied("marian")
    numbers = json.loads((directory / "vocab.json").read_text())
    (directory / "vocab.json").write_text(json.dumps(numbers | {"more": len(numbers) + 3}))
    message = refused(str(directory), VocabularyError)
    assert f"ids go up to {len(numbers) + 3}, but the table of embeddings has {len(numbers)} rows" in message


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nllb", {}, "no source_language is given, and this model knows many: choose one of deu_Latn"),
        ("nllb", {"source_language": "deu_Latn"}, "no target_language is given"),
        ("nllb", {"source_language": "de", "target_language": "eng_Latn"}, "source_language = 'de'"),
        ("marian", {"target_language": "eng"}, "target_language = 'eng', but this model knows one pair"),
    ],
)
def test_languages(models, name, options, message):
    assert message in refused(Origin(str(models[name]), **options), ConfigError)


def test_the_vocabularies_alone_are_those_of_the_whole(models):
    for name, options in (
        ("marian", {}),
        ("t5", {}),
        ("nllb", {"source_language": "deu_Latn", "target_language": "eng_Latn"}),
    ):
        origin = Origin(str(models[name]), **options)
        alone, (_, *whole) = read_vocabularies(origin), load_huggingface(origin)
        assert [one.fingerprint for one in alone] == [one.fingerprint for one in whole]


# ---------------------------------------------------------------- the command line


def call(*arguments: object, text: str = "") -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_import_translate_and_score(models, tmp_path):
    out, source = tmp_path / "model", tmp_path / "source.txt"
    said = call("import", models["marian"], "--to", out)
    assert "marian, passes the contract" in said
    assert f"reads [{PAD}] first" in said
    lines = hf_models.lines(hf_models.GERMAN, 5, seed=11)
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for precision in ("fp32", "bf16"):
        found = call("translate", "--model", out, "--beam", 2, "--precision", precision, text=source.read_text())
        assert len(found.splitlines()) == 5
    (tmp_path / "target.txt").write_text(found, encoding="utf-8")
    energies = [float(line) for line in call("score", "--model", out, source, tmp_path / "target.txt").splitlines()]
    assert len(energies) == 5
    assert all(0 < energy < 1e4 for energy in energies)
    call("import", models["marian"], "--out", out)  # a model directory may be replaced


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "--source-dict", "x"], "--source-dict without effect on a huggingface model"),
        (["MODEL", "--format", "fairseq", "--prompt", "x"], "--prompt without effect on a fairseq model"),
        (["checkpoint.pt"], "needs --source-dict and --target-dict"),
        (["OUT"], "is a model directory already"),
    ],
)
def test_options_that_do_not_go_together(models, tmp_path, arguments, message):
    import_huggingface(Origin(str(models["marian"])), tmp_path / "out")
    places = {"MODEL": str(models["marian"]), "OUT": str(tmp_path / "out")}
    command = ["import", *(places.get(each, each) for each in arguments), "--out", str(tmp_path / "new")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert message in result.output


def test_what_is_no_model_directory_is_not_replaced(models, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    result = CliRunner().invoke(app, ["import", str(models["marian"]), "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert os.listdir(tmp_path) == ["thesis.tex"]
