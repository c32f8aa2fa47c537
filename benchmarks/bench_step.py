"""Training steps of teacher, CMLM and ENGINE against the same steps written the authors' way (benchmarks/peers.py).

    python -m benchmarks.bench_step [--quick] [--device cpu|cuda] [--subjects engine cmlm teacher head] [--profile]

A step is forward and backward of one micro-batch of 1024 target positions; the optimiser runs once for several of them
and is the same for all. Models and batches are of the paper's size. Subject `head` is the ENGINE step where the
vocabulary outweighs the bodies: 4096 target positions, V = 32000, 2+2 layers. ENGINE's providers:

ours            the fused ops, the student's logits kept between forward and backward (head_memory: keep)
ours_recompute  the fused ops, the student's logits made twice, a tile at a time (head_memory: recompute)
reference_ops   our step on the plain definitions, ops.using("reference")
peer, peer_on_our_layers    the authors' way, see peers.py

GFLOP of our steps are those of the definition's matrix products: what a fused op multiplies twice does not count.
--quick shrinks everything, judges no floor and writes nothing; --profile prints where the engine step's time goes and
measures nothing else. Writes benchmarks/results/step.json, on a GPU results/gpu/step.json; exits with 1 below a floor
of benchmarks/floors.toml.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness, peers
from engine_fast import ops
from engine_fast.config import Architecture, CMLMConfig, EngineConfig, TeacherConfig
from engine_fast.data.batching import Batch
from engine_fast.data.symbols import EOS, NUM_SPECIAL, PAD
from engine_fast.energies import TeacherEnergy
from engine_fast.models import CMLM, Transformer
from engine_fast.training.objectives import CMLMObjective, EngineObjective, TeacherObjective, draw_masks

SUBJECTS = ("teacher", "cmlm", "engine", "head")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COMPILED_STUDENT, COMPILED_TEACHER = ("compiled_student", "compiled"), ("compiled_teacher", "compiled")
"""Ways of `ours` with torch.compile around stacks: benchmarks/bench_compile.py."""
PROVIDERS = {
    "teacher": ("ours-fp32", "ours-bf16", "peer-fp32"),
    "cmlm": ("ours-fp32", "ours-bf16", "peer-fp32"),
    "engine": ("ours-fp32", "ours-bf16", "reference_ops-fp32", "peer-fp32", "peer_on_our_layers-fp32"),
    "head": ("ours-fp32", "ours_recompute-fp32", "ours-bf16", "reference_ops-fp32"),
}


@dataclass(frozen=True)
class Size:
    """Of models and batches."""

    width: int = 512
    ffn_width: int = 2048
    heads: int = 8
    layers: int = 6
    vocabulary: int = 10000
    positions: int = 256
    tokens: int = 1024
    lengths: tuple[int, ...] = (13, 24, 38)
    """Longest target of each batch; the others are up to a tenth shorter, as length buckets leave them."""
    rounds: int = 3


HEAD = Size(layers=2, vocabulary=32000, tokens=4096, lengths=(32,))
QUICK = Size(width=64, ffn_width=128, heads=4, layers=2, vocabulary=1000, tokens=256, rounds=3)


@dataclass(frozen=True)
class Step:
    """One way to compute one subject's step."""

    loss: Callable[[Batch], Tensor]
    modules: tuple[torch.nn.Module, ...]
    definition: Callable[[Batch], Tensor] | None = None
    """The same loss by torch's own products, if `loss` hides them from the FLOP counter."""

    def run(self, batch: Batch) -> None:
        self.release()
        self.loss(batch).backward()

    def release(self) -> None:
        for module in self.modules:
            module.zero_grad(set_to_none=True)


def size_of(subject: str, *, quick: bool, rounds: int | None) -> Size:
    size = QUICK if quick else HEAD if subject == "head" else Size()
    return replace(size, rounds=rounds or size.rounds)


def make_batches(size: Size, device: str = "cpu") -> list[Batch]:
    """One batch per entry of `lengths`, sources 0.85 to 1.15 times as long as their targets."""
    torch.manual_seed(7)
    batches = []
    for longest in size.lengths:
        count = size.tokens // longest
        targets = torch.randint(longest - longest // 10, longest + 1, (count,))
        targets[0] = longest
        sources = (targets * (0.85 + 0.3 * torch.rand(count))).round().long().clamp_min(3)
        batches.append(Batch(_ids(sources, size), _ids(targets, size), torch.arange(count)).to(device))
    return batches


def make_step(subject: str, provider: str, size: Size, device: str = "cpu") -> Step:
    """Models are built anew, from one seed, so that every provider of a subject computes the same loss."""
    way, dtype_name = provider.split("-")
    dtype, ours = DTYPES[dtype_name], not way.startswith("peer")
    layers = peers.PLAIN if way == "peer" else peers.OURS
    teacher = student = None
    torch.manual_seed(5)
    if subject != "cmlm":
        teacher = Transformer(_architecture(size), size.vocabulary, size.vocabulary).to(device, dtype)
    if subject != "teacher":
        student = CMLM(_architecture(size, cmlm=True), size.vocabulary, size.vocabulary).to(device, dtype)
    if teacher is not None and student is not None:
        student.train()
        teacher.eval().requires_grad_(not ours)
        for model, ways in ((student, COMPILED_STUDENT), (teacher, COMPILED_TEACHER)):
            if way in ways:
                model.compile_stacks()
        if ours:
            head_memory: Literal["keep", "recompute"] = "recompute" if way == "ours_recompute" else "keep"
            engine = EngineObjective(
                student, TeacherEnergy(teacher), EngineConfig(o1="SX", o2="ST", head_memory=head_memory)
            )
            plain, fused = _using("reference", engine), _using("fused", engine)
            return Step(plain if way == "reference_ops" else fused, (student,), definition=plain)
        return Step(lambda batch: peers.engine_step(student, teacher, batch, layers=layers), (student, teacher))
    if student is not None:
        student.train()
        if ours:
            cmlm = CMLMObjective(student, CMLMConfig())
            return Step(lambda batch: cmlm.loss_of(batch, _masks(batch)).total, (student,))
        return Step(lambda batch: peers.cmlm_step(student, batch, _masks(batch), layers=layers), (student,))
    assert teacher is not None
    teacher.train()
    if ours:
        objective = TeacherObjective(teacher, TeacherConfig())
        return Step(lambda batch: objective(batch).total, (teacher,))
    return Step(lambda batch: peers.teacher_step(teacher, batch, layers=layers), (teacher,))


def measure_speed(subject: str, size: Size, rates: dict[str, float], device: str) -> dict[str, dict[str, float]]:
    """provider -> target tokens/s, achieved GFLOP/s and its share of the GEMM rate, spread of the times.

    share_of_threads well below 1 says that other programs had the cores for a good part of the time.
    """
    steps = {name: make_step(subject, name, size, device) for name in PROVIDERS[subject]}
    seconds = dict.fromkeys(steps, 0.0)
    cpu_seconds = dict.fromkeys(steps, 0.0)
    spread = dict.fromkeys(steps, 0.0)
    flops = dict.fromkeys(steps, 0.0)
    tokens = 0
    for batch in make_batches(size, device):
        tokens += batch.num_target_tokens
        for name, step in steps.items():
            with FlopCounterMode(display=False) as counter:
                replace(step, loss=step.definition or step.loss).run(batch)
            flops[name] += counter.get_total_flops()
        run = {name: bind(step, batch) for name, step in steps.items()}
        timed = harness.interleave(run, rounds=size.rounds, device=device)
        for name, row in timed.items():
            seconds[name] += row["seconds"]
            cpu_seconds[name] += row["cpu_seconds"]
            spread[name] = max(spread[name], row["spread"])
    return {
        name: {
            "tokens_per_second": tokens / seconds[name],
            "seconds_per_step": seconds[name] / len(size.lengths),
            "cpu_seconds_per_step": cpu_seconds[name] / len(size.lengths),
            "share_of_threads": cpu_seconds[name] / seconds[name] / torch.get_num_threads(),
            "spread": spread[name],
            "gflop_per_step": flops[name] / len(size.lengths) / 1e9,
            "gflops": flops[name] / seconds[name] / 1e9,
            "share_of_gemm_rate": flops[name] / seconds[name] / 1e9 / rates[name.split("-")[1]],
        }
        for name in steps
    }


def measure_memory(subject: str, provider: str, size: Size, device: str) -> dict[str, float]:
    """Peak memory of the step on the batch of middle length, in this process."""
    step, batch = make_step(subject, provider, size, device), make_batches(size, device)[len(size.lengths) // 2]

    def run() -> None:
        step.run(batch)
        step.release()

    return harness.peak_memory(run, device=device)


def profile(provider: str, size: Size, device: str) -> str:
    """The operators of one engine step on the batch of middle length that take the most time of their own."""
    step, batch = make_step("engine", provider, size, device), make_batches(size, device)[len(size.lengths) // 2]
    step.run(batch)
    with torch.profiler.profile() as profiled:
        step.run(batch)
    table: str = profiled.key_averages().table(
        sort_by="self_cuda_time_total" if device == "cuda" else "self_cpu_time_total",
        row_limit=25,
        max_name_column_width=60,
    )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="small models; no floor is judged, nothing is written")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="timed runs of each provider on each batch")
    parser.add_argument(
        "--profile", nargs="?", const="ours-fp32", choices=PROVIDERS["engine"], help="of which engine step"
    )
    parser.add_argument("--memory", metavar="SUBJECT:PROVIDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device: str = options.device
    sizes = {name: size_of(name, quick=options.quick, rounds=options.rounds) for name in SUBJECTS}
    if options.memory:
        subject, provider = options.memory.split(":")
        print(json.dumps(measure_memory(subject, provider, sizes[subject], device)))
        return 0
    if options.profile:
        print(profile(options.profile, sizes["engine"], device))
        return 0

    rates = {name: harness.gemm_rate(dtype, device=device) for name, dtype in DTYPES.items()}
    print("GEMM rate: " + ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in rates.items()))
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for subject in options.subjects:
        rows[subject] = measure_speed(subject, sizes[subject], rates, device)
        for provider, row in rows[subject].items():
            arguments = ["--memory", f"{subject}:{provider}", "--threads", str(options.threads), "--device", device]
            memory = harness.in_fresh_process("benchmarks.bench_step", *arguments, *(["--quick"] * options.quick))
            row |= {"peak_mib_above_inputs": memory["above"], "peak_mib": memory["peak"]}
            print(
                f"{subject:8} {provider:24} {row['tokens_per_second']:8.0f} tokens/s  spread {row['spread']:4.0%}  "
                f"had {row['share_of_threads']:4.0%} of its threads  "
                f"{row['gflops']:6.0f} GFLOP/s ({row['share_of_gemm_rate']:4.0%})  "
                f"peak +{row['peak_mib_above_inputs']:5.0f} MiB (process {row['peak_mib']:5.0f})",
                flush=True,
            )
    figures = _ratios(rows)
    for name, value in figures.items():
        print(f"{name}: {value:.2f}")
    if options.quick:
        return 0
    problems = harness.judge(figures, _limits(options.subjects, device))
    content: dict[str, Any] = {"sizes": {name: vars(sizes[name]) for name in options.subjects}}
    content |= {"gemm_gflops": rates, "steps": rows, "figures": figures, "below_floor": problems}
    path = harness.write_results("step", content, device=device)
    print(f"written: {path.relative_to(harness.RESULTS.parent.parent)}")
    for problem in problems:
        print(f"below the floor: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _ratios(rows: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """Ours over each peer, the authors' way unless the figure's name says otherwise."""
    suffixes = {"peer": "", "peer_on_our_layers": "_on_our_layers", "reference_ops": "_over_reference_ops"}
    figures = {}
    for subject, providers in rows.items():
        for way, suffix in ((way, suffix) for way, suffix in suffixes.items() if f"{way}-fp32" in providers):
            peer = providers[f"{way}-fp32"]
            for name in (name for name in providers if name.startswith("ours")):
                row, label = providers[name], subject + name.removeprefix("ours").replace("-", "_")
                figures[f"{label}_speed{suffix}"] = row["tokens_per_second"] / peer["tokens_per_second"]
                figures[f"{label}_cpu_speed{suffix}"] = peer["cpu_seconds_per_step"] / row["cpu_seconds_per_step"]
                figures[f"{label}_memory{suffix}"] = row["peak_mib_above_inputs"] / peer["peak_mib_above_inputs"]
    return figures


def _limits(subjects: list[str], device: str) -> dict[str, dict[str, float]]:
    table = harness.floors("step_gpu" if device == "cuda" else "step")
    return {name: limit for name, limit in table.items() if name.split("_")[0] in subjects}


def _using(implementation: Literal["fused", "reference"], engine: EngineObjective) -> Callable[[Batch], Tensor]:
    """The loss with the ops of that name; the backward pass follows what the forward chose."""

    def loss(batch: Batch) -> Tensor:
        with ops.using(implementation):
            total: Tensor = engine(batch).total
        return total

    return loss


def _architecture(size: Size, *, cmlm: bool = False) -> Architecture:
    own: dict[str, Any] = {}
    if cmlm:
        own = {"norm_epsilon": 1e-12, "positions": "learned", "activation": "gelu", "scale_embedding": False}
        own |= {"init": "normal", "tie": "none"}
    return Architecture(
        width=size.width,
        ffn_width=size.ffn_width,
        heads=size.heads,
        encoder_layers=size.layers,
        decoder_layers=size.layers,
        max_positions=size.positions,
        dropout=0.1,
        **own,
    )


def _ids(lengths: Tensor, size: Size) -> Tensor:
    ids = torch.randint(NUM_SPECIAL, size.vocabulary, (len(lengths), int(lengths.max())))
    slots = torch.arange(ids.shape[1])
    ids[slots >= lengths[:, None]] = PAD
    return ids.scatter_(1, lengths[:, None] - 1, EOS)


def _masks(batch: Batch) -> Tensor:
    """The same masks for every provider."""
    state = torch.get_rng_state()
    torch.manual_seed(11)
    masks = draw_masks(batch.target != PAD)
    torch.set_rng_state(state)
    return masks


def bind(step: Step, batch: Batch) -> Callable[[], None]:
    return lambda: step.run(batch)


if __name__ == "__main__":
    sys.exit(main())
