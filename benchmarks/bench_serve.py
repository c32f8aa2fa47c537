"""What 200 clients at once get from `engine-fast serve`: python -m benchmarks.bench_serve [--model DIR] [--smoke]

The server is a process of its own; the clients share its machine, as threads of one event loop that hold a connection
each. Without --model the server has a student of the size of configs/multi30k_de_en_small.yaml with random weights,
and the sentences are random words. Three measurements, each of one-sentence requests unless it says otherwise:

- batch: one request of 32 sentences, alone; its median is the yardstick.
- saturated: no client waits. 200 sentences are then always under way, which is 200 / 32 = 6.25 batches of 32.
  saturated_in_batches is the share of the time in which a batch is computed; the rest is between two of them.
- paced: every client waits a random while between requests, so that together they send --load of what batches of 32
  could take.

Memory is the server's resident set after 2,000 and after 10,000 requests of the saturated kind.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from engine_fast.config import Architecture
from engine_fast.data.vocabulary import DictionaryVocabulary
from engine_fast.models import CMLM, save_model

BATCH = 32
WORDS = 5000
MAX_WORDS = 24
"""Of a sentence; the mean is that of multi30k, 13. A random student's lengths are held by its positions."""


class Client:
    """One HTTP/1.1 connection that is kept open. httpx would take a good part of the CPU that is measured."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def translate(self, sentences: Sequence[str]) -> float:
        """Seconds from the request to its translations. Raises RuntimeError for any other answer."""
        if self._streams is None or self._streams[0].at_eof():
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        body = json.dumps({"sentences": list(sentences)}).encode()
        start = time.perf_counter()
        head = "POST /translate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        writer.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
        answered = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(answered.split("content-length:")[1].split("\r\n")[0])
        answer = await reader.readexactly(length)
        seconds = time.perf_counter() - start
        if " 200 " not in answered.split("\r\n")[0] or len(json.loads(answer)["translations"]) != len(sentences):
            raise RuntimeError(f"{answered.splitlines()[0]}: {answer[:200]!r}")
        return seconds

    async def batch_seconds(self) -> float:
        """What all batches of the server have taken so far: engine_fast_batch_seconds_sum of its metrics."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        text = (await reader.read()).decode()
        writer.close()
        return sum(float(line.split()[-1]) for line in text.splitlines()
                   if line.startswith("engine_fast_batch_seconds_sum"))  # fmt: skip

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


class Server:
    """`engine-fast serve` in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port

    def resident_mib(self) -> float:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
        raise KeyError("VmRSS")


@contextmanager
def serving(model: Path) -> Iterator[Server]:
    command = [sys.executable, "-m", "engine_fast.cli.main", "serve", "--model", str(model), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=harness.HERE.parent) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError("the server did not start; its own message is above")
            yield Server(process, int(line.rsplit(":", 1)[1]))
            process.send_signal(signal.SIGTERM)
            if process.wait(60):
                raise RuntimeError(f"the server ended with {process.returncode}")
        finally:
            process.kill()


async def crowd(
    port: int, clients: int, requests: int, sentences: Sequence[str], pause: Callable[[], Awaitable[None]] | None = None
) -> tuple[list[float], int, float]:
    """`requests` of one sentence each from so many clients: (seconds of each, errors, seconds of all)."""
    seconds: list[float] = []
    errors = 0
    left = iter(range(requests))

    async def client() -> None:
        nonlocal errors
        connection = Client(port)
        if pause is not None:
            await pause()
        for number in left:
            try:
                seconds.append(await connection.translate([sentences[number % len(sentences)]]))
            except (RuntimeError, OSError, asyncio.IncompleteReadError) as error:
                errors += 1
                print(f"error: {error}", file=sys.stderr)
                connection.close()
                connection = Client(port)
            if pause is not None:
                await pause()
        connection.close()

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return seconds, errors, time.perf_counter() - start


def summary(seconds: Sequence[float], errors: int, total: float) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {
        "requests": len(seconds) + errors,
        "errors": errors,
        "per_second": len(seconds) / total,
        "p50": cuts[49],
        "p95": cuts[94],
        "p99": cuts[98],
        "maximum": max(seconds),
    }


async def measure(server: Server, sentences: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    alone = Client(server.port)
    times = []
    for round_number in range(options.rounds + 2):
        start = round_number * BATCH % max(1, len(sentences) - BATCH)
        times.append(await alone.translate(sentences[start : start + BATCH]))
    batch = statistics.median(times[2:])
    single = statistics.median([await alone.translate([sentence]) for sentence in sentences[:BATCH]])
    alone.close()

    clients, port = options.clients, server.port
    before = await alone.batch_seconds()
    first = await crowd(port, clients, options.first, sentences)
    early = server.resident_mib()
    rest = await crowd(port, clients, options.requests - options.first, sentences)
    late = server.resident_mib()
    in_batches = await alone.batch_seconds() - before
    saturated = (first[0] + rest[0], first[1] + rest[1], first[2] + rest[2])
    mean_pause = clients * batch / BATCH / options.load
    generator = random.Random(1)
    paced = await crowd(
        port, clients, options.paced, sentences, lambda: asyncio.sleep(generator.expovariate(1 / mean_pause))
    )
    rows = {"paced": summary(*paced), "saturated": summary(*saturated)}
    figures = {
        "errors": paced[1] + saturated[1],
        "paced_p95_over_batch": rows["paced"]["p95"] / batch,
        "saturated_p95_over_batch": rows["saturated"]["p95"] / batch,
        "saturated_in_batches": in_batches / saturated[2],
        "saturated_speed_over_batch": rows["saturated"]["per_second"] * batch / BATCH,
        "memory_growth": late / early,
    }
    return {
        "batch_seconds": batch,
        "single_seconds": single,
        **rows,
        "resident_mib": {str(options.first): early, str(options.requests): late},
        "figures": figures,
    }


def random_student(directory: Path, *, small: bool) -> Path:
    shape = {"width": 32, "ffn_width": 64} if small else {"width": 192, "ffn_width": 512}
    layers = 1 if small else 3
    architecture = Architecture(
        **shape,
        heads=4,
        encoder_layers=layers,
        decoder_layers=layers,
        norm="pre",
        tie="all",
        max_positions=MAX_WORDS + 8,
    )
    torch.manual_seed(1)
    vocabulary = DictionaryVocabulary([f"w{i}" for i in range(WORDS)])
    save_model(directory, CMLM(architecture, len(vocabulary), len(vocabulary)), vocabulary, vocabulary)
    return directory


def random_sentences(count: int) -> list[str]:
    generator = random.Random(0)
    lengths = [min(MAX_WORDS, max(2, round(generator.gauss(13, 5)))) for _ in range(count)]
    return [" ".join(f"w{generator.randrange(WORDS)}" for _ in range(length)) for length in lengths]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_serve", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a student's directory, with --text")
    parser.add_argument("--text", type=Path, help="sentences for it, one a line; plain, .gz or .xz")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--load", type=float, default=0.7, help="paced clients, as a share of what batches of 32 take")
    parser.add_argument("--paced", type=int, default=2000, help="requests of the paced clients")
    parser.add_argument("--first", type=int, default=2000, help="requests after which memory is first read")
    parser.add_argument("--requests", type=int, default=10000, help="of clients that do not pause")
    parser.add_argument("--rounds", type=int, default=30, help="batches of 32 alone")
    parser.add_argument("--smoke", action="store_true", help="a tiny student and 400 requests; judge and write nothing")
    options = parser.parse_args()
    if (options.model is None) != (options.text is None):
        parser.error("--model and --text go together")
    if options.smoke:
        options.clients, options.paced, options.first, options.requests, options.rounds = 40, 100, 200, 400, 3
    with tempfile.TemporaryDirectory() as scratch:
        if options.model is None:
            model, sentences = random_student(Path(scratch) / "student", small=options.smoke), random_sentences(1000)
        else:
            from engine_fast.data.text import iter_lines

            model, sentences = options.model, list(iter_lines(options.text))
        with serving(model) as server:
            found = asyncio.run(measure(server, sentences, options))
    print(json.dumps(found, indent=2))
    if options.smoke:
        return 1 if found["figures"]["errors"] else 0
    problems = harness.judge(found["figures"], harness.floors("serve"))
    settings = {key: getattr(options, key) for key in ("clients", "load", "paced", "requests")}
    student = "random weights, size of multi30k_de_en_small" if options.model is None else "trained"
    cores = len(os.sched_getaffinity(0))
    content = {"student": student, "settings": settings, "cores": cores, **found, "below_floor": problems}
    path = harness.write_results("serve", content)
    print(f"written: benchmarks/results/{path.name}")
    for problem in problems:
        print(f"below the floor: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
