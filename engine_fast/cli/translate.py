"""`engine-fast translate`: lines from standard input to lines on standard output."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from engine_fast.errors import ConfigError, DataError, VocabularyError

if TYPE_CHECKING:
    import torch

    from engine_fast.data.vocabulary import Vocabulary
    from engine_fast.decoding.mask_predict import Rescore
    from engine_fast.models import LoadedModel, Network

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "bf16"]
SIGPIPE_EXIT = 141


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
    from engine_fast.decoding import DecodeSettings, Translator
    from engine_fast.models import Student, load_model

    if sys.stdin is None or sys.stdout is None:
        raise DataError("standard input or output is closed, expected text in and text out. Redirect both, or pipe.")
    where, dtype = pick_device(device), pick_dtype(precision)
    loaded = load_model(model, device=where, dtype=dtype)
    _warn_without_effect(
        loaded.model,
        student={"iterations": iterations, "length-beam": length_beam, "rerank": rerank},
        teacher={"beam": beam, "length-penalty": length_penalty if rerank is None else None},
    )
    positions = loaded.model.max_positions
    rescore: Rescore | None = None
    if rerank is not None and isinstance(loaded.model, Student):
        judge = load_model(rerank, device=where, dtype=dtype, kind="teacher")
        rescore = _rescorer(loaded, judge)
        positions = min(positions, judge.model.max_positions)
    settings = DecodeSettings(
        beam=beam or max(5, n_best),
        iterations=iterations or 1,
        length_beam=length_beam or max(loaded.card.get("length_beam", 3), n_best),
        length_penalty=1.0 if length_penalty is None else length_penalty,
        n_best=n_best,
        max_tokens=max_tokens,
        window=window or (1 if sys.stdin.isatty() else 4096),
        max_positions=positions,
        too_long=too_long,
    )
    translator = Translator(loaded, settings, rescore)
    lengths = None if oracle_lengths is None else _lengths(oracle_lengths, loaded.target_vocabulary)
    with plain_warnings():
        found = translator.translate_n_best(read_lines(sys.stdin.buffer), lengths=lengths)
        if n_best == 1:
            write_lines(translations[0][0] for translations in found)
        else:
            write_lines(
                f"{number} ||| {text} ||| {hypothesis.score:.6f}"
                for number, translations in enumerate(found)
                for text, hypothesis in translations
            )
    if lengths is not None and next(lengths, None) is not None:
        raise DataError(f"{oracle_lengths}: has more lines than standard input, expected one for each. Align the two.")


def pick_device(device: Device) -> torch.device:
    """Raises ConfigError for a GPU that is not there."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but this torch sees no GPU. Use auto or cpu, or see `engine-fast doctor`.")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def pick_dtype(precision: Precision) -> torch.dtype:
    import torch

    return torch.bfloat16 if precision == "bf16" else torch.float32


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


def _rescorer(student: LoadedModel, judge: LoadedModel) -> Rescore:
    from engine_fast.energies import discrete_energy
    from engine_fast.models import Teacher

    for side in ("source", "target"):
        own: Vocabulary = getattr(student, f"{side}_vocabulary")
        other: Vocabulary = getattr(judge, f"{side}_vocabulary")
        if own.fingerprint != other.fingerprint:
            raise VocabularyError(
                f"--rerank: the teacher's {side} vocabulary is {other.fingerprint[:12]}, the student's "
                f"{own.fingerprint[:12]}. Rerank with the teacher that the student was trained with."
            )
    assert isinstance(judge.model, Teacher)
    return partial(discrete_energy, judge.model.requires_grad_(False))


def _lengths(references: Path, vocabulary: Vocabulary) -> Iterator[int]:
    from engine_fast.data.text import iter_lines

    return (len(vocabulary.encode(line)) + 1 for line in iter_lines(references))


def _warn_without_effect(model: Network, *, student: dict[str, object], teacher: dict[str, object]) -> None:
    from engine_fast.models import Student

    ignored = teacher if isinstance(model, Student) else student
    names = [f"--{name}" for name, value in ignored.items() if value is not None]
    if names:
        print(f"engine-fast: {', '.join(names)} without effect on a {model.kind} model", file=sys.stderr)
