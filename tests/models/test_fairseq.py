"""Checkpoints as fairseq and its forks write them, made here from our own models."""

from __future__ import annotations

import argparse
import re
import sys
import types

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from engine_fast.cli.main import app
from engine_fast.config import Architecture
from engine_fast.data.symbols import EOS, MASK, PAD
from engine_fast.decoding import greedy
from engine_fast.energies import discrete_energy
from engine_fast.errors import CheckpointError, VocabularyError
from engine_fast.models import CMLM, Transformer, load_model, shift_right
from engine_fast.models.fairseq import convert_state, import_fairseq, rename_state

WORDS = 18
SOURCE = torch.tensor([[7, 9, 11, EOS], [6, EOS, PAD, PAD]])
TARGET = torch.tensor([[8, 5, EOS], [10, EOS, PAD]])
KINDS = {"transformer": Transformer, "cmlm": CMLM}


def build(kind: str, **switches) -> Transformer | CMLM:
    torch.manual_seed(3)
    fields = {"width": 8, "ffn_width": 12, "heads": 2, "encoder_layers": 2, "decoder_layers": 3, "max_positions": 10}
    if kind == "cmlm":
        fields |= {"positions": "learned", "activation": "gelu", "norm_epsilon": 1e-12, "scale_embedding": False}
    fields |= {"init": "normal", "init_std": 0.3} | switches
    model = KINDS[kind](Architecture(**fields), WORDS + 5, WORDS + 5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def fairseq_state(model: Transformer | CMLM, dialect: str) -> dict[str, Tensor]:
    """The model under fairseq's names: `fork` as of 2019 with q, k, v joined, `modern` with them apart."""
    cmlm = model.kind == "cmlm"
    names = [
        (r"self_attention\.in_proj\.(\w+)", r"self_attn.in_proj_\1"),
        (r"cross_attention\.kv_proj\.(\w+)", r"encoder_attn.in_proj_\1"),
        (r"self_attention\.", "self_attn."),
        (r"cross_attention\.", "encoder_attn."),
        ("cross_attention_norm", "encoder_attn_layer_norm"),
        ("self_attention_norm", "self_attn_layer_norm"),
        ("ffn_norm", "final_layer_norm"),
        (r"ffn\.expand", "fc1"),
        (r"ffn\.contract", "fc2"),
        (r"coder\.final_norm", "coder.layer_norm"),
        (r"coder\.embedding", "coder.embed_tokens"),
        ("length_embedding", "encoder.embed_lengths"),
        ("output.weight", "decoder.embed_out" if dialect == "fork" else "decoder.output_projection.weight"),
    ]
    own, state = model.state_dict(), {}
    for name, tensor in own.items():
        theirs = name
        for pattern, replacement in names:
            theirs = re.sub(pattern, replacement, theirs)
        if name.endswith("positions.weight"):
            state[name.replace("positions", "embed_positions")] = torch.cat([torch.randn(PAD + 1, 8), tensor])
        elif (name == "output.weight" and model.architecture.tie != "none" and dialect == "fork") or (
            "cross_attention.q_proj" in name and dialect == "fork"
        ):
            continue
        elif "in_proj" in theirs:
            if "encoder_attn" in theirs:
                tensor = torch.cat([own[name.replace("kv_proj", "q_proj")], tensor])
            if dialect == "fork":
                state[theirs] = tensor
            else:
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    state[theirs.replace("in_proj_", f"{letter}_proj.")] = part
        elif cmlm and "norm" in name:
            theirs = theirs.replace("weight", "gamma").replace("bias", "beta")
            if theirs.startswith("encoder.layers"):
                theirs = theirs.replace("self_attn_layer_norm", "layer_norms.0")
                theirs = theirs.replace("final_layer_norm", "layer_norms.1")
            state[theirs] = tensor
        else:
            state[theirs] = tensor
    return state | {"encoder.version": torch.tensor([3.0]), "decoder.version": torch.tensor([3.0])}


def outputs(model: Transformer | CMLM) -> Tensor:
    if isinstance(model, Transformer):
        return model(SOURCE, shift_right(TARGET))[TARGET != PAD]
    memory, lengths = model.encode(SOURCE)
    logits = model.project(model.decode(memory, torch.where(TARGET != PAD, MASK, PAD)))[TARGET != PAD]
    return torch.cat([logits, lengths[:, 1:].repeat(1, 9)[:, : logits.shape[1]]])


@pytest.mark.parametrize("dialect", ["fork", "modern"])
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("tie", ["none", "decoder", "all"])
@pytest.mark.parametrize(
    ("kind", "positions"), [("cmlm", "learned"), ("transformer", "learned"), ("transformer", "sinusoidal")]
)
def test_round_trip(kind, positions, tie, norm, dialect):
    model = build(kind, tie=tie, norm=norm, positions=positions)
    maximum = 10 if positions == "sinusoidal" else None
    architecture, converted = convert_state(
        fairseq_state(model, dialect), kind, heads=2, max_positions=maximum, init_std=0.3, init="normal"
    )
    assert architecture == model.architecture
    assert all(torch.equal(tensor, converted.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(outputs(converted), outputs(model))
    assert len(list(converted.parameters())) == len(list(model.parameters()))  # tied tensors stay one


def test_kind_is_recognised():
    assert convert_state(fairseq_state(build("cmlm"), "fork"), heads=2)[1].kind == "cmlm"
    state = fairseq_state(build("transformer"), "fork")
    assert convert_state(state, heads=2, max_positions=10)[1].kind == "transformer"


def test_tied_gradient_is_listed_once_and_is_the_sum_of_its_uses():
    """A set with all embeddings tied gives one gradient, under encoder.embed_tokens.weight."""
    tied = build("cmlm", tie="all").double()
    state = fairseq_state(tied, "fork")
    _, model = convert_state(state, heads=2)
    assert model.architecture.tie == "all"
    outputs(model).square().sum().backward()
    _, apart = convert_state(state | {"decoder.embed_out": state["decoder.embed_tokens.weight"] + 1}, heads=2)
    assert apart.architecture.tie == "none"
    with torch.no_grad():
        apart.output.weight -= 1
    outputs(apart).square().sum().backward()
    three = [apart.encoder.embedding.weight, apart.decoder.embedding.weight, apart.output.weight]
    listed = {"encoder.embed_tokens.weight": sum(table.grad for table in three)}
    ((name, gradient),) = rename_state(listed).items()
    parameters = dict(model.named_parameters())
    torch.testing.assert_close(parameters[name].grad, gradient, rtol=1e-12, atol=1e-12)
    assert not {"decoder.embedding.weight", "output.weight"} & parameters.keys()


# ---------------------------------------------------------------- files


@pytest.fixture
def files(tmp_path):
    """write(model, **changes) -> arguments of import_fairseq for a checkpoint with those top-level changes."""

    def write(model, /, *, args=None, state=None, words=WORDS, **extra):
        names = {
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "dropout": 0.3,
            "arch": "iwslt",
            "max_source_positions": 10,
            "max_target_positions": 10,
            "encoder_learned_pos": model.architecture.positions == "learned",
            "decoder_learned_pos": model.architecture.positions == "learned",
            "no_scale_embedding": not model.architecture.scale_embedding,
            "activation_fn": model.architecture.activation,
        }
        content = {
            "model": fairseq_state(model, "fork") if state is None else state,
            "args": argparse.Namespace(**(names | (args or {}))),
            "extra_state": {"epoch": 3},
        }
        torch.save(content | extra, tmp_path / "checkpoint_best.pt")
        for side in ("source", "target"):
            lines = "".join(f"word{i} {100 - i}\n" for i in range(words))
            (tmp_path / f"{side}.txt").write_text(lines, encoding="utf-8")
        return tmp_path / "checkpoint_best.pt", tmp_path / "source.txt", tmp_path / "target.txt", tmp_path / "model"

    return write


@pytest.mark.parametrize("kind", ["transformer", "cmlm"])
def test_import_writes_a_model_directory(files, kind):
    model = build(kind, dropout=0.3)
    paths = files(model)
    import_fairseq(*paths)
    loaded = load_model(paths[-1], kind=kind)
    assert torch.equal(outputs(loaded.model), outputs(model))
    assert loaded.model.architecture.dropout == 0.3
    assert loaded.card["imported_from"] == "checkpoint_best.pt"
    assert loaded.source_vocabulary.encode("word0 word3") == [5, 8]  # <mask> is 4: there are five special rows
    assert loaded.target_vocabulary.decode([8, 5, EOS]) == "word3 word0"


def test_a_dictionary_without_mask(files):
    paths = files(build("transformer"), words=WORDS + 1)
    import_fairseq(*paths)
    assert load_model(paths[-1]).source_vocabulary.encode("word0") == [4]


def test_newer_form_and_half_precision(files):
    model = build("cmlm")
    state = {name: value.half() for name, value in fairseq_state(model, "modern").items()}
    args = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    paths = files(model, state=state, cfg={"model": args, "task": {"data": "x"}}, args={"encoder_attention_heads": 4})
    import_fairseq(*paths)
    loaded = load_model(paths[-1]).model
    assert loaded.output.weight.dtype == torch.float32
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=2e-2, atol=2e-2)


def test_training_meters_are_passed_over(files, monkeypatch):
    module = types.ModuleType("fairseq.meters")
    module.AverageMeter = type("AverageMeter", (), {"__module__": "fairseq.meters"})
    monkeypatch.setitem(sys.modules, "fairseq", types.ModuleType("fairseq"))
    monkeypatch.setitem(sys.modules, "fairseq.meters", module)
    meter = module.AverageMeter()
    meter.val = 1.5
    paths = files(build("cmlm"), extra_state={"train_meters": {"train_loss": meter}})
    monkeypatch.undo()
    import_fairseq(*paths)
    assert load_model(paths[-1], kind="cmlm")


# ---------------------------------------------------------------- mistakes


def drop(state, name):
    return {key: value for key, value in state.items() if key != name}


STATE = fairseq_state(build("cmlm"), "fork")
WIDE = torch.zeros(12, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": drop(STATE, "decoder.layers.1.fc2.bias")}, r"1 missing: decoder\.layers\.1\.ffn\.contract\.bias"),
        ({"state": drop(STATE, "decoder.embed_tokens.weight")}, r"no tensor for decoder\.embedding\.weight"),
        ({"state": drop(STATE, "encoder.embed_lengths.weight")}, r"1 missing: length_embedding\.weight"),
        ({"state": STATE | {"encoder.layers.0.conv.weight": WIDE}}, r"does not know: encoder\.layers\.0\.conv\.weight"),
        ({"state": STATE | {"encoder.layers.2.fc1.weight": WIDE}}, r"encoder\.layers\.2.*expected \(12, 8\)"),
        (
            {"state": STATE | {"decoder.layers.0.fc1.weight": WIDE}},
            r"ffn\.expand\.weight \(12, 9\), expected \(12, 8\)",
        ),
        ({"state": {"encoder.version": torch.ones(1)}}, "no tensor for encoder.embedding.weight"),
        ({"args": {"decoder_attention_heads": 4}}, "encoder_attention_heads = 2, decoder_attention_heads = 4"),
        ({"args": {"encoder_attention_heads": 3, "decoder_attention_heads": 3}}, "heads = 3 does not divide"),
        ({"args": {"adaptive_softmax_cutoff": "100,200"}}, "adaptive_softmax_cutoff = '100,200'"),
        ({"words": WORDS - 2}, "source embedding has 23 rows"),
        ({"model": [1, 2]}, "'model' is a state dict"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(files, changes, message):
    paths = files(build("cmlm"), **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        import_fairseq(*paths, kind="cmlm")
    assert "\n" not in str(caught.value)
    assert "checkpoint_best.pt" in str(caught.value)
    assert not paths[-1].exists()


def test_the_wrong_kind_is_refused(files):
    paths = files(build("cmlm"), args={"encoder_learned_pos": True, "decoder_learned_pos": True})
    with pytest.raises(CheckpointError, match=r"without a place in a transformer: length_embedding\.weight"):
        import_fairseq(*paths, kind="transformer")


def test_tied_embeddings_need_one_dictionary(files):
    paths = files(build("transformer", tie="all"))
    paths[1].write_text(paths[1].read_text().replace("word3", "wort3"))
    with pytest.raises(CheckpointError, match=r"source\.txt and target\.txt differ"):
        import_fairseq(*paths)


def test_args_or_cfg_must_be_there(files):
    paths = files(build("cmlm"))
    content = torch.load(paths[0], weights_only=False)
    del content["args"]
    torch.save(content, paths[0])
    with pytest.raises(CheckpointError, match="neither 'args' nor 'cfg'"):
        import_fairseq(*paths)


def test_a_missing_file(files, tmp_path):
    _, *rest = files(build("cmlm"))
    with pytest.raises(CheckpointError, match="no such file"):
        import_fairseq(tmp_path / "absent.pt", *rest)


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint at all", None])
def test_damaged_bytes(files, damage):
    paths = files(build("cmlm"))
    content = paths[0].read_bytes()
    paths[0].write_bytes(content[: len(content) // 2] if damage is None else damage)
    with pytest.raises(CheckpointError, match="not a readable torch checkpoint"):
        import_fairseq(*paths)


def test_foreign_objects_are_refused_by_name_and_never_run(files, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    paths = files(build("cmlm"), extra_state=Payload())
    with pytest.raises(CheckpointError, match=r"object of type (io|_io)\.open"):
        import_fairseq(*paths)
    assert not (tmp_path / "ran").exists()


def test_a_dictionary_that_is_none(files):
    paths = files(build("cmlm"))
    paths[1].unlink()
    with pytest.raises(VocabularyError, match=r"source\.txt"):
        import_fairseq(*paths)


def test_command_line(files):
    checkpoint, source, target, out = files(build("cmlm"))
    command = ["import", str(checkpoint), "--source-dict", str(source), "--target-dict", str(target), "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "2+3 layers" in result.output
    assert load_model(out).model.kind == "cmlm"
    result = CliRunner().invoke(app, ["import", "absent.pt", *command[2:]])
    assert result.exit_code == 2


def test_imported_by_the_command_line_then_it_translates_and_scores(files, tmp_path):
    """The energies are those of the network the checkpoint was made of, and the translations are its own."""
    model = build("transformer")
    checkpoint, source, target, out = files(model)
    run = CliRunner().invoke
    command = ["import", str(checkpoint), "--source-dict", str(source), "--target-dict", str(target), "--to", str(out)]
    result = run(app, command)
    assert result.exit_code == 0, result.output

    lines = ["word2 word4 word6", "word1"]
    text = "\n".join(lines) + "\n"
    result = run(app, ["translate", "--model", str(out), "--beam", "1"], input=text)
    assert result.exit_code == 0, result.output
    translations = result.stdout.splitlines()
    best = greedy(model, SOURCE)
    vocabulary = load_model(out).target_vocabulary
    assert translations == [vocabulary.decode(hypothesis.tokens) for hypothesis in best]

    (tmp_path / "text.source").write_text(text, encoding="utf-8")
    (tmp_path / "text.target").write_text("word3 word0\nword5\n", encoding="utf-8")
    result = run(app, ["score", "--model", str(out), str(tmp_path / "text.source"), str(tmp_path / "text.target")])
    assert result.exit_code == 0, result.output
    with torch.no_grad():
        expected = discrete_energy(model, SOURCE, TARGET)
    assert [float(line) for line in result.stdout.splitlines()] == pytest.approx(expected.tolist(), abs=1e-4)
