"""translate, score and distill, from the command line."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from engine_fast.cli.main import app
from engine_fast.data.atomic import only_one
from engine_fast.data.corpus import ParallelCorpus
from engine_fast.data.symbols import EOS
from engine_fast.data.vocabulary import DictionaryVocabulary
from engine_fast.decoding import DecodeSettings, Translator
from engine_fast.energies import discrete_energy
from engine_fast.models import load_model, save_model
from tests.decoding.tiny import WORDS, make_student, make_teacher, save_tiny

TEXT = "mon tue wed\n\nsun sat\nfri\n"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "teacher", make_teacher())


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "student", make_student())


def call(*args: str | Path, stdin: str | bytes = "") -> Result:
    return CliRunner().invoke(app, [str(a) for a in args], input=stdin)


@pytest.mark.parametrize("beam", [1, 3])
def test_teacher_translates_standard_input(teacher: Path, beam: int) -> None:
    result = call("translate", "--model", teacher, "--beam", str(beam), stdin=TEXT)
    expected = Translator(load_model(teacher), DecodeSettings(beam=beam)).translate(TEXT.splitlines())
    assert result.exit_code == 0, result.stderr
    assert result.stdout.split("\n") == [*expected, ""]
    assert result.stdout.split("\n")[1] == ""


def test_student_translates_standard_input(student: Path) -> None:
    result = call("translate", "--model", student, "--iterations", "4", "--length-beam", "2", stdin=TEXT)
    settings = DecodeSettings(iterations=4, length_beam=2)
    expected = Translator(load_model(student), settings).translate(TEXT.splitlines())
    assert result.exit_code == 0, result.stderr
    assert result.stdout.split("\n") == [*expected, ""]


def test_the_recipe_decides_the_length_beam_unless_told(student: Path, tmp_path: Path) -> None:
    loaded = load_model(student)
    save_model(
        tmp_path / "one", loaded.model, loaded.source_vocabulary, loaded.target_vocabulary, card={"length_beam": 1}
    )
    by_default = {
        path: call("translate", "--model", path, "--n-best", "1", stdin=TEXT).stdout
        for path in (student, tmp_path / "one")
    }
    for path, length_beam in ((student, 3), (tmp_path / "one", 1)):
        settings = DecodeSettings(length_beam=length_beam)
        expected = Translator(loaded, settings).translate(TEXT.splitlines())
        assert by_default[path].split("\n") == [*expected, ""]
    assert by_default[student] != by_default[tmp_path / "one"]


def test_a_closed_standard_input_is_told(student: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m engine_fast.cli.main translate --model {shlex.quote(str(student))} <&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "standard input or output is closed" in done.stderr
    assert "Traceback" not in done.stderr


def test_bf16_and_nothing_at_all(student: Path) -> None:
    assert call("translate", "--model", student, "--precision", "bf16", stdin=TEXT).stdout.count("\n") == 4
    nothing = call("translate", "--model", student)
    assert (nothing.exit_code, nothing.stdout) == (0, "")


def test_n_best_lists_line_text_and_score(teacher: Path) -> None:
    rows = [
        line.split(" ||| ")
        for line in call("translate", "--model", teacher, "--n-best", "2", stdin=TEXT).stdout.splitlines()
    ]
    assert [row[0] for row in rows] == ["0", "0", "1", "2", "2", "3", "3"]
    scores = [float(row[2]) for row in rows]
    assert scores[0] >= scores[1]
    assert scores[3] >= scores[4]


def test_reranking_takes_the_candidate_of_least_energy_per_token(student: Path, teacher: Path) -> None:
    lines = [" ".join(WORDS[i : i + 3]) for i in range(5)]
    stdin = "\n".join(lines) + "\n"
    judge = load_model(teacher)
    energies = {}
    for row in call("translate", "--model", student, "--n-best", "4", stdin=stdin).stdout.splitlines():
        number, text, _ = row.split(" ||| ")
        ids = [[*judge.source_vocabulary.encode(t), EOS] for t in (lines[int(number)], text)]
        with torch.no_grad():
            energy = discrete_energy(judge.model, torch.tensor([ids[0]]), torch.tensor([ids[1]])).item()
        energies.setdefault(number, {})[text] = energy / len(ids[1])
    result = call("translate", "--model", student, "--length-beam", "4", "--rerank", teacher, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [min(found, key=found.get) for found in energies.values()]


def test_oracle_lengths_come_from_references(student: Path, tmp_path: Path) -> None:
    references = tmp_path / "references"
    references.write_text("mon\n\nmon tue wed thu fri\nsat sun\n")
    args = ("translate", "--model", student, "--length-beam", "1", "--oracle-lengths", references)
    result = call(*args, stdin="mon\n\ntue\nwed\n")
    words = [len(line.replace("<unk>", "unk").split()) for line in result.stdout.split("\n")[:-1]]
    assert words == [1, 0, 5, 2]
    assert "end after line 4" in call(*args, stdin="mon\n" * 5).stderr
    assert "has more lines than the input" in call(*args, stdin="mon\n" * 3).stderr


def test_invalid_utf8_names_the_line(teacher: Path) -> None:
    result = call("translate", "--model", teacher, "--window", "1", stdin=b"mon\ntue\n\xff\xfe\nwed\n")
    assert result.exit_code == 2
    assert "standard input: line 3 is not UTF-8 (byte 0xff" in result.stderr
    assert result.stdout.count("\n") == 2


def test_long_lines_are_told_or_refused(student: Path) -> None:
    long = " ".join(["mon"] * 30) + "\n"
    told = call("translate", "--model", student, stdin="mon\n" + long)
    assert told.exit_code == 0
    assert "engine-fast: of 2 lines: 1 longer than 24 tokens, the first in line 2, truncated" in told.stderr
    refused = call("translate", "--model", student, "--too-long", "refuse", stdin="mon\n" + long)
    assert refused.exit_code == 2
    assert "line 2: 31 tokens" in refused.stderr


def test_long_lines_are_translated_in_parts(student: Path) -> None:
    words = [WORDS[i % 7] for i in range(30)]
    result = call("translate", "--model", student, "--too-long", "split", stdin=" ".join(words) + "\nmon\n")
    parts = Translator(load_model(student)).translate([" ".join(words[:15]), " ".join(words[15:]), "mon"])
    assert result.stdout.splitlines() == [" ".join(parts[:2]), parts[2]]
    assert "engine-fast: of 2 lines: 1 longer than 24 tokens, the first in line 1, translated in parts" in result.stderr


def test_invalid_utf8_may_be_replaced_and_is_counted(teacher: Path) -> None:
    args = ("translate", "--model", teacher, "--beam", "1")
    result = call(*args, "--encoding-errors", "replace", stdin=b"mon\n\xff\xfe\n" + b"mon\n" * 30)
    assert result.exit_code == 0
    assert result.stdout.split("\n") == call(*args, stdin="mon\n\ufffd\ufffd\n" + "mon\n" * 30).stdout.split("\n")
    assert result.stderr == "engine-fast: of 32 lines: 1 with bytes that are not UTF-8, read as U+FFFD\n"


def test_another_language_is_suspected(teacher: Path) -> None:
    result = call("translate", "--model", teacher, stdin="zwei Hunde\nmon\n")
    assert "66.7% of the pieces are unknown to the vocabulary (is this the language" in result.stderr


def test_workers_write_what_one_process_writes(student: Path) -> None:
    stdin = "".join(f"{WORDS[i % 7]} {WORDS[i % 5]}\n" for i in range(30)) + "\n"
    args = ("translate", "--model", student, "--window", "4", "--n-best", "2")
    result = call(*args, "--workers", "2", "--threads", "1", stdin=stdin)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == call(*args, stdin=stdin).stdout
    assert (result.stdout.count("\n"), result.stderr) == (61, "")


def test_a_file_to_a_file(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").write_text(TEXT)
    files = ("--input", tmp_path / "in", "--output", tmp_path / "out")
    args = ("translate", "--model", student)
    result = call(*args, *files, "--window", "2")
    assert (result.exit_code, result.stdout, result.stderr.splitlines()[-1]) == (0, "", f"{tmp_path / 'out'}: 4 lines")
    assert (tmp_path / "out").read_text() == call(*args, stdin=TEXT).stdout == call(*args, *files[:2]).stdout
    assert "goes with --input" in call(*args, *files[2:]).stderr
    assert "--oracle-lengths goes" in call(*args, *files, "--oracle-lengths", tmp_path / "in").stderr
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 ranks cannot share standard output" in call(*args, stdin=TEXT).stderr


@pytest.mark.slow
def test_ranks_translate_a_file_and_a_killed_one_costs_nothing(student: Path, tmp_path: Path) -> None:
    """Rank 0 kills itself before it joins the parts; the launcher starts all again, and the parts are still there."""
    lines = [f"{WORDS[i % 7]} {WORDS[i % 5]} {WORDS[i % 3]}" for i in range(1000)]
    (tmp_path / "in").write_text("\n".join(lines) + "\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "died = os.environ.get('ENGINE_FAST_TEST_DIED')\n"
        "if died and os.environ.get('RANK') == '0':\n"
        "    from engine_fast.inference import files\n"
        "    def die(target, parts, job):\n"
        "        made = sum(path.exists() for path in parts.paths)\n"
        "        if os.path.exists(died):\n"
        "            return join(target, parts, job)\n"
        "        open(died, 'w').write(str(made))\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    join, files._join = files._join, die\n"
    )
    command = [sys.executable, "-m", "engine_fast.cli.main", "launch", "--out", tmp_path / "run", "--ranks", "2"]
    command += ["--max-restarts", "1", "--backoff", "0.1", "--", "translate", "--model", student, "--window", "50"]
    command += ["--input", tmp_path / "in", "--output", tmp_path / "out"]
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH"), str(Path.cwd())])])
    environment = {**os.environ, "PYTHONPATH": paths, "ENGINE_FAST_TEST_DIED": str(tmp_path / "died")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").read_text() == "20"
    assert (tmp_path / "out").read_text().splitlines() == Translator(load_model(student)).translate(lines)
    assert [path.name for path in tmp_path.iterdir() if "parts" in path.name] == []


def test_options_without_effect_are_told(teacher: Path, student: Path) -> None:
    told = call("translate", "--model", teacher, "--iterations", "4", "--rerank", teacher, stdin="mon\n").stderr
    assert "iterations, teacher: without effect on a transformer model" in told
    assert (
        "beam: without effect on a cmlm model"
        in call("translate", "--model", student, "--beam", "4", stdin="mon\n").stderr
    )
    assert call("translate", "--model", student, "--length-beam", "4", stdin="mon\n").stderr == ""


def test_a_wrong_model_is_refused(teacher: Path, student: Path, tmp_path: Path) -> None:
    assert "not a model directory" in call("translate", "--model", tmp_path).stderr
    (tmp_path / "model").mkdir()
    assert f"Give {tmp_path / 'model'}." in call("translate", "--model", tmp_path).stderr
    assert "expected a teacher model" in call("translate", "--model", student, "--rerank", student).stderr
    vocabulary = DictionaryVocabulary(WORDS[::-1])
    save_model(tmp_path / "other", make_teacher().float(), vocabulary, vocabulary)
    result = call("translate", "--model", student, "--rerank", tmp_path / "other", stdin=TEXT)
    assert result.exit_code == 2
    assert "source vocabulary" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_missing_gpu_is_told(teacher: Path) -> None:
    result = call("translate", "--model", teacher, "--device", "cuda")
    assert result.exit_code == 2
    assert "sees no GPU" in result.stderr


def test_a_reader_that_leaves_ends_it_quietly(teacher: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "engine_fast.cli.main",
        "translate",
        "--model",
        str(teacher),
        "--window",
        "1",
        "--beam",
        "1",
    ]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdin.write(b"mon tue\n" * 2000)
    process.stdin.close()
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141


def test_score_gives_the_energy_of_every_pair_in_order(teacher: Path, tmp_path: Path) -> None:
    sources = ["mon tue", "wed", "", "thu fri sat sun mon", "tue"]
    targets = ["sun", "mon tue wed thu", "mon", "", "tue tue"]
    (tmp_path / "src").write_text("\n".join(sources) + "\n")
    (tmp_path / "tgt").write_text("\n".join(targets) + "\n")
    result = call("score", "--model", teacher, tmp_path / "src", tmp_path / "tgt", "--max-tokens", "7")
    assert result.exit_code == 0, result.stderr
    judge = load_model(teacher)
    expected = []
    for pair in zip(sources, targets, strict=True):
        source, target = (torch.tensor([[*judge.source_vocabulary.encode(text), EOS]]) for text in pair)
        with torch.no_grad():
            expected.append(discrete_energy(judge.model, source, target).item())
    assert [float(line) for line in result.stdout.splitlines()] == pytest.approx(expected, abs=1e-4)


def test_score_refuses_what_it_cannot_score(teacher: Path, student: Path, tmp_path: Path) -> None:
    (tmp_path / "three").write_text("mon\ntue\nwed\n")
    (tmp_path / "two").write_text("mon\ntue\n")
    (tmp_path / "long").write_text("mon\n" + " ".join(["tue"] * 24) + "\nwed\n")
    result = call("score", "--model", teacher, tmp_path / "three", tmp_path / "two")
    assert result.exit_code == 2
    assert "3 lines" in result.stderr
    assert "has 2" in result.stderr
    assert result.stdout == ""
    result = call("score", "--model", teacher, tmp_path / "three", tmp_path / "long")
    assert "line 2: 25 tokens" in result.stderr
    assert "expected a teacher" in call("score", "--model", student, tmp_path / "two", tmp_path / "two").stderr
    assert "cannot be read" in call("score", "--model", teacher, tmp_path / "two", tmp_path / "none").stderr
    os.mkfifo(tmp_path / "pipe")
    assert (
        "pipe: a pipe, expected a file" in call("score", "--model", teacher, tmp_path / "two", tmp_path / "pipe").stderr
    )


def test_distill_writes_a_corpus_and_shares_it_among_ranks(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine_fast.data import prepared
    from tests.decoding.test_distill import TinyPrepared

    data = TinyPrepared(tmp_path / "train")
    monkeypatch.setattr(prepared.Prepared, "open", lambda path: data)
    args = ("distill", "--model", teacher, "--data", tmp_path, "--chunk-sentences", "7", "--beam", "2")
    result = call(*args, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "30 pairs" in result.stderr
    corpus = ParallelCorpus.open(tmp_path / "out" / "corpus")
    translated = Translator(load_model(teacher), DecodeSettings(beam=2)).translate_ids(data.rows)
    assert [corpus.target(i).tolist() for i in range(30)] == [h.tokens for h in translated]
    with only_one(tmp_path / "out"):
        result = call(*args, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "another engine-fast works here" in result.stderr
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = call(*args, "--out", tmp_path / "other")
    assert result.exit_code == 2
    assert "RANK = '2' and WORLD_SIZE = '2'" in result.stderr
    assert os.environ["RANK"] == "2"
