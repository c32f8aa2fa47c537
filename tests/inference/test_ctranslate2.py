"""The exported teacher computes what ours does, in CTranslate2's engine."""

import re
import subprocess
import sys

import ctranslate2
import pytest
import torch

from engine_fast.data.symbols import EOS
from engine_fast.data.vocabulary import DictionaryVocabulary
from engine_fast.decoding import DecodeSettings, Translator
from engine_fast.decoding.autoregressive import beam_search, greedy
from engine_fast.errors import CheckpointError, ConfigError, DataError, VocabularyError
from engine_fast.inference.card import model_card
from engine_fast.inference.ctranslate2 import export_ctranslate2
from engine_fast.models import LoadedModel, shift_right
from tests.decoding.tiny import WORDS, pad
from tests.inference.exports import loaded, sentences, student, teacher, vocabulary

KINDS = [
    {"norm": "post", "tie": "decoder"},
    {"norm": "pre", "tie": "all", "activation": "gelu"},
    {"positions": "learned", "tie": "none", "scale_embedding": False},
    {"norm": "pre", "norm_epsilon": 0.05, "encoder_layers": 3, "decoder_layers": 1, "heads": 4},
]
SUPPRESSED = {"suppress_sequences": [["<s>"], ["<pad>"], ["<mask>"]]}


def export(directory, model, **options):
    export_ctranslate2(directory / "out", model, readme="A teacher.\n", **options)
    return directory / "out"


def engine(directory, **options):
    return ctranslate2.Translator(str(directory), inter_threads=1, intra_threads=1, **options)


def run(engine, model, texts, **options):
    pieces = [model.source_vocabulary.pieces(ids) for ids in model.source_vocabulary.encode_batch(texts)]
    options = {"max_decoding_length": model.model.max_positions} | SUPPRESSED | options
    return engine.translate_batch(pieces, return_scores=True, **options)


@pytest.mark.parametrize("architecture", KINDS)
def test_the_same_probability_for_every_word(architecture, tmp_path):
    model = loaded(teacher(**architecture))
    translator = engine(export(tmp_path, model))
    sources = [[5, 9, 30, 7], [11], [40, 41, 42, 43, 44, 45, 46, 47]]
    targets = [[8, 8, 20], [33, 6, 7, 10, 51], [12]]
    pieces = vocabulary().pieces
    found = translator.score_batch([pieces(row) for row in sources], [pieces(row) for row in targets])
    target_BT = pad([[*row, EOS] for row in targets])
    log_p_BTV = model.model(pad([[*row, EOS] for row in sources]), shift_right(target_BT)).log_softmax(-1)
    for result, row, log_p_TV in zip(found, targets, log_p_BTV, strict=True):
        own = log_p_TV.gather(1, torch.tensor([*row, EOS])[:, None])[:, 0].tolist()
        assert result.log_probs == pytest.approx(own, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("architecture", KINDS)
def test_greedy_and_beam_write_the_same_words(architecture, tmp_path):
    model = loaded(teacher(**architecture | {"tie": "none"}))  # tied and random, it would repeat what it reads
    translator, texts = engine(export(tmp_path, model)), sentences(40, seed=1)
    source_BS = pad([[*ids, EOS] for ids in vocabulary().encode_batch(texts)])
    limit = model.model.max_positions
    # Nothing is forbidden, not even an end at once: CTranslate2 normalises after it forbids, and we before.
    free = {"max_length": (0.0, limit), "min_length": 0, "forbidden": ()}
    for beam in (1, 5):
        own = [[best] for best in greedy(model.model, source_BS, **free)]
        own = own if beam == 1 else beam_search(model.model, source_BS, beam=beam, **free)
        found = run(translator, model, texts, beam_size=beam, suppress_sequences=[], min_decoding_length=0)
        compared = 0
        for (hypothesis,), result in zip(own, found, strict=True):
            if beam == 1 or result.scores[0] == pytest.approx(hypothesis.score, abs=1e-4):
                words = vocabulary().pieces(hypothesis.tokens[:-1])
                assert result.hypotheses[0][: len(words)] == words
                compared += 1
        assert compared >= 10  # CTranslate2's beam goes on for longer and then finds better ones
        assert len({tuple(hypothesis.tokens) for (hypothesis,) in own}) >= 5


def test_a_dictionary_and_two_vocabularies(tmp_path):
    source, target = DictionaryVocabulary(WORDS), DictionaryVocabulary([*WORDS[::-1], "extra@@", "one", "two", "six"])
    model = teacher(size=len(target))
    model.encoder.embedding.weight.data = model.encoder.embedding.weight.data[: len(source)]
    model.source_size = len(source)
    pair = LoadedModel(model, source, target, {})
    texts = ["mon tue", "sun sat fri", "wed unknown wed"]
    own = Translator(pair, DecodeSettings(beam=1, max_length=(0.0, 20.0))).translate(texts)
    found = run(engine(export(tmp_path, pair)), pair, texts, beam_size=1, max_decoding_length=20)
    assert [(" ".join(r.hypotheses[0]) + " ").replace("@@ ", "").strip() for r in found] == own
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"source.dict.txt", "target.dict.txt", "README.md"}


def test_int8_is_smaller_and_close(tmp_path):
    model = loaded(teacher(width=64, ffn_width=128))
    whole = export(tmp_path / "a", model)
    small = export(tmp_path / "b", model, quantization="int8")
    assert (small / "model.bin").stat().st_size < 0.5 * (whole / "model.bin").stat().st_size
    source, target = [vocabulary().pieces([5, 9, 30, 7])], [vocabulary().pieces([8, 20, 6])]
    exact, near = (engine(at).score_batch(source, target)[0].log_probs for at in (whole, small))
    assert near != exact
    assert near == pytest.approx(exact, rel=0.1, abs=0.5)


def test_the_program_in_the_readme_runs_without_this_project(tmp_path):
    model = loaded(teacher(norm="pre"), stage="teacher")
    text = model_card(model, form="ctranslate2")
    export_ctranslate2(tmp_path / "out", model, readme=text)
    readme = (tmp_path / "out" / "README.md").read_text()
    program = re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)
    lines = [*sentences(3, seed=4), " ".join(sentences(9, seed=5))]  # the last is longer than the model's positions
    program = program.replace("DIR", str(tmp_path / "out")).replace('["A sentence."]', repr(lines))
    program += "\nimport sys\nassert not any(name.startswith('engine_fast') for name in sys.modules)\n"
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = run(engine(tmp_path / "out"), model, lines, beam_size=5, max_input_length=model.model.max_positions)
    ids = [[vocabulary()._processor.piece_to_id(piece) for piece in r.hypotheses[0]] for r in results]
    assert done.stdout.splitlines() == [vocabulary().decode(row) for row in ids]


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"a cmlm model cannot be written.*--format onnx"):
        export(tmp_path, loaded(student()))
    backward = teacher()
    backward.right_to_left = True
    with pytest.raises(CheckpointError, match="right-to-left"):
        export(tmp_path, loaded(backward))
    with pytest.raises(ConfigError, match=r"quantization = 'int4', expected one of float32, int8"):
        export(tmp_path, loaded(teacher()), quantization="int4")
    assert list(tmp_path.iterdir()) == []


def test_a_piece_that_stands_twice_is_refused(tmp_path):
    class Twice(DictionaryVocabulary):
        def pieces(self, ids):
            return ["same" if number > 5 else piece for number, piece in zip(ids, super().pieces(ids), strict=True)]

    words = Twice(WORDS)
    with pytest.raises(VocabularyError, match="'same' twice"):
        export(tmp_path, LoadedModel(teacher(size=len(words)), words, words, {}))


def test_never_half_written(tmp_path, monkeypatch):
    from ctranslate2.specs import TransformerSpec

    model = loaded(teacher(), note="first")
    before = (export(tmp_path, model) / "export.json").read_bytes()

    def fail(self, directory):
        (tmp_path / "out").joinpath("model.bin").stat()  # the old one is still in place
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TransformerSpec, "save", fail)
    with pytest.raises(DataError, match=r"cannot be written \(No space left"):
        export(tmp_path, loaded(teacher(seed=1)))
    assert (tmp_path / "out" / "export.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="was not written by this command"):
        export_ctranslate2(tmp_path, model, readme="")
