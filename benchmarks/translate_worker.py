"""One system of bench_translate in a process of its own: python -m benchmarks.translate_worker JOB

JOB is JSON: `engine` (ours, onnx, ctranslate2, huggingface), `model` (a directory), `options` of that engine,
`threads`, `texts` (a file of source lines), `forced` (target tokens that everybody writes, or null), `device`.
It prints one line of JSON when the model is loaded, and then one for each line that it reads:

{"batch": b, "sentences": n, "seconds": s}   translate the first n lines, b at a time, for at most about s seconds: the
                                             seconds of each call, none if one call would take several times as long
{"all": b}                                   translate every line once, batches of b: the translations and the seconds
{"end": true}                                peak resident memory; the process ends

Everything a user waits for is inside the clock: cutting into pieces, translating, joining. Nothing but what the engine
itself needs is imported, so that the memory is its own.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Translate = Callable[[list[str]], list[str]]
_TOO_LONG = 4.0
"""Times the cap: a batch that would take longer is left out."""
_WITHIN_CAP = 0.5
"""A batch size that is new is tried once outside of the clock, unless that alone would take this part of the time."""


def ours(job: dict[str, Any]) -> Translate:
    """engine_fast.load: a student or a teacher."""
    import torch

    import engine_fast

    torch.set_num_threads(job["threads"])
    options = dict(job["options"])
    if job["forced"] and "beam" in options:
        options["max_length"] = (0.0, job["forced"] - 1.0)
    translator = engine_fast.load(job["model"], device=job["device"], **options)
    return translator.translate


def onnx(job: dict[str, Any]) -> Translate:
    """The script that an export ships."""
    sys.path.insert(0, job["model"])
    student = importlib.import_module("translate").Student(job["model"], threads=job["threads"])
    return lambda lines: list(student.translate(lines, **job["options"]))


def ctranslate2(job: dict[str, Any]) -> Translate:
    """CTranslate2 without torch, which it would import if it could."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    import ctranslate2

    directory, options = job["model"], job["options"]
    translator = ctranslate2.Translator(
        directory, device=job["device"], compute_type=options["compute_type"], inter_threads=1,
        intra_threads=job["threads"],
    )  # fmt: skip
    facts = json.loads((Path(directory) / "export.json").read_text())
    cut, join = _pieces(Path(directory), facts["vocabularies"])
    limits = {"min_decoding_length": job["forced"], "max_decoding_length": job["forced"]}
    if not job["forced"]:
        limits = {"max_decoding_length": facts["max_positions"] - 1}
    silent = [["<s>"], ["<pad>"], ["<mask>"]]

    def run(lines: list[str]) -> list[str]:
        found = translator.translate_batch(
            cut(lines), beam_size=options["beam"], suppress_sequences=silent, max_batch_size=0, **limits
        )
        return [join(result.hypotheses[0]) for result in found]

    return run


def huggingface(job: dict[str, Any]) -> Translate:
    """transformers' generate of a Marian model of random weights."""
    import torch
    from transformers import MarianMTModel

    torch.set_num_threads(job["threads"])
    directory = Path(job["model"])
    model = MarianMTModel.from_pretrained(directory).eval().to(job["device"])
    words = json.loads((directory / "words.json").read_text())
    numbers = {word: number for number, word in enumerate(words)}
    end, pad = numbers["</s>"], numbers["<pad>"]
    if not job["forced"]:
        raise ValueError("random weights never end: force a length")

    def run(lines: list[str]) -> list[str]:
        rows = [[*(numbers[word] for word in line.split()), end] for line in lines]
        width = max(map(len, rows))
        source = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=job["device"])
        with torch.inference_mode():
            found = model.generate(
                input_ids=source, attention_mask=source != pad, num_beams=job["options"]["beam"], do_sample=False,
                min_new_tokens=job["forced"], max_new_tokens=job["forced"],
            )  # fmt: skip
        return [" ".join(words[number] for number in row if number not in (end, pad)) for row in found.tolist()]

    return run


ENGINES: dict[str, Callable[[dict[str, Any]], Translate]] = {
    "ours": ours, "onnx": onnx, "ctranslate2": ctranslate2, "huggingface": huggingface,
}  # fmt: skip


def _pieces(directory: Path, files: dict[str, Any]) -> tuple[Callable[[list[str]], Any], Callable[[list[str]], str]]:
    """How CTranslate2's user cuts lines and joins pieces."""
    if files["source"]["file"].endswith(".dict.txt"):
        return lambda lines: [line.split() for line in lines], " ".join
    import sentencepiece

    source, target = (
        sentencepiece.SentencePieceProcessor(model_file=str(directory / files[side]["file"]))
        for side in ("source", "target")
    )
    return lambda lines: source.encode(lines, out_type=str), target.decode


class Worker:
    """Answers the requests that the module's docstring lists."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._forced: int | None = job["forced"]
        self._lines = Path(job["texts"]).read_text(encoding="utf-8").splitlines()
        start = time.perf_counter()
        self._translate = ENGINES[job["engine"]](job)
        self.load_seconds = time.perf_counter() - start
        self._seen: set[int] = set()
        self._a_sentence = 0.0
        """Seconds, as far as is known."""

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if "end" in request:
            return {"peak_mib": _peak_mib()}
        if "all" in request:
            start = time.perf_counter()
            found = [line for part in self._batches(request["all"]) for line in self._translate(part)]
            return {"translations": found, "seconds": time.perf_counter() - start}
        return self._measure(request["batch"], request["sentences"], request["seconds"])

    def _measure(self, batch: int, sentences: int, cap: float) -> dict[str, Any]:
        if self._a_sentence * batch > _TOO_LONG * cap:
            return {"calls": []}
        parts = self._batches(batch)[: max(1, sentences // batch)]
        if batch not in self._seen and self._a_sentence * batch <= _WITHIN_CAP * cap:
            self._translate(parts[0])
        self._seen.add(batch)
        calls: list[float] = []
        for part in parts:
            start = time.perf_counter()
            found = self._translate(part)
            calls.append(time.perf_counter() - start)
            if len(found) != len(part) or not all(self._long_enough(line) for line in found):
                raise ValueError(f"asked for {len(part)} translations, not all of them were made: {found[:3]}")
            if sum(calls) >= cap:
                break
        done = sum(len(part) for part in parts[: len(calls)])
        self._a_sentence = sum(calls) / done
        return {"calls": calls}

    def _long_enough(self, line: str) -> bool:
        """Words and the end symbol; of a student's three lengths one is shorter by one."""
        return len(line.split()) >= (self._forced - 2 if self._forced else 1)

    def _batches(self, size: int) -> list[list[str]]:
        return [self._lines[start : start + size] for start in range(0, len(self._lines), size)]


def _peak_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise KeyError("VmHWM")


def main() -> None:
    job = json.loads(sys.argv[1])
    os.environ["OMP_NUM_THREADS"] = str(job["threads"])  # before torch or CTranslate2 is imported
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not an answer
    worker = Worker(job)
    print(json.dumps({"load_seconds": worker.load_seconds, "loaded_mib": _peak_mib()}), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(worker.answer(request)), file=out, flush=True)
        if "end" in request:
            return


if __name__ == "__main__":
    main()
