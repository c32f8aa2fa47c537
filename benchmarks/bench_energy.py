"""energy(z, s), forward and backward with gradients to both sides, against eager, torch.compile and the memory's speed.

    python -m benchmarks.bench_energy [--quick] [--device cpu|cuda] [--only TEXT]

ours            the gradients go into fresh (N, V) tensors
ours_overwrite  the backward writes dz and ds over z and s
stream          the time to move the bytes that ours_overwrite has to: the forward reads z and s (2NV values, by a dot
                product), the backward reads both again and writes both in place (2NV read, 2NV written, by two in-place
                scalings by 1). It uses z and s themselves, as warm as the others find them, and takes bf16 for float32
                of as many bytes, so that arithmetic does not slow it down.
copy            one tensor into another that exists: NV values read, NV written

compile_finite  torch.compile of ST without the definition's care for forbidden words; of the two compiled forms the
                faster one is the peer that the floors name
Beside them fused losses for comparable parts (benchmarks/libraries.py). Writes benchmarks/results/energy.json, on a GPU
results/gpu/energy.json; exits with 1 below a floor of benchmarks/floors.toml.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import kernels, libraries
from benchmarks.kernels import Case, ForwardBackward, Inputs, Provider, Rows
from engine_fast import ops
from engine_fast.operators import OPERATORS

SMALL = ((1, 7), (8, 100), (64, 1000), (256, 5000))
FLOOR_SIZES = ((1024, 10000), (512, 32000))
SIZES = ((1024, 32000), (1024, 128000), (4096, 10000), (4096, 32000), (4096, 128000))
GPU_SIZES = ((16384, 10000), (16384, 32000))
OURS = ("eager", "compile", "ours", "ours_overwrite")
YARDSTICKS = ("stream", "copy")
SCALE = 3.0
"""Of the random logits: neither flat nor one word alone."""


def cases(device: str, quick: bool) -> list[Case]:
    peers = ("cross_entropy", "forward_kl", *(("liger_kl", "liger_jsd") if device == "cuda" else ()))
    full = (*OURS, *YARDSTICKS, *peers)
    operators = [operator for operator in OPERATORS if operator != "ST"]
    if quick:
        main = _case(64, 1000, "ST", full, rounds=3, memory=("eager-fp32", "ours-fp32"))
        return [main, _small(1, 7, rounds=3), *(_case(8, 100, name, ("eager", "ours"), rounds=3) for name in operators)]
    sizes = [*SIZES, *(GPU_SIZES if device == "cuda" else ())]
    return [
        *(_small(n, v) for n, v in SMALL),
        _case(*FLOOR_SIZES[0], "ST", (*full, "compile_finite"), rounds=9, memory=tuple(f"{way}-fp32" for way in OURS)),
        _case(*FLOOR_SIZES[1], "ST", (*full, "compile_finite"), rounds=9),
        _case(*FLOOR_SIZES[0], "SX", (*OURS, "cross_entropy_softmax")),
        *(_case(*FLOOR_SIZES[0], name, OURS) for name in operators if name != "SX"),
        *(_case(n, v, "ST", full) for n, v in sizes),
    ]


def draw(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    shape = (case.rows, case.vocabulary)
    z, s = ((SCALE * torch.randn(shape, device=device)).to(dtype).requires_grad_() for _ in range(2))
    return Inputs((z, s), torch.linspace(0.5, 1.5, case.rows, device=device), overwritten=2)


def plain(case: Case, noise: Tensor | None) -> Callable[..., Tensor]:
    return lambda z, s: ops.reference.energy(z, s, case.operator, noise=kernels.noise_for(case, z, noise))


def ours(case: Case, noise: Tensor | None) -> Callable[..., Tensor]:
    return lambda z, s: ops.energy(z, s, case.operator, noise=noise)


def other(case: Case, way: str, inputs: Inputs) -> Provider:
    z, s = inputs.tensors
    if way == "ours_overwrite":
        return ForwardBackward(
            lambda z, s: ops.energy(z, s, case.operator, overwrite=True), inputs.tensors, inputs.upstream
        )
    if way == "compile_finite":
        compiled = torch.compile(finite_energy, fullgraph=True, dynamic=False)
        return ForwardBackward(compiled, inputs.tensors, inputs.upstream)
    if way == "stream":
        # Two neighbours of bfloat16 read as one float32 are an ordinary number, too.
        a, b = (tensor.detach().flatten()[: tensor.numel() // 2 * 2].view(torch.float32) for tensor in (z, s))
        return lambda: (torch.dot(a, b), a.mul_(1.0), b.mul_(1.0))
    if way == "copy":
        target = torch.empty_like(z, requires_grad=False)
        return lambda: target.copy_(z.detach())
    return libraries.energy_peer(way, case.operator, inputs)


def finite_energy(z: Tensor, s: Tensor) -> Tensor:
    """ST for finite logits."""
    log_p = s.float().log_softmax(-1)
    value = -log_p.gather(-1, z.argmax(-1, keepdim=True)).squeeze(-1)
    through = -(z.float().softmax(-1) * log_p.detach()).sum(-1)
    return value + (through - through.detach())


def figures(rows: Rows) -> dict[str, float]:
    """overwrite_speed, fresh_speed: times as fast as the faster of both compiled; stream_ratio: time over stream's."""
    found: dict[str, float | None] = {}
    for n, v in FLOOR_SIZES:
        row = rows.get(f"energy-ST-{n}x{v}", {})
        compiled = [name for name in ("compile-fp32", "compile_finite-fp32") if name in row]
        peer = min(compiled, key=lambda name: float(row[name]["seconds"]), default="compile-fp32")
        found[f"overwrite_speed_V{v}"] = kernels.speed(row, "ours_overwrite-fp32", peer)
        found[f"fresh_speed_V{v}"] = kernels.speed(row, "ours-fp32", peer)
        found[f"stream_ratio_V{v}"] = kernels.speed(row, "stream-fp32", "ours_overwrite-fp32")
        found[f"stream_ratio_bf16_V{v}"] = kernels.speed(row, "stream-bf16", "ours_overwrite-bf16")
    for n, v in SMALL:
        found[f"small_speed_{n}x{v}"] = kernels.speed(rows.get(f"energy-ST-{n}x{v}", {}), "ours-fp32", "eager-fp32")
    found["slowest_over_eager"] = kernels.slowest_over_eager(rows)
    found["error_ratio"] = kernels.worst_error_ratio(rows)
    return kernels.measured(found)


def _case(
    rows: int, vocabulary: int, operator: str, ways: tuple[str, ...], *, rounds: int = 5, memory: tuple[str, ...] = ()
) -> Case:
    providers = tuple(f"{way}-{dtype}" for dtype in kernels.DTYPES for way in ways)
    return Case("energy", operator, rows, vocabulary, providers, memory=memory, rounds=rounds)


def _small(rows: int, vocabulary: int, *, rounds: int = 15) -> Case:
    providers = tuple(f"{way}-{dtype}" for dtype in kernels.DTYPES for way in ("eager", "ours"))
    repeats = min(300, max(1, 2_000_000 // (rows * vocabulary)))
    return Case("energy", "ST", rows, vocabulary, providers, rounds=rounds, repeats=repeats)


BENCHMARK = kernels.Benchmark(
    name="energy",
    description=__doc__,
    cases=cases,
    draw=draw,
    plain=plain,
    ours=ours,
    other=other,
    error_case=lambda case: replace(case, rows=min(case.rows, 64)),
    outputs=lambda case: ("energy", "dz", "ds"),
    figures=figures,
    parts=libraries.ENERGY_PARTS,
)

if __name__ == "__main__":
    sys.exit(kernels.main(BENCHMARK))
