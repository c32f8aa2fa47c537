"""The exported student writes what ours writes, in processes that know nothing of this project."""

import json
import subprocess
import sys
import unicodedata

import pytest

from engine_fast.config import TaggerArchitecture
from engine_fast.data.symbols import EOS
from engine_fast.data.vocabulary import DictionaryVocabulary
from engine_fast.decoding import DecodeSettings, Translator
from engine_fast.errors import CheckpointError, ConfigError, DataError, VocabularyError
from engine_fast.inference import onnx, standalone
from engine_fast.inference.onnx import export_onnx
from engine_fast.models import LoadedModel, Tagger
from tests.decoding.tiny import WORDS
from tests.inference.exports import loaded, sentences, student, teacher, vocabulary

LINES = [
    *sentences(9, seed=2), "", "ka", "  lo \t mi ", unicodedata.normalize("NFD", "\u00fcka lo"), "other \u6f22 letters",
    " ".join(sentences(9, seed=3)),  # longer than the model's positions
]  # fmt: skip
SETTINGS = [(1, 1), (3, 1), (2, 4), (30, 1)]
"""Length candidates (more than there are lengths, in one case) and passes."""
ALONE = """
import json, sys
sys.path.insert(0, {directory!r})
import translate
student = translate.Student({directory!r}, threads=1)
lines = json.load(sys.stdin)
found = [student.translate(lines, length_beam=k, iterations=n, batch=4) for k, n in {settings!r}]
foreign = [name for name in sys.modules if name.split(".")[0] in ("engine_fast", "torch")]
json.dump([found, foreign], sys.stdout)
"""


@pytest.fixture(scope="module")
def model():
    return loaded(student(encoder_layers=1, decoder_layers=1), length_beam=2)


@pytest.fixture(scope="module", autouse=True)
def _traced_once():
    """Tracing takes seconds, and every export here is of one model."""
    real, made = onnx._trace, {}

    def trace(module, *arguments):
        if type(module) not in made:
            made[type(module)] = real(module, *arguments)
        return made[type(module)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "_trace", trace)
        yield


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("onnx") / "student"
    export_onnx(directory, model, readme="A student.\n")
    return directory


def alone(program, text=""):
    done = subprocess.run(
        [sys.executable, "-I", *program], input=text, capture_output=True, text=True, check=False, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def ours(model, lines, length_beam, iterations):
    settings = DecodeSettings(length_beam=length_beam, iterations=iterations)
    with pytest.warns(UserWarning, match="truncated"):
        return Translator(model, settings).translate(lines)


def test_a_process_without_this_project_writes_the_same(model, exported):
    program = ALONE.format(directory=str(exported), settings=SETTINGS)
    found, foreign = json.loads(alone(["-c", program], json.dumps(LINES)))
    assert foreign == []
    for (length_beam, iterations), lines in zip(SETTINGS, found, strict=True):
        assert lines == ours(model, LINES, length_beam, iterations)
    assert len({tuple(lines) for lines in found}) == len(SETTINGS)


def test_the_script_translates_standard_input(model, exported):
    text = "".join(line + "\n" for line in LINES)
    found = alone([str(exported / "translate.py"), "--threads", "1"], text)
    assert found.split("\n")[:-1] == ours(model, LINES, 2, 1)  # two lengths: what the card says
    assert alone([str(exported / "translate.py"), "--iterations", "3"], "ka\n") == (
        Translator(model, DecodeSettings(length_beam=2, iterations=3)).translate(["ka"])[0] + "\n"
    )


def test_the_script_reads_text_as_engine_fast_does(model, exported):
    lines = ["ka\0lo", "lo\x1bka \x9b ka", "\x85ka\tlo"]
    found = alone([str(exported / "translate.py")], "\ufeff" + "".join(line + "\n" for line in lines))
    with pytest.warns(UserWarning, match="control characters"):
        assert found.split("\n")[:-1] == Translator(model, DecodeSettings(length_beam=2)).translate(lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "0, expected 1 or more"),
        (["--threads", "-1"], "-1, expected 1 or more"),
        (["--length-beam", "0"], "0, expected 1 or more"),
        (["--model", "nowhere"], "nowhere: export.json, encode.onnx, decode.onnx not there"),
    ],
)
def test_the_script_names_what_it_cannot_do(exported, options, message):
    command = [sys.executable, "-I", str(exported / "translate.py"), *options]
    done = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_same_ids_in_batches_of_any_shape(model, exported, monkeypatch):
    runner = standalone.Student(exported, threads=1)
    rows = [[*ids, EOS] for ids in vocabulary().encode_batch(sentences(6, seed=7))]
    translator = Translator(model, DecodeSettings(length_beam=3))
    own = [hypothesis.tokens for hypothesis in translator.translate_ids(rows)]
    assert runner.search(rows, 3) == own
    assert [runner.search([row], 3)[0] for row in rows] == own
    monkeypatch.setattr(standalone, "POSITIONS", 100)  # which is fewer than one batch has
    assert runner.search(rows, 3) == own


def test_int8_is_smaller_and_runs(model, exported, tmp_path):
    export_onnx(tmp_path / "small", model, readme="", quantization="int8")
    sizes = [sum(path.stat().st_size for path in at.glob("*.onnx")) for at in (exported, tmp_path / "small")]
    assert sizes[1] < sizes[0]
    one, other = (standalone.Student(at, threads=1).translate(LINES) for at in (exported, tmp_path / "small"))
    assert sum(a == b for a, b in zip(one, other, strict=True)) >= len(LINES) // 3
    assert json.loads((tmp_path / "small" / "export.json").read_text())["quantization"] == "int8"


def test_dictionaries_read_as_ours_do(tmp_path):
    for mask in (True, False):
        own = DictionaryVocabulary([*WORDS, "part@@"], mask=mask)
        read = standalone.Words(tmp_path / own.save(tmp_path, f"mask-{mask}"))
        for text in ("mon part@@ tue", "nothing known", "", "<mask> sun </s> <unk>"):
            assert read.encode(text) == own.encode(text)
        assert read.decode([5, 11, 6]) == own.decode([5, 11, 6])


def test_what_cannot_be_exported_is_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match=r"a transformer model cannot be written as ONNX.*ctranslate2"):
        export_onnx(tmp_path / "out", loaded(teacher()), readme="")
    tagger = Tagger(TaggerArchitecture(embedding_width=8, width=8, max_positions=24), 12, 12)
    with pytest.raises(CheckpointError, match=r"a tagger model cannot be written as ONNX.*engine_fast\.load"):
        export_onnx(tmp_path / "out", LoadedModel(tagger, vocabulary(), vocabulary(), {}), readme="")
    with pytest.raises(VocabularyError, match="its own numbering"):
        export_onnx(tmp_path / "out", LoadedModel(model.model, object(), object(), {}), readme="")
    with pytest.raises(ConfigError, match=r"quantization = 'int4', expected float32 or int8"):
        export_onnx(tmp_path / "out", model, readme="", quantization="int4")
    assert list(tmp_path.iterdir()) == []


def test_never_half_written(model, tmp_path, monkeypatch):
    def fail(program, path, quantization):
        if path.name == "decode.onnx":
            raise OSError(28, "No space left on device")
        path.write_bytes(b"half")

    monkeypatch.setattr(onnx, "_save", fail)
    with pytest.raises(DataError, match=r"cannot be written \(No space left"):
        export_onnx(tmp_path / "out", model, readme="")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_refine_is_told_so(exported, tmp_path):
    runner = standalone.Student(exported, threads=1)
    runner.description["refines"] = False
    with pytest.raises(ValueError, match="so take 1"):
        runner.translate(["ka"], iterations=2)
