"""What the benchmarks of the operators share: cases, providers, errors against float64, the table, the command line.

A provider is named way-dtype, as in "compile-fp32". Every benchmark has three ways, and adds its own:

    eager     the plain definition, ops.reference; Gumbel noise is drawn in the call, by torch's generator (the
              definition's own Philox in int64 arithmetic is for reading, not for racing)
    compile   torch.compile(fullgraph=True, dynamic=False) of it, warmed up before the clock starts
    ours      the fused op as it is called by default

All providers of a case see the same inputs and run interleaved in one process. A timed call is one forward and one
backward pass. What a provider writes over its inputs is put back before every timed call of every provider, outside
the clock, so that none finds them warmer than another.

Of every row: median and spread; for the providers a case names, the peak above the inputs in a fresh process, and that
peak less the value and gradients handed back; for eager and ours the largest error of value and gradients against
float64, relative to the largest true entry. `ratio` of two errors counts half a millionth of it as torch's own, so that
at most 2 is the rule of the op tests: twice torch's error plus a millionth.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from engine_fast import ops
from engine_fast.operators import get_operator, gumbel_noise

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EAGER_TABLES = 10
"""float32 (N, V) tensors that the plain definition, its inputs and its gradients need at once, about."""
BUDGET_GIB = {"cpu": 8.0, "cuda": 60.0}

Provider = Callable[[], object]
Rows = dict[str, dict[str, dict[str, Any]]]
"""case -> provider -> what was measured."""


class Unavailable(Exception):
    """A provider that this machine or these libraries cannot run; the message says why."""


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one size, and who runs it."""

    operation: str
    operator: str
    rows: int
    vocabulary: int
    providers: tuple[str, ...]
    width: int = 0
    memory: tuple[str, ...] = ()
    """The providers whose peak is measured; each costs a fresh process."""
    rounds: int = 5
    repeats: int = 1

    @property
    def name(self) -> str:
        width = f"x{self.width}" if self.width else ""
        return f"{self.operation}-{self.operator}-{self.rows}x{self.vocabulary}{width}"


@dataclass(frozen=True)
class Inputs:
    """Of one case and dtype. Gradients are taken of the tensors that require one."""

    tensors: tuple[Tensor, ...]
    upstream: Tensor
    """Gradient of the loss with respect to the value; not 1, which would hide a dropped factor."""
    overwritten: int = 0
    """How many of the first tensors a provider may write over."""
    kept: list[Tensor] = field(default_factory=list)

    def restore(self) -> None:
        """Undo what was written over; the first call, with nothing to undo, takes the copies."""
        if not self.kept:
            self.kept.extend(tensor.detach().clone() for tensor in self.tensors[: self.overwritten])
        with torch.no_grad():
            for tensor, original in zip(self.tensors, self.kept, strict=False):
                tensor.copy_(original)


class ForwardBackward:
    """A call returns the value of `function` and the gradients of every input that requires one."""

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> None:
        self.function, self.inputs, self.upstream = function, tuple(inputs), upstream
        self.wanted = [tensor for tensor in self.inputs if tensor.requires_grad]

    def __call__(self) -> tuple[Tensor, ...]:
        value = self.function(*self.inputs)
        gradients = torch.autograd.grad(value, self.wanted, self.upstream.to(value.dtype))
        return (value.detach(), *gradients)


@dataclass(frozen=True)
class Benchmark:
    """What one file says of its subject."""

    name: str
    description: str | None
    cases: Callable[[str, bool], list[Case]]
    """(device, quick) -> cases; names are unique."""
    draw: Callable[[Case, torch.dtype, str], Inputs]
    plain: Callable[[Case, Tensor | None], Callable[..., Tensor]]
    """(case, Gumbel noise or None = drawn in every call) -> the definition as a function of the inputs."""
    ours: Callable[[Case, Tensor | None], Callable[..., Tensor]]
    other: Callable[[Case, str, Inputs], Provider]
    """(case, way, inputs) -> a provider beyond eager, compile and ours. May raise Unavailable."""
    error_case: Callable[[Case], Case]
    """The size at which errors are measured; float64 takes its time."""
    outputs: Callable[[Case], tuple[str, ...]]
    """Names of the value and the gradients."""
    figures: Callable[[Rows], dict[str, float]]
    parts: Mapping[str, str]
    """way -> what it computes, for those that compute less than the whole."""


def make_provider(benchmark: Benchmark, case: Case, way: str, inputs: Inputs) -> Provider:
    if way == "eager":
        return ForwardBackward(benchmark.plain(case, None), inputs.tensors, inputs.upstream)
    if way == "compile":
        compiled = torch.compile(benchmark.plain(case, None), fullgraph=True, dynamic=False)
        return ForwardBackward(compiled, inputs.tensors, inputs.upstream)
    if way == "ours":
        return ForwardBackward(benchmark.ours(case, None), inputs.tensors, inputs.upstream)
    return benchmark.other(case, way, inputs)


def measure_speed(benchmark: Benchmark, case: Case, device: str) -> dict[str, dict[str, Any]]:
    """provider -> seconds of forward and backward, spread, share of the threads; a line for each that is missing."""
    torch.compiler.reset()  # compiled code is cached by function, a few shapes at most
    inputs = {name: _draw(benchmark, case, name, device) for name in _dtypes(case)}
    providers: dict[str, Provider] = {}
    for name in case.providers:
        way, dtype = name.split("-")
        inputs[dtype].restore()
        try:
            provider = make_provider(benchmark, case, way, inputs[dtype])
        except Unavailable as reason:
            print(f"  {name}: left out, {reason}", flush=True)
            continue
        provider()
        providers[name] = provider
    timed = harness.interleave(
        providers,
        rounds=case.rounds,
        repeats=case.repeats,
        before=lambda name: inputs[name.split("-")[1]].restore(),
        device=device,
    )
    for row in timed.values():
        row["share_of_threads"] = row["cpu_seconds"] / row["seconds"] / torch.get_num_threads()
    return {name: dict(row) for name, row in timed.items()}


def measure_memory(benchmark: Benchmark, case: Case, name: str, device: str) -> dict[str, float]:
    """Peak MiB above the inputs in this process, and that less the value and gradients handed back."""
    way, dtype = name.split("-")
    inputs = _draw(benchmark, case, dtype, device)
    provider = make_provider(benchmark, case, way, inputs)
    own = {tensor.data_ptr() for tensor in inputs.tensors}
    handed_back = provider()
    assert isinstance(handed_back, tuple)
    outputs = sum(tensor.nbytes for tensor in handed_back if tensor.data_ptr() not in own) / harness.MiB
    del handed_back
    measured = harness.peak_memory(provider, device=device)
    return measured | {"outputs": outputs, "above_outputs": max(0.0, measured["above"] - outputs)}


def measure_errors(benchmark: Benchmark, case: Case, dtype: str, device: str) -> dict[str, dict[str, float]]:
    """eager, ours -> output -> error relative to the largest true entry; ratio -> output -> ours over eager."""
    small = benchmark.error_case(case)
    inputs = _draw(benchmark, small, dtype, device)
    gumbel = get_operator(case.operator).gumbel
    noise = gumbel_noise((small.rows, small.vocabulary), device=device) if gumbel else None
    wide = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs.tensors]
    truth = ForwardBackward(benchmark.plain(small, noise), wide, inputs.upstream.double())()
    errors: dict[str, dict[str, float]] = {}
    for way, function in (("eager", benchmark.plain(small, noise)), ("ours", benchmark.ours(small, noise))):
        got = ForwardBackward(function, inputs.tensors, inputs.upstream)()
        names = benchmark.outputs(case)
        errors[way] = {name: _error(x, true) for name, x, true in zip(names, got, truth, strict=True)}
    errors["ratio"] = {name: errors["ours"][name] / (errors["eager"][name] + 0.5e-6) for name in errors["ours"]}
    return errors


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> int:
    """The command line of every benchmark of the operators. Returns 1 below a floor."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.bench_{benchmark.name}",
        description=benchmark.description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="small sizes; no floor is judged, nothing is written")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="timed calls of each provider")
    parser.add_argument("--only", metavar="TEXT", help="cases whose name contains TEXT; nothing is judged or written")
    parser.add_argument("--budget", type=float, metavar="GIB", help="leave out cases that need more memory in eager")
    parser.add_argument("--memory", metavar="CASE:PROVIDER", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    cases = [case for case in benchmark.cases(options.device, options.quick) if (options.only or "") in case.name]
    budget = options.budget or BUDGET_GIB[options.device]
    with ops.using("fused"):
        if options.memory:
            name, provider = options.memory.split(":")
            (case,) = (case for case in cases if case.name == name)
            print(json.dumps(measure_memory(benchmark, case, provider, options.device)))
            return 0
        rows: Rows = {}
        for case in cases:
            needed = EAGER_TABLES * case.rows * case.vocabulary * 4 / 2**30
            if needed > budget:
                print(f"{case.name}: left out, eager would need about {needed:.0f} GiB of {budget:.0f}", flush=True)
                continue
            rows[case.name] = measure(benchmark, replace(case, rounds=options.rounds or case.rounds), options)
    figures = benchmark.figures(rows)
    print("\n" + "\n".join(f"{name}: {value:.2f}" for name, value in figures.items()))
    if options.quick or options.only:
        return 0
    table = benchmark.name + ("_gpu" if options.device == "cuda" else "")
    problems = harness.judge(figures, harness.floors(table))
    content = {"parts": dict(benchmark.parts), "cases": rows, "figures": figures, "below_floor": problems}
    path = harness.write_results(benchmark.name, content, device=options.device)
    print(f"written: {path.relative_to(harness.RESULTS.parent.parent)}")
    for problem in problems:
        print(f"below the floor: {problem}", file=sys.stderr)
    return 1 if problems else 0


def measure(benchmark: Benchmark, case: Case, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All that is measured of one case; printed as a table."""
    print(f"\n{case.name}", flush=True)
    rows = measure_speed(benchmark, case, options.device)
    for dtype in _dtypes(case):
        errors = measure_errors(benchmark, case, dtype, options.device)
        for way in ("eager", "ours"):
            if (name := f"{way}-{dtype}") in rows:
                rows[name]["error"] = errors[way]
        if f"ours-{dtype}" in rows:
            rows[f"ours-{dtype}"]["error_ratio"] = errors["ratio"]
    gc.collect()
    for name in (name for name in case.memory if name in rows):
        arguments = ["--memory", f"{case.name}:{name}", "--device", options.device, "--threads", str(options.threads)]
        module = f"benchmarks.bench_{benchmark.name}"
        memory = harness.in_fresh_process(module, *arguments, *(["--quick"] * options.quick))
        rows[name]["peak_mib_above_inputs"] = memory["above"]
        rows[name]["peak_mib_above_inputs_and_outputs"] = memory["above_outputs"]
    print("\n".join(table_of(rows, benchmark.parts)), flush=True)
    return rows


def table_of(rows: Mapping[str, Mapping[str, Any]], parts: Mapping[str, str]) -> list[str]:
    """Aligned lines; `x compile` and `x eager` are speeds relative to them in the same dtype."""
    header = f"  {'provider':28}{'median':>12}{'spread':>8}{'threads':>9}{'x compile':>11}{'x eager':>9}"
    lines = [f"{header}{'peak':>11}{'less outputs':>14}  largest error / torch's"]
    for name, row in rows.items():
        way, dtype = name.split("-")
        cells = f"  {name:28}{row['seconds'] * 1e3:9.3f} ms{row['spread']:8.0%}{row['share_of_threads']:9.0%}"
        for peer, width in (("compile", 11), ("eager", 9)):
            other = rows.get(f"{peer}-{dtype}")
            cells += f"{other['seconds'] / row['seconds']:{width}.2f}" if other else " " * width
        cells += f"{row['peak_mib_above_inputs']:7.0f} MiB" if "peak_mib_above_inputs" in row else " " * 11
        less = row.get("peak_mib_above_inputs_and_outputs")
        cells += f"{less:10.0f} MiB" if less is not None else " " * 14
        if "error" in row:
            cells += f"  {max(row['error'].values()):.1e}"
        if "error_ratio" in row:
            cells += f" / {max(row['error_ratio'].values()):.2f}"
        lines.append(cells.rstrip() + (f"  [{parts[way]}]" if way in parts else ""))
    return lines


def speed(row: Mapping[str, Mapping[str, Any]], ours: str, peer: str) -> float | None:
    """How many times as fast as `peer`; None where either is missing."""
    return row[peer]["seconds"] / row[ours]["seconds"] if ours in row and peer in row else None


def worst_error_ratio(rows: Rows) -> float | None:
    """The largest, over cases, dtypes, value and gradients; not a number if any is not."""
    ratios = [r for case in rows.values() for row in case.values() for r in row.get("error_ratio", {}).values()]
    return float(torch.tensor(ratios).amax()) if ratios else None  # unlike max(), it passes nan on


def slowest_over_eager(rows: Rows) -> float | None:
    """The smallest speed of ours over eager, over cases and dtypes."""
    found = [speed(case, f"ours-{dtype}", f"eager-{dtype}") for case in rows.values() for dtype in DTYPES]
    return min((value for value in found if value is not None), default=None)


def memory_ratio(row: Mapping[str, Mapping[str, Any]], ours: str, peer: str, above: str) -> float | None:
    """Peak of `ours` over that of `peer`; `above` = "inputs" or "inputs_and_outputs". None where either is missing."""
    peaks = [row.get(name, {}).get(f"peak_mib_above_{above}") for name in (ours, peer)]
    return peaks[0] / peaks[1] if peaks[0] is not None and peaks[1] else None


def noise_for(case: Case, like: Tensor, noise: Tensor | None) -> Tensor | None:
    """`noise`, or a fresh draw as in F.gumbel_softmax if the operator needs one."""
    if noise is not None or not get_operator(case.operator).gumbel:
        return noise
    shape = (case.rows, case.vocabulary)
    return -torch.empty(shape, dtype=torch.float32, device=like.device).exponential_().log()


def measured(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if value is not None}


def _dtypes(case: Case) -> list[str]:
    return list(dict.fromkeys(name.split("-")[1] for name in case.providers))


def _draw(benchmark: Benchmark, case: Case, dtype: str, device: str) -> Inputs:
    torch.manual_seed(3)
    return benchmark.draw(case, DTYPES[dtype], device)


def _error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).abs().max() / truth.abs().max())
