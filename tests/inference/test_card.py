"""README.md of an export: its numbers are those of the files, and no others."""

import copy
import hashlib
import json
import re

import pytest
import torch

from engine_fast.errors import ConfigError
from engine_fast.inference.card import find_evaluation, model_card
from engine_fast.models import load_model, save_model
from engine_fast.training.export import export
from tests.inference.exports import student, teacher, vocabulary

ROW = {
    "system": "engine", "iterations": 1, "length_beam": 3, "beam": None, "oracle_length": False, "rerank": False,
    "bleu": 27.581, "chrf": 48.44, "energy": 21.97,
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run directory whose engine stage was evaluated."""
    model = tmp_path / "run" / "engine" / "model"
    card = {"stage": "engine", "length_beam": 3, "bleu": 28.18, "updates": 500, "settings": {"lr": 0.5}}
    save_model(model, student(), vocabulary(), vocabulary(), card=card)
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    record = {"outputs_hash": "abc", "outputs": {"model/model.safetensors": {"sha256": digest}}}
    (model.parent / "stage.json").write_text(json.dumps(record))
    others = [{"system": "teacher-beam", "bleu": 99.0}, {"oracle_length": True, "bleu": 88.0}, {"bleu": 26.88}]
    results = {
        "name": "demo",
        "split": "test",
        "systems": [ROW, *(ROW | other for other in others)],
        "references": {"sentences": 1000},
        "signature": {"bleu": "nrefs:1|tok:13a", "chrf": "nc:6"},
        "hashes": {"engine outputs": "abc"},
        "corpus": {
            "corpus": "multi30k", "source_language": "de", "target_language": "en",
            "splits": {"train": {"kept": 28995}, "test": {"kept": 1000}},
        },
    }  # fmt: skip
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    return tmp_path / "run"


def change(path, edit):
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))


def export_of(run, **options):
    to = run.parent / "out"
    export(run / "engine" / "model", to, say=print, **options)
    return (to / "README.md").read_text()


def test_scores_settings_and_data_come_from_the_files(run):
    text = export_of(run)
    rows = [line for line in text.splitlines() if line.startswith("| engine")]
    assert rows == ["| engine | 1 | 3 | 27.58 | 48.4 | 21.97 |", "| engine | 1 | 3 | 26.88 | 48.4 | 21.97 |"]
    for fact in (
        "multi30k, de to en; sentence pairs: 28,995 train, 1,000 test", "`nrefs:1|tok:13a`", "1000 sentences",
        "BLEU on the validation split: 28.18", "Updates: 500", '"lr": 0.5', '"positions": "learned"',
        f"{sum(p.numel() for p in student().parameters()):,} parameters",
    ):  # fmt: skip
        assert fact in text
    assert load_model(run.parent / "out").card["updates"] == 500
    change(run / "results.json", lambda tree: tree["systems"][0].update(bleu=31.005))
    assert "| 31.00 |" in export_of(run) or "| 31.01 |" in export_of(run)


def test_scores_say_what_translated(run):
    loaded = load_model(run / "engine" / "model")
    change(run / "results.json", lambda tree: tree["systems"].append(ROW | {"system": "engine-rerank", "rerank": True}))
    evaluation = find_evaluation(run / "engine" / "model", loaded)
    ours = model_card(loaded, form="safetensors", evaluation=evaluation)
    assert "translated by engine_fast. Energy" in ours
    assert "| engine-rerank |" in ours
    small = model_card(loaded, form="onnx", evaluation=evaluation, quantization="int8")
    assert "translated by engine_fast, before its weights were stored as int8." in small
    assert "rerank" not in small  # which the script cannot do


def test_scores_of_other_weights_are_not_shown(run):
    model = run / "engine" / "model"
    loaded = load_model(model)
    assert find_evaluation(model, loaded) is not None
    other = copy.deepcopy(loaded)
    with torch.no_grad():
        other.model.output.weight[7, 3] += 1e-3
    assert find_evaluation(model, other) is None  # another checkpoint of the stage
    save_model(model, other.model, vocabulary(), vocabulary(), card=loaded.card)
    assert find_evaluation(model, load_model(model)) is None  # trained again after the stage was recorded
    text = export_of(run)
    assert "## Scores" not in text
    assert "27.58" not in text


def test_scores_of_a_stage_that_was_made_again_are_not_shown(run):
    change(run / "engine" / "stage.json", lambda tree: tree.update(outputs_hash="def"))
    assert "## Scores" not in export_of(run)
    (run / "results.json").unlink()
    assert "## Scores" not in export_of(run)


def test_the_program_of_a_model_directory_runs(run, monkeypatch, capsys):
    program = re.search(r"```python\n(.*?)```", export_of(run), re.DOTALL).group(1)
    program = program.replace("DIR", str(run.parent / "out")).replace("A sentence.", "ka lo")
    exec(compile(program, "README.md", "exec"), {})  # noqa: S102  our own text
    assert capsys.readouterr().out.strip()


def test_the_command_names_what_it_cannot_do(run):
    with pytest.raises(ConfigError, match=r"--format = 'pickle', expected one of safetensors, ctranslate2, onnx"):
        export_of(run, form="pickle")
    with pytest.raises(ConfigError, match=r"--checkpoint latest: .* has a model, and no checkpoints"):
        export_of(run, checkpoint="latest")
    for to in (run / "engine" / "model", run / "engine" / "other" / ".." / "model"):
        with pytest.raises(ConfigError, match="is a stage's own model, or what is exported"):
            export(run / "engine" / "model", to, say=print)
    with pytest.raises(ConfigError, match="--quantization = 'int8', expected float32"):
        export_of(run, quantization="int8")


def test_what_is_known_of_an_imported_teacher(tmp_path):
    save_model(tmp_path / "in", teacher(), vocabulary(), vocabulary(), card={"imported_from": "checkpoint_best.pt"})
    text = model_card(load_model(tmp_path / "in"), form="ctranslate2", quantization="int8")
    assert text.startswith("# checkpoint_best.pt\n")
    assert "as ctranslate2, int8" in text
    assert "max_decoding_length=24," in text
    assert not re.search(r"BLEU|Updates|licen[cs]e|None", text)
