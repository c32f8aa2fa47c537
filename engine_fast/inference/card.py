"""README.md of an exported model: what it is, what it was trained on, how good it is, how to run it.

Every number comes from a file: the model's own card, or results.json of the run that evaluated exactly these weights.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from engine_fast import __version__
from engine_fast.data.vocabulary import SentencePieceVocabulary
from engine_fast.models import LoadedModel, Student
from engine_fast.models.store import WEIGHTS, unique_state

FORMS = ("safetensors", "ctranslate2", "onnx")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a run's results.json says of one of its models."""

    rows: list[dict[str, Any]]
    """Of `systems`: those of this model whose lengths are its own."""
    results: dict[str, Any]


def find_evaluation(directory: Path, loaded: LoadedModel) -> Evaluation | None:
    """The evaluation of the model directory `directory` = RUN/STAGE/model, if RUN evaluated what stands there now and
    `loaded` has the same weights; None otherwise, also where there is no such run."""
    stage = directory.parent
    try:
        results = json.loads((stage.parent / "results.json").read_text(encoding="utf-8"))
        record = json.loads((stage / "stage.json").read_text(encoding="utf-8"))
        content = (directory / WEIGHTS).read_bytes()
        evaluated = results["hashes"][f"{stage.name} outputs"] == record["outputs_hash"]
        untouched = record["outputs"][f"model/{WEIGHTS}"]["sha256"] == hashlib.sha256(content).hexdigest()
        saved = load_file(directory / WEIGHTS)
        systems = results["systems"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
    own = {name: tensor.detach().cpu() for name, tensor in unique_state(loaded.model).items()}
    same = own.keys() == saved.keys() and all(own[name].equal(saved[name]) for name in own)
    if not (evaluated and untouched and same):
        return None
    rows = [row for row in systems if row["system"].split("-")[0] == stage.name and not row["oracle_length"]]
    return Evaluation(rows, results) if rows else None


def model_card(
    loaded: LoadedModel, *, form: str, evaluation: Evaluation | None = None, quantization: str = "float32"
) -> str:
    """Markdown; `form` is one of FORMS and decides the instructions."""
    card, model = loaded.card, loaded.model
    name = card.get("stage") or card.get("imported_from") or model.kind
    parts = [f"# {name}", _summary(loaded, evaluation, form, quantization)]
    if evaluation is not None:
        parts += ["## Scores", _scores(evaluation, form, quantization)]
    parts += ["## How to use it", _usage(loaded, form)]
    settings = {"architecture": model.architecture.model_dump(mode="json")}
    trained = {key: value for key, value in card.get("settings", {}).items() if key != "architecture"}
    if trained:
        settings["training"] = trained
    parts += ["## Settings", "```json\n" + json.dumps(settings, indent=2) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _summary(loaded: LoadedModel, evaluation: Evaluation | None, form: str, quantization: str) -> str:
    card, model = loaded.card, loaded.model
    role = "non-autoregressive student" if isinstance(model, Student) else "autoregressive teacher"
    parameters = sum(tensor.numel() for tensor in unique_state(model).values())
    lines = [
        f"- Model: {model.kind}, {role}, {parameters:,} parameters, at most {model.max_positions} tokens a side "
        "(end symbol included)",
        f"- Vocabulary: {model.source_size} source and {model.target_size} target pieces",
        f"- Written by engine_fast {__version__} as {form}" + (f", {quantization}" if form != "safetensors" else ""),
    ]
    if evaluation is not None:
        lines.insert(1, _data(evaluation.results))
    for key, text in (
        ("imported_from", "Imported from"), ("checkpoint", "Checkpoint"), ("updates", "Updates"), ("seed", "Seed"),
        ("length_beam", "Lengths tried per sentence, unless told otherwise"),
    ):  # fmt: skip
        if card.get(key) is not None:
            lines.append(f"- {text}: {card[key]}")
    if card.get("bleu") is not None:
        lines.append(f"- BLEU on the validation split: {card['bleu']:.2f}")
    if card.get("right_to_left"):
        lines.append("- Writes its translations from the last word to the first; engine_fast turns them around")
    return "\n".join(lines)


def _data(results: dict[str, Any]) -> str:
    corpus = results["corpus"]
    counts = {name: split["kept"] for name, split in corpus["splits"].items()}
    sizes = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    languages = f"{corpus['source_language']} to {corpus['target_language']}"
    return f"- Data: {corpus['corpus'] or results['name']}, {languages}; sentence pairs: {sizes}"


def _scores(evaluation: Evaluation, form: str, quantization: str) -> str:
    results = evaluation.results
    rows = [row for row in evaluation.rows if form != "onnx" or not row["rerank"]]
    stored = f", before its weights were stored as {quantization}" if quantization != "float32" else ""
    lines = [
        f"On the {results['split']} split, {results['references']['sentences']} sentences, translated by engine_fast"
        f"{stored}. Energy: nats a sentence under the run's teacher.",
        "",
        "| system | passes | beam | BLEU | chrF | energy |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        beam = row["beam"] if row["length_beam"] is None else row["length_beam"]
        passes = "" if row["iterations"] is None else row["iterations"]
        figures = f"{row['bleu']:.2f} | {row['chrf']:.1f} | {row['energy']:.2f}"
        lines.append(f"| {row['system']} | {passes} | {beam} | {figures} |")
    lines += ["", *(f"- {metric} signature: `{text}`" for metric, text in results["signature"].items())]
    if any(row["rerank"] for row in rows):
        lines.append("- rerank: the teacher chose among the lengths")
    return "\n".join(lines)


def _usage(loaded: LoadedModel, form: str) -> str:
    return {"safetensors": _use_engine_fast, "ctranslate2": _use_ctranslate2, "onnx": _use_onnx}[form](loaded)


def _use_engine_fast(_: LoadedModel) -> str:
    return """```python
import engine_fast

print(engine_fast.load("DIR").translate(["A sentence."]))
```

or `engine-fast translate --model DIR < source.txt > target.txt`."""


def _use_onnx(loaded: LoadedModel) -> str:
    passes = " [--iterations 4]" if isinstance(loaded.model, Student) and loaded.model.refines else ""
    return f"""`pip install numpy onnxruntime sentencepiece`, then

    python translate.py [--length-beam 1]{passes} < source.txt > target.txt

or in Python, with this directory on the path:

```python
from translate import Student

print(Student("DIR").translate(["A sentence."]))
```

`encode.onnx`: source (B, S) int64 ids ending in 2, padded with 1 -> states (B, S, D), length log-probabilities (B, L).
`decode.onnx`: states, source, tokens (B, K, T) int64, 4 at the slots to fill and 1 behind the last -> words, scores
(B, K, T)."""


def _use_ctranslate2(loaded: LoadedModel) -> str:
    limit = loaded.model.max_positions
    one = loaded.source_vocabulary.fingerprint == loaded.target_vocabulary.fingerprint
    if isinstance(loaded.source_vocabulary, SentencePieceVocabulary):
        package, load = " sentencepiece", "import sentencepiece\n\n"
        for side in ("source", "target"):
            file = "joint.model" if one else f"{side}.model"
            load += f'{side} = sentencepiece.SentencePieceProcessor(model_file="DIR/{file}")\n'
        cut, join = "source.encode(normal, out_type=str)", "target.decode(result.hypotheses[0])"
    else:
        package, load = "", "\n"
        cut = "[line.split() for line in normal]"
        join = '(" ".join(result.hypotheses[0]) + " ").replace("@@ ", "").strip()'
    return f"""`pip install ctranslate2{package}`, then

```python
import unicodedata

import ctranslate2
{load}
translator = ctranslate2.Translator("DIR")
lines = ["A sentence."]
normal = [" ".join(unicodedata.normalize("NFC", line).split()) for line in lines]
results = translator.translate_batch(
    {cut},
    beam_size=5,
    max_input_length={limit},
    max_decoding_length={limit},
    suppress_sequences=[["<s>"], ["<pad>"], ["<mask>"]],
)
for result in results:
    print({join})
```

An empty line is no sentence: leave it out, or CTranslate2 will invent one."""
