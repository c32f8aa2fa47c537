"""What every benchmark shares: interleaved timing, peak memory of a fresh process, the machine, floors, result files.

A result file says on what it was measured and with which command, and names no host and no path.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
MiB = 2**20


def interleave(
    providers: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    repeats: int = 1,
    before: Callable[[str], object] | None = None,
    device: str = "cpu",
) -> dict[str, dict[str, float]]:
    """Run every provider once a round, in turn, and reverse the order every other round.

    Args:
        repeats: calls in a row that are timed as one, where a single call is too short for the clock.
        before: called with the provider's name ahead of each timed run, outside the clock.
        device: on "cuda" the clock is a pair of events on the current stream.
    Returns: name -> median, minimum and maximum seconds of a call; `spread` = (maximum - minimum) / median;
    `cpu_seconds`, the median over all threads of the process: near seconds * threads where nobody else computes.
    """
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in providers}
    clock = _cuda_seconds if device == "cuda" else _wall_seconds
    for round_number in range(warmup + rounds):
        order = list(providers) if round_number % 2 == 0 else list(reversed(list(providers)))
        for name in order:
            if before is not None:
                before(name)
            gc.collect()
            cpu_start = time.process_time()
            took = clock(providers[name], repeats)
            if round_number >= warmup:
                seconds[name].append(took / repeats)
                cpu_seconds[name].append((time.process_time() - cpu_start) / repeats)
    return {
        name: summary(values) | {"cpu_seconds": statistics.median(cpu_seconds[name])}
        for name, values in seconds.items()
    }


def summary(seconds: Sequence[float]) -> dict[str, float]:
    median = statistics.median(seconds)
    low, high = min(seconds), max(seconds)
    return {"seconds": median, "minimum": low, "maximum": high, "spread": (high - low) / median}


def peak_memory(step: Callable[[], object], *, device: str = "cpu") -> dict[str, float]:
    """MiB before `step` and at the peak during it, of a fresh process.

    The step runs once beforehand, so that libraries are loaded and lazily made buffers exist. On a CPU the resident
    set (Linux); on "cuda" what torch's allocator has handed out, which leaves out the driver's and cuBLAS's own.
    """
    step()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / MiB
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / MiB
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at the present size
        before = _status("VmRSS")
        step()
        peak = _status("VmHWM")
    return {"before": before, "peak": peak, "above": peak - before}


def in_fresh_process(module: str, *arguments: str) -> dict[str, float]:
    """The JSON that `python -m module arguments` prints last; large blocks go back to the system when freed."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**17)}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=HERE.parent, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def gemm_rate(
    dtype: torch.dtype, *, rows: int = 1024, width: int = 512, columns: int = 8192, device: str = "cpu"
) -> float:
    """GFLOP/s of (rows, width) @ (width, columns)', the best of several runs."""
    a = torch.randn(rows, width, dtype=dtype, device=device)
    b = torch.randn(columns, width, dtype=dtype, device=device)
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    clock = _cuda_seconds if device == "cuda" else _wall_seconds
    best = min(clock(lambda: torch.mm(a, b.t(), out=out), 1) for _ in range(20))
    return 2 * rows * width * columns / best / 1e9


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, memory, GPU if it was used, and library versions; nothing that names a host or a place."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(fields.get("flags", "").split())
    gpu: dict[str, Any] = {}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        gpu = {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "gpu_multiprocessors": properties.multi_processor_count,
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return {
        "processor": fields.get("model name", platform.machine()),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **gpu,
    }


def floors(benchmark: str) -> dict[str, dict[str, float]]:
    """The table of that name in floors.toml: figure -> {"at_least": ..} or {"at_most": ..}."""
    table: dict[str, dict[str, float]] = tomllib.loads((HERE / "floors.toml").read_text())[benchmark]
    return table


def judge(figures: Mapping[str, float], limits: Mapping[str, Mapping[str, float]]) -> list[str]:
    """One sentence for every floor that is not reached or not measured; empty = all reached."""
    problems = []
    for name, limit in limits.items():
        got = figures.get(name)
        if got is None:
            problems.append(f"{name} was not measured.")
        elif math.isnan(got):  # which compares as neither below nor above
            problems.append(f"{name} is not a number.")
        elif got < limit.get("at_least", got):
            problems.append(f"{name} is {got:.2f}, expected at least {limit['at_least']}.")
        elif got > limit.get("at_most", got):
            problems.append(f"{name} is {got:.2f}, expected at most {limit['at_most']}.")
    return problems


def write_results(name: str, content: Mapping[str, Any], *, device: str = "cpu") -> Path:
    """benchmarks/results/NAME.json with machine and command in front; results/gpu/NAME.json of a run on "cuda"."""
    command = " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    folder = RESULTS / "gpu" if device == "cuda" else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"command": command, "machine": machine(device), **content}, indent=2) + "\n")
    return path


def _wall_seconds(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - start


def _cuda_seconds(run: Callable[[], object], repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / MiB
    raise KeyError(field)
