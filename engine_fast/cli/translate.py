"""`engine-fast translate`: lines from standard input to lines on standard output."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from engine_fast.errors import ConfigError, DataError

if TYPE_CHECKING:
    from engine_fast.data.text import DecodingErrors
    from engine_fast.decoding import Translator
    from engine_fast.inference.workers import Workers

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "bf16"]
DecodingPrecision = Literal["fp32", "bf16", "int8"]
CudaGraphs = Annotated[
    bool, typer.Option("--cuda-graphs", help="On a GPU: launch each stack of layers at once; for small batches.")
]
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
    remove_repeats: Annotated[
        bool, typer.Option("--remove-repeats", help="Leave out tokens equal to the one before.")
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Source tokens, times the beam, per batch. [8192; 2048 for a student on a CPU]"),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Lines read before the first is written, sorted together. [4096; 1 on a terminal]"),
    ] = None,
    too_long: Annotated[
        Literal["truncate", "split", "refuse"],
        typer.Option(help="Lines beyond the model's positions: cut off, translated in parts, or an error."),
    ] = "truncate",
    encoding_errors: Annotated[
        Literal["strict", "replace"], typer.Option(help="Bytes that are not UTF-8: an error, or U+FFFD, counted.")
    ] = "strict",
    source: Annotated[
        Path | None, typer.Option("--input", help="File instead of standard input; plain, .gz or .xz.")
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option("--output", help="File instead of standard output; goes on after a kill, shared by ranks."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of each process. [its share of the CPUs]")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the lines, on CPUs.")] = 1,
    precision: Annotated[DecodingPrecision, typer.Option(help="Of the models; int8 on a CPU.")] = "fp32",
    device: Annotated[Device, typer.Option(help="auto = cuda where there is one.")] = "auto",
    cuda_graphs: CudaGraphs = False,
) -> None:
    """Translate lines from standard input to standard output, in order; an empty line stays empty.

    With --input and --output the processes of a launcher share the work, and the same command goes on after a kill.
    """
    from engine_fast.data.text import decode_lines, open_binary
    from engine_fast.inference.files import job_of, require_files, translate_file
    from engine_fast.inference.load import load
    from engine_fast.inference.workers import Workers, use_threads

    rank, world_size = place_among_processes()
    require_files(source, target, world_size)
    if (source is None and sys.stdin is None) or (target is None and sys.stdout is None):
        raise DataError("standard input or output is closed, expected text in and text out. Redirect both, or pipe.")
    if target is not None and oracle_lengths is not None:
        raise ConfigError("--oracle-lengths goes line by line with standard output. Leave --output out.")
    waits = source is None and sys.stdin.isatty()
    given = {
        "iterations": iterations, "length_beam": length_beam, "beam": beam, "length_penalty": length_penalty,
        "max_tokens": max_tokens,
    }  # fmt: skip
    settings: dict[str, Any] = {
        "precision": precision,
        "n_best": n_best,
        "remove_repeats": remove_repeats,
        "window": window or (1 if waits else DEFAULT_WINDOW),
        "too_long": too_long,
        **{name: value for name, value in given.items() if value is not None},
    }
    how = {"teacher": rerank, "device": device, "cuda_graphs": cuda_graphs, **settings}
    errors: DecodingErrors = "strict" if encoding_errors == "strict" else "surrogateescape"
    with ExitStack() as stack:
        stack.enter_context(plain_warnings())
        translator: Translator | Workers
        if workers > 1:
            translator = stack.enter_context(Workers(model, num_workers=workers, threads=threads, **how))
        else:
            use_threads(threads, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
            translator = load(model, **how)
        if source is not None and target is not None:
            part_lines = settings["window"] * (1 if workers == 1 else 4 * workers)  # workers wait at a part's end
            report = translate_file(
                translator, source, target, job=job_of(model, rerank, settings), part_lines=part_lines, n_best=n_best,
                errors=errors, rank=rank, world_size=world_size,
            )  # fmt: skip
            if report is not None:
                print(f"{target}: {report.num_lines} lines", file=sys.stderr)
            return
        stream = sys.stdin.buffer if source is None else stack.enter_context(open_binary(source))
        lines = decode_lines(stream, "standard input" if source is None else str(source), errors=errors)
        _pipe(translator, lines, oracle_lengths, model, n_best)


def _pipe(
    translator: Translator | Workers, lines: Iterator[str], references: Path | None, model: Path, n_best: int
) -> None:
    from engine_fast.data.text import iter_lines
    from engine_fast.inference.files import render
    from engine_fast.models.store import load_vocabularies

    lengths: Iterator[int] | None = None
    if references is not None:
        encode = load_vocabularies(model)[1].encode
        lengths = (len(encode(line)) + 1 for line in iter_lines(references))
    found = translator.translate_n_best(lines, lengths=lengths)
    write_lines(render(number, each, n_best) for number, each in enumerate(found, start=1))
    if lengths is not None and next(lengths, None) is not None:
        raise DataError(f"{references}: has more lines than the input, expected one for each. Align the two.")


def place_among_processes() -> tuple[int, int]:
    """(rank, number of ranks) as a launcher says. Raises ConfigError."""
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        got = f"RANK = {rank!r} and WORLD_SIZE = {world_size!r}"
        raise ConfigError(f"{got}, expected 0 <= RANK < WORLD_SIZE. Start with a launcher, or unset both.")
    return int(rank), int(world_size)


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
