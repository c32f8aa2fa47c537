"""`engine-fast translate`: lines from standard input to lines on standard output."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from engine_fast.errors import DataError

if TYPE_CHECKING:
    from engine_fast.data.vocabulary import Vocabulary
    from engine_fast.decoding import Translator

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "bf16"]
SIGPIPE_EXIT = 141
DEFAULT_WINDOW = 4096


def translate(
    model: Annotated[Path, typer.Option(help="Model directory: a student (cmlm, engine) or a teacher.")],
    iterations: Annotated[int | None, typer.Option(min=1, help="Student: mask-predict passes. [1]")] = None,
    length_beam: Annotated[
        int | None, typer.Option(min=1, help="Student: length candidates. [the recipe's, else 3]")
    ] = None,
    beam: Annotated[int | None, typer.Option(min=1, help="Teacher: beam; 1 is greedy. [5]")] = None,
    length_penalty: Annotated[
        float | None, typer.Option(min=0, help="Teacher's scores are divided by length to this power. [1]")
    ] = None,
    n_best: Annotated[int, typer.Option(min=1, help="Above 1: lines of `line ||| text ||| score`, best first.")] = 1,
    rerank: Annotated[
        Path | None,
        typer.Option(help="Student: the teacher that chooses the length candidate of least energy per token."),
    ] = None,
    oracle_lengths: Annotated[
        Path | None, typer.Option(help="Student: reference translations whose lengths are used, one a line.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Source tokens, times the beam, per batch.")] = 8192,
    window: Annotated[
        int | None, typer.Option(min=1, help="Lines read before the first is written. [4096; 1 on a terminal]")
    ] = None,
    too_long: Annotated[
        Literal["truncate", "refuse"], typer.Option(help="For lines beyond the model's positions.")
    ] = "truncate",
    precision: Annotated[Precision, typer.Option(help="Of the models.")] = "fp32",
    device: Annotated[Device, typer.Option(help="auto = cuda where there is one.")] = "auto",
) -> None:
    """Translate lines from standard input to standard output, in order; an empty line stays empty."""
    from engine_fast.inference.load import load

    if sys.stdin is None or sys.stdout is None:
        raise DataError("standard input or output is closed, expected text in and text out. Redirect both, or pipe.")
    given = {"iterations": iterations, "length_beam": length_beam, "beam": beam, "length_penalty": length_penalty}
    with plain_warnings():
        translator = load(
            model,
            teacher=rerank,
            device=device,
            precision=precision,
            n_best=n_best,
            max_tokens=max_tokens,
            window=window or (1 if sys.stdin.isatty() else DEFAULT_WINDOW),
            too_long=too_long,
            **{name: value for name, value in given.items() if value is not None},
        )
        _translate(translator, oracle_lengths)


def _translate(translator: Translator, oracle_lengths: Path | None) -> None:
    lengths = None if oracle_lengths is None else _lengths(oracle_lengths, translator.loaded.target_vocabulary)
    found = translator.translate_n_best(read_lines(sys.stdin.buffer), lengths=lengths)
    if translator.settings.n_best == 1:
        write_lines(translations[0][0] for translations in found)
    else:
        write_lines(
            f"{number} ||| {text} ||| {hypothesis.score:.6f}"
            for number, translations in enumerate(found)
            for text, hypothesis in translations
        )
    if lengths is not None and next(lengths, None) is not None:
        raise DataError(f"{oracle_lengths}: has more lines than standard input, expected one for each. Align the two.")


def read_lines(stream: Iterable[bytes]) -> Iterator[str]:
    """Lines that end at newlines alone. Raises DataError that names the first line that is not UTF-8."""
    for number, line in enumerate(stream, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(
                f"standard input: line {number} is not UTF-8 (byte {error.object[error.start]:#04x} at position "
                f"{error.start}). Convert it, for example with iconv -t UTF-8, or remove the line."
            ) from error


def write_lines(lines: Iterable[str]) -> None:
    """Lines to standard output, each flushed. A reader that has gone ends the program quietly, as SIGPIPE would."""
    try:
        for line in lines:
            sys.stdout.buffer.write(line.encode("utf-8", errors="replace") + b"\n")
            sys.stdout.buffer.flush()
    except BrokenPipeError:
        # What is still buffered would be written, and fail, at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(SIGPIPE_EXIT) from None


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings as one line for a person: no file name, no source line."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_args, **_kwargs: print(f"engine-fast: {message}", file=sys.stderr)
        yield


def _lengths(references: Path, vocabulary: Vocabulary) -> Iterator[int]:
    from engine_fast.data.text import iter_lines

    return (len(vocabulary.encode(line)) + 1 for line in iter_lines(references))
