#!/usr/bin/env python3
"""Translate lines with an exported student: python translate.py < source.txt > target.txt

Needs numpy, onnxruntime and sentencepiece, and the files beside this one. `Student(directory).translate(lines)` is the
same for Python programs. All words of a sentence are written at once, for several lengths at once; the length whose
words are most probable on average wins.

B sentences, K length candidates, S source positions, T target positions, L length classes.
"""

from __future__ import annotations

import argparse
import codecs
import json
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

BOS, PAD, EOS, UNK, MASK = range(5)
MIN_LENGTH = 2
"""One word and EOS."""
POSITIONS = 1024
"""Target positions whose vocabulary is in memory at once."""


class Student:
    """An exported student in `directory`, on `threads` threads (0: as many as there are cores)."""

    def __init__(self, directory: str | Path, *, threads: int = 0) -> None:
        directory = Path(directory)
        self.description: dict[str, Any] = json.loads((directory / "export.json").read_text(encoding="utf-8"))
        self.max_positions = int(self.description["max_positions"])
        files = {side: entry["file"] for side, entry in self.description["vocabularies"].items()}
        self.source, self.target = (read_vocabulary(directory / files[side]) for side in ("source", "target"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._encode, self._decode = (
            onnxruntime.InferenceSession(str(directory / name), options, providers=["CPUExecutionProvider"])
            for name in ("encode.onnx", "decode.onnx")
        )

    def translate(
        self, lines: Sequence[str], *, length_beam: int | None = None, iterations: int = 1, batch: int = 32
    ) -> list[str]:
        """One line for each line, in order; an empty one stays empty. A source beyond max_positions is cut.

        length_beam: lengths tried per sentence; default, what the model was evaluated with. iterations: mask-predict
        passes, of which all but the first write the least probable words again.
        """
        beam = length_beam or int(self.description["card"].get("length_beam", 3))
        if iterations > 1 and not self.description["refines"]:
            raise ValueError(f"iterations = {iterations}: this model's words do not read each other, so take 1.")
        rows = [[*self.source.encode(normalise(line))[: self.max_positions - 1], EOS] for line in lines]
        filled = sorted((i for i, row in enumerate(rows) if len(row) > 1), key=lambda i: -len(rows[i]))
        found = [""] * len(rows)
        for start in range(0, len(filled), batch):
            chosen = filled[start : start + batch]
            for i, ids in zip(chosen, self.search([rows[i] for i in chosen], beam, iterations), strict=True):
                found[i] = self.target.decode([number for number in ids if number not in (BOS, PAD, EOS, MASK)])
        return found

    def search(self, rows: Sequence[Sequence[int]], length_beam: int, iterations: int = 1) -> list[list[int]]:
        """The ids of the best translation of each row; both end in EOS."""
        source_BS = np.full((len(rows), max(map(len, rows))), PAD, dtype=np.int64)
        for number, row in enumerate(rows):
            source_BS[number, : len(row)] = row
        states_BSD, log_p_BL = self._encode.run(None, {"source": source_BS})
        order_BL = np.argsort(-log_p_BL[:, MIN_LENGTH:], axis=1, kind="stable")
        lengths_BK = order_BL[:, :length_beam] + MIN_LENGTH
        slots_T = np.arange(lengths_BK.max())
        open_BKT = slots_T < lengths_BK[:, :, None] - 1  # the last slot is the end symbol's
        tokens_BKT = np.where(slots_T < lengths_BK[:, :, None], MASK, PAD)
        words_BKT, values_BKT = self._fill(states_BSD, source_BS, tokens_BKT)
        tokens_BKT = np.where(open_BKT, words_BKT, tokens_BKT)
        np.put_along_axis(tokens_BKT, lengths_BK[:, :, None] - 1, EOS, axis=2)
        for t in range(1, iterations):
            num_masked_BK = np.maximum((lengths_BK - 1) * (iterations - t) // iterations, 1)
            doubt_BKT = np.where(open_BKT, values_BKT, np.inf)
            rank_BKT = doubt_BKT.argsort(axis=2, kind="stable").argsort(axis=2, kind="stable")
            masked_BKT = (rank_BKT < num_masked_BK[:, :, None]) & open_BKT
            words, values = self._fill(states_BSD, source_BS, np.where(masked_BKT, MASK, tokens_BKT))
            tokens_BKT = np.where(masked_BKT, words, tokens_BKT)
            values_BKT = np.where(masked_BKT, values, values_BKT)
        average_BK = np.where(open_BKT, values_BKT, 0).sum(2, dtype=np.float32) / (lengths_BK - 1)
        best_B = average_BK.argmax(1)
        return [tokens_BKT[b, k, : lengths_BK[b, k]].tolist() for b, k in enumerate(best_B)]

    def _fill(self, states_BSD: Any, source_BS: Any, tokens_BKT: Any) -> list[Any]:
        """decode.onnx, some sentences at a time."""
        step = max(1, POSITIONS // tokens_BKT[0].size)
        parts = [
            self._decode.run(
                None,
                {
                    "states": states_BSD[start : start + step],
                    "source": source_BS[start : start + step],
                    "tokens": tokens_BKT[start : start + step],
                },
            )
            for start in range(0, len(tokens_BKT), step)
        ]
        return [np.concatenate(each) for each in zip(*parts, strict=True)]


class Words:
    """White-space tokens from a dictionary file, "token count" a line; "@@ " joins the parts of a word."""

    def __init__(self, path: Path) -> None:
        header, *lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"][: 5 if header.endswith("mask=1") else 4]
        self.tokens = [*specials, *(line.rpartition(" ")[0] for line in lines)]
        self.ids = {token: number for number, token in enumerate(self.tokens) if number >= len(specials)}

    def encode(self, text: str) -> list[int]:
        return [self.ids.get(token, UNK) for token in text.split()]

    def decode(self, ids: list[int]) -> str:
        return (" ".join(self.tokens[number] for number in ids) + " ").replace("@@ ", "").strip()


def read_vocabulary(path: Path) -> Any:
    """Whatever has encode(text) -> ids and decode(ids) -> text."""
    if path.name.endswith(".dict.txt"):
        return Words(path)
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def normalise(text: str) -> str:
    """Unicode NFC, control characters as spaces, every run of white space one space, none at either end."""
    spaced = "".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in text)
    return " ".join(unicodedata.normalize("NFC", spaced).split())


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}, expected 1 or more")
    return number


def without_mark(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines, without a byte order mark in front of the first."""
    for number, line in enumerate(lines):
        yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line


def windows(lines: Iterator[str], size: int) -> Iterator[list[str]]:
    held: list[str] = []
    for line in lines:
        held.append(line)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).parent, help="the exported directory")
    parser.add_argument("--length-beam", type=positive, help="lengths tried per sentence")
    parser.add_argument("--iterations", type=positive, default=1, help="mask-predict passes")
    parser.add_argument("--threads", type=positive, help="default: as many as there are cores")
    parser.add_argument("--batch", type=positive, default=32, help="sentences at once")
    options = parser.parse_args()
    missing = [name for name in ("export.json", "encode.onnx", "decode.onnx") if not (options.model / name).is_file()]
    if missing:
        parser.error(f"--model {options.model}: {', '.join(missing)} not there, expected an exported directory")
    student = Student(options.model, threads=options.threads or 0)
    if options.iterations > 1 and not student.description["refines"]:
        parser.error("--iterations: this model's words do not read each other, so take 1")
    lines = (line.decode("utf-8", errors="replace").rstrip("\n") for line in without_mark(sys.stdin.buffer))
    for window in windows(lines, 1024):
        for line in student.translate(
            window, length_beam=options.length_beam, iterations=options.iterations, batch=options.batch
        ):
            sys.stdout.buffer.write(line.replace("\n", " ").encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
