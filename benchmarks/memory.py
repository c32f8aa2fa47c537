"""The peak of memory of real training updates, as torch's allocator counts it.

On a GPU that is torch.cuda.max_memory_allocated. On a CPU the profiler reports every block that torch's allocator hands
out and takes back, kernels' own scratch included; their running sum is what the GPU's counter would show. The resident
set would not do: it has interpreter, libraries and untouched pages in it, and keeps what malloc does not return.

The profiler misses a block that another thread frees, and gloo's threads hold on to what they have sent. Such a block
is taken for freed as soon as its addresses are handed out again, and of several equal updates the least peak counts.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from benchmarks.updates import Training, Work, micro_batch, update

PHASES = ("forward", "backward", "step")


@contextmanager
def named_phases(engine: Any) -> Iterator[None]:
    """Name DeepSpeed's forward, backward and step to the profiler; `engine` is distributed.Engine's own."""

    def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"phase.{name}"):
                return function(*args, **kwargs)

        return wrapped

    functions = [getattr(engine, name) for name in PHASES]
    for name, function in zip(PHASES, functions, strict=True):
        setattr(engine, name, named(name, function))
    try:
        yield
    finally:
        for name in PHASES:
            delattr(engine, name)


def peaks_on_cpu(build: Callable[[], Training], work: Work, *, updates: int) -> dict[str, int]:
    """Bytes at the largest point of forward, backward and step after a first update, then of validation and checkpoint.

    What `build` allocates counts, what stood before it does not.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        training = build()
        with named_phases(training.engine._engine):
            for number in range(updates):
                with record_function(f"update.{number}"):
                    update(training.engine, work, number)
        with record_function("phase.validation"):
            training.validate(micro_batch(work, 0))
        with record_function("phase.checkpoint"):
            training.weights()
    marks, blocks = _events(profiled)
    times, totals = _running_total(blocks)
    least: dict[str, int] = {}
    for number in range(1, updates):
        begin, end = next(mark[:2] for mark in marks if mark[2] == f"update.{number}")
        peaks: dict[str, int] = {}
        for start, stop, name in marks:
            if name.startswith("phase.") and begin <= start and stop <= end:
                phase = name.removeprefix("phase.")
                peaks[phase] = max(peaks.get(phase, 0), _peak(times, totals, start, stop))
        least = {name: min(least.get(name, peak), peak) for name, peak in peaks.items()}
    for name in ("validation", "checkpoint"):
        start, stop = next(mark[:2] for mark in marks if mark[2] == f"phase.{name}")
        least[name] = _peak(times, totals, start, stop)
    return least


def peak_on_cuda(build: Callable[[], Training], work: Work, *, updates: int) -> dict[str, int]:
    """Bytes at the largest point of an update after the first, on a GPU."""
    before = torch.cuda.memory_allocated()
    training = build()
    update(training.engine, work, 0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for number in range(1, updates):
        update(training.engine, work, number)
    torch.cuda.synchronize()
    return {"update": torch.cuda.max_memory_allocated() - before}


def _events(profiled: Any) -> tuple[list[tuple[int, int, str]], list[tuple[int, int, int]]]:
    """Marks (begin, end, name) in nanoseconds, and blocks (time, address, bytes; freed: negative) in order of time."""
    marks, blocks = [], []
    stack = list(profiled.profiler.kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack += event.children
        name = event.name
        if name == "[memory]":
            fields = event.extra_fields
            if fields.device.type == "cpu":
                blocks.append((event.start_time_ns, fields.ptr, fields.alloc_size))
        elif name.startswith(("phase.", "update.")):
            marks.append((event.start_time_ns, event.end_time_ns, name))
    return sorted(marks), sorted(blocks, key=lambda block: block[0])


def _running_total(blocks: list[tuple[int, int, int]]) -> tuple[list[int], list[int]]:
    """Bytes in use after each event; a block in the way of a new one has been freed unseen."""
    starts: list[int] = []
    sizes: dict[int, int] = {}
    times, totals, total = [], [], 0

    def drop(position: int) -> None:
        nonlocal total
        total -= sizes.pop(starts.pop(position))

    for time, address, size in blocks:
        position = bisect.bisect_left(starts, address)
        if size < 0:
            if position < len(starts) and starts[position] == address:
                drop(position)
        else:
            if position and starts[position - 1] + sizes[starts[position - 1]] > address:
                position -= 1
            while position < len(starts) and starts[position] < address + size:
                drop(position)
            starts.insert(position, address)
            sizes[address] = size
            total += size
        times.append(time)
        totals.append(total)
    return times, totals


def _peak(times: list[int], totals: list[int], begin: int, end: int) -> int:
    first, last = bisect.bisect_right(times, begin), bisect.bisect_right(times, end)
    return max(totals[max(first - 1, 0) : last], default=0)
