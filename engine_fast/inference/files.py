"""A file of lines translated by any number of processes, and again after a kill: parts that are whole or absent."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol

from engine_fast import __version__
from engine_fast.data.atomic import only_one, replacing, require_replaceable, sha256_of
from engine_fast.data.text import DecodingErrors, decode_lines, open_binary, raw_lines
from engine_fast.decoding import TranslateReport
from engine_fast.decoding.chunks import Chunks, progress
from engine_fast.decoding.translate import Translation
from engine_fast.distributed.presence import beat
from engine_fast.errors import CheckpointError, ConfigError


class Translates(Protocol):
    """A Translator, or Workers."""

    report: TranslateReport

    @property
    def max_positions(self) -> int: ...

    def translate_n_best(self, lines: Iterable[str], *, first_line: int = 1) -> Iterator[list[Translation]]: ...


def job_of(model: Path, teacher: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What decides a translation, besides the text, as JSON: weights and vocabularies by the hash of what names them.

    settings: arguments of load(), as given.
    """
    configs = {"model": model, "teacher": teacher}
    hashes = {role: None if path is None else sha256_of(path / "config.json") for role, path in configs.items()}
    return {"engine_fast": __version__, **hashes, "settings": settings}


def render(number: int, translations: list[Translation], n_best: int) -> str:
    """What is written for line `number` (from 1): the best text, or n_best lines of `number - 1 ||| text ||| score`."""
    if n_best == 1:
        return translations[0][0]
    return "\n".join(f"{number - 1} ||| {text} ||| {hypothesis.score:.6f}" for text, hypothesis in translations)


def translate_file(
    translator: Translates,
    source: Path,
    target: Path,
    *,
    job: dict[str, Any],
    part_lines: int,
    n_best: int = 1,
    errors: DecodingErrors = "strict",
    rank: int = 0,
    world_size: int = 1,
    show_progress: bool = True,
) -> TranslateReport | None:
    """Translate a file (plain, .gz, .xz) to another; the report on all of it on rank 0, None on the others.

    Parts of part_lines lines, what a kill costs and what ranks share, are made in `target`.parts-<key>/, by all ranks;
    what is there is not made again. Rank 0 joins them in one
    step to `target` and writes `target`.json (job, counts), which is there when all is done. The same job on the same
    text is then done at once; another job's result is replaced. The result does not depend on the number of ranks,
    which share the directory and nothing else.
    Raises DataError as Translator.stream(), for a disk that refuses, ConfigError where another process works on it.
    """
    digest, starts, num_lines = _scan(source, part_lines)
    whole = {**job, "text": digest, "part_lines": part_lines, "errors": errors}
    key = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    folder = target.with_name(f"{target.name}.parts-{key[:16]}")
    parts = Chunks(folder, len(starts), ".txt", lambda: _read_report(target, key) is not None, rank, world_size)
    if not parts.is_finished():
        parts.make_directory()
        sizes = [min(part_lines, num_lines - number * part_lines) for number in range(len(starts))]
        done = sum(sizes[number] for number in parts.present())
        alone = only_one(folder) if rank == 0 else nullcontext()
        with alone, progress("translate", num_lines, done, show_progress and rank == 0) as advance:
            for number in parts.missing(passed=lambda number: advance(sizes[number])):
                first = number * part_lines + 1
                beat(f"translate: part {number + 1}")
                with open_binary(source) as stream, warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # once, of the whole, below
                    stream.seek(starts[number])
                    lines = decode_lines(islice(stream, sizes[number]), str(source), first_line=first, errors=errors)
                    texts = []
                    for place, found in enumerate(translator.translate_n_best(lines, first_line=first), start=first):
                        texts.append(render(place, found, n_best))
                        advance(1)
                parts.write(number, partial(_write_part, texts, translator.report))
            if rank == 0:
                _join(target, parts, {"key": key, **whole})
    parts.remove()
    report = _read_report(target, key) if rank == 0 else None
    if report is not None and (summary := report.summary(translator.max_positions)):
        warnings.warn(summary, stacklevel=2)
    return report


def _scan(path: Path, part_lines: int) -> tuple[str, list[int], int]:
    """sha256 of the text, where each part begins in it, and its number of lines."""
    digest, starts, position, number = hashlib.sha256(), [], 0, 0
    with open_binary(path) as stream:
        for line in raw_lines(stream, str(path)):
            if number % part_lines == 0:
                starts.append(position)
            digest.update(line)
            position += len(line)
            number += 1
            if number % part_lines == 0:
                beat(f"translate: reading {path.name}")
    return digest.hexdigest(), starts, number


def _write_part(texts: list[str], report: TranslateReport, file: IO[bytes]) -> None:
    """The report on it in the first line, then the text."""
    file.write(json.dumps(asdict(report)).encode() + b"\n")
    file.writelines(text.encode("utf-8", errors="replace") + b"\n" for text in texts)


def _join(target: Path, parts: Chunks, job: dict[str, Any]) -> None:
    """Parts, in order, to one file. The report is written last."""
    _report_path(target).unlink(missing_ok=True)
    report = TranslateReport()
    with replacing(target, "wb") as whole:
        for path in parts.paths:
            with path.open("rb") as part:
                try:
                    report.add(TranslateReport(**json.loads(part.readline())))
                except (ValueError, TypeError) as error:
                    raise CheckpointError(
                        f"{path}: damaged ({error}). Remove the file and start again: only it is redone."
                    ) from error
                shutil.copyfileobj(part, whole)
    with replacing(_report_path(target), "w") as file:
        file.write(json.dumps({**job, "report": asdict(report)}, indent=2) + "\n")


def _report_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def _read_report(target: Path, key: str) -> TranslateReport | None:
    try:
        tree = json.loads(_report_path(target).read_text(encoding="utf-8"))
        return TranslateReport(**tree["report"]) if tree["key"] == key and target.is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _require_free(target: Path) -> None:
    if target.suffix in (".gz", ".xz"):
        raise ConfigError(
            f"--output {target}: it would hold plain text. Leave out {target.suffix}, and compress after."
        )
    require_replaceable(target)
    report = _report_path(target)
    require_replaceable(report)
    if report.exists() and not _is_report(report):
        raise ConfigError(
            f"--output {target}: its report would take the place of {report}, which is none. Choose another name."
        )


def _is_report(path: Path) -> bool:
    """Whether translate_file wrote it."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and {"key", "report", "part_lines"} <= tree.keys()


def require_files(source: Path | None, target: Path | None, world_size: int) -> None:
    """Raises ConfigError for an output without an input, one that is the other or whose report would take the place of
    somebody's file, for ranks without an output; DataError for an output that is no file."""
    if target is not None and (source is None or not source.is_file()):
        raise ConfigError(
            f"--output {target} goes with --input FILE, and that is {source}: it is read again after a kill."
        )
    if target is not None and source is not None and target.exists() and target.samefile(source):
        raise ConfigError(f"--output {target}: is the --input. Choose another file.")
    if target is not None:
        _require_free(target)
    if target is None and world_size > 1:
        raise ConfigError(
            f"{world_size} ranks cannot share standard output. Give --input FILE and --output FILE, or start one."
        )
