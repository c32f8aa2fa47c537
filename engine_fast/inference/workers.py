"""Processes that each load the model and translate the windows dealt to them; text comes back in order.

They pay where a batch leaves a core idle: tokenisation, sorting and Python's share of decoding run on one thread.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

import torch

from engine_fast.decoding import DecodeSettings, TranslateReport
from engine_fast.decoding.translate import Translation, windows
from engine_fast.distributed.presence import beat
from engine_fast.errors import DistributedError, EngineFastError, require
from engine_fast.inference.load import load, pick_device

_Job = tuple[list[str], int, Sequence[int] | None]
"""Window, number of its first line, known lengths."""
_Result = tuple[list[list[Translation]], TranslateReport]
_AHEAD = 2
"""Windows per worker that are read and not yet written."""


class Workers:
    """A Translator's stream() and translate_n_best(), computed by several processes on CPUs; the same text.

    Weights are in memory once per worker. Use it as a context manager, and in a script below
    `if __name__ == "__main__":`, because the processes import the script.
    """

    def __init__(self, path: str | Path, *, num_workers: int, threads: int | None = None, **how: Any) -> None:
        """how: arguments of load(). threads: of each worker; default: its share of the CPUs, or OMP_NUM_THREADS.

        Raises what load() raises, ConfigError for GPUs (start one process a GPU with `engine-fast launch`).
        """
        require(num_workers >= 1, "workers", num_workers, "at least 1")
        device = pick_device(how.get("device", "auto"))
        hint = "For GPUs: `engine-fast launch -- translate --input FILE --output FILE`, one process each."
        require(device.type == "cpu", "workers", num_workers, f"device cpu, and it is {device}", hint)
        self.report = TranslateReport()
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._running: dict[int, tuple[int, str]] = {}  # worker -> number of its window, what it does
        context = get_context("spawn")
        try:
            for _ in range(num_workers):
                ours, theirs = context.Pipe()
                self._pipes.append(ours)
                process = context.Process(target=_work, args=(theirs, path, how, threads, num_workers), daemon=True)
                process.start()
                self._processes.append(process)
                theirs.close()
            answers = [self._receive(worker, "loading the model") for worker in range(num_workers)]
            for answer in answers:
                if isinstance(answer, EngineFastError):
                    raise answer
        except BaseException:
            self.close()
            raise
        self.settings: DecodeSettings = answers[0][0]
        self.max_positions: int = answers[0][1]
        for warning in answers[0][2]:
            warnings.warn(warning, stacklevel=2)

    @property
    def pids(self) -> list[int]:
        """Of the processes."""
        return [process.pid for process in self._processes if process.pid is not None]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()

    def stream(
        self, lines: Iterable[str], *, lengths: Iterable[int] | None = None, first_line: int = 1
    ) -> Iterator[str]:
        """As Translator.stream()."""
        for translations in self.translate_n_best(lines, lengths=lengths, first_line=first_line):
            yield translations[0][0]

    def translate_n_best(
        self, lines: Iterable[str], *, lengths: Iterable[int] | None = None, first_line: int = 1
    ) -> Iterator[list[Translation]]:
        """As Translator.translate_n_best(), with two windows per worker in memory.

        An error, of a line or of a worker that died, is raised when its turn comes: what is before it is whole.
        """
        for worker, (_, doing) in self._running.items():  # of a stream that was left before its end
            self._receive(worker, doing)
        self._running.clear()
        running = self._running
        self.report = TranslateReport()
        jobs: Iterator[_Job] | None = self._jobs(lines, lengths, first_line)
        idle = list(range(len(self._pipes)))
        done: dict[int, _Result | EngineFastError] = {}
        read = written = 0
        try:
            while True:
                while jobs is not None and idle and read - written < _AHEAD * len(self._pipes):
                    try:
                        job = next(jobs, None)
                    except EngineFastError as error:
                        done[read], jobs = error, None
                        break
                    if job is None:
                        jobs = None
                        break
                    worker = idle.pop()
                    running[worker] = read, f"translating lines {job[1]} to {job[1] + len(job[0]) - 1}"
                    self._send(worker, job)
                    read += 1
                if written in done:
                    result = done.pop(written)
                    if isinstance(result, EngineFastError):
                        raise result
                    found, report = result
                    self.report.add(report)
                    written += 1
                    yield from found
                elif running:
                    for worker in self._ready(running):
                        number, doing = running.pop(worker)
                        done[number] = self._receive(worker, doing)
                        idle.append(worker)
                else:
                    return
        finally:
            summary = self.report.summary(self.max_positions)
            if summary:
                warnings.warn(summary, stacklevel=2)

    def _jobs(self, lines: Iterable[str], lengths: Iterable[int] | None, first_line: int) -> Iterator[_Job]:
        known = None if lengths is None else iter(lengths)
        for window in windows(lines, self.settings.window):
            yield window, first_line, None if known is None else list(islice(known, len(window)))
            first_line += len(window)

    def _send(self, worker: int, job: _Job) -> None:
        try:
            self._pipes[worker].send(job)
        except OSError:
            pass  # it is gone, which is told when its answer is due

    def _ready(self, running: Iterable[int]) -> list[int]:
        pipes = {self._pipes[worker]: worker for worker in running}
        while not (ready := wait(pipes, timeout=1.0)):
            beat("translate: workers at work")
        return [pipes[pipe] for pipe in ready if isinstance(pipe, Connection)]

    def _receive(self, worker: int, doing: str) -> Any:
        try:
            return self._pipes[worker].recv()
        except (EOFError, OSError):
            process = self._processes[worker]
            process.join()
            code = process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            return DistributedError(
                f"worker {worker + 1} of {len(self._pipes)} {how} while {doing}; what was written before is whole. "
                "See above for its error, or give it more memory: fewer --workers, a smaller --max-tokens."
            )


def use_threads(threads: int | None, processes: int = 1) -> None:
    """Let torch use so many threads; None: this process's share of the CPUs, unless OMP_NUM_THREADS says otherwise."""
    require(threads is None or threads >= 1, "threads", threads, "at least 1")
    if threads is not None:
        torch.set_num_threads(threads)
    elif processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))


def _work(pipe: Connection, path: str | Path, how: dict[str, Any], threads: int | None, processes: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; whoever started this ends it
    try:
        use_threads(threads, processes)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            translator = load(path, **how)
        pipe.send((translator.settings, translator.max_positions, [str(warning.message) for warning in told]))
    except EngineFastError as error:
        pipe.send(error)
        return
    try:
        while True:
            window, first_line, lengths = pipe.recv()
            try:
                pipe.send(translator.translate_window(window, first_line=first_line, lengths=lengths))
            except EngineFastError as error:
                pipe.send(error)
    except (EOFError, BrokenPipeError):
        pass  # whoever asked has gone
