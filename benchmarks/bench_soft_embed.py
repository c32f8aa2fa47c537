"""soft_embedding(z, table), forward and backward to z with a frozen table, against eager, torch.compile and two GEMMs.

    python -m benchmarks.bench_soft_embed [--quick] [--device cpu|cuda] [--only TEXT]

gemm_only  the two matrix products alone, (N, V) @ (V, D) and (N, D) @ (D, V), into tensors that exist: a lower bound of
           whatever multiplies a whole distribution with the table. Hard operators need only the second.

`peak less outputs` subtracts x (N, D) and dz (N, V), which every provider hands back, by their sizes. Writes
benchmarks/results/soft_embed.json, on a GPU results/gpu/soft_embed.json; exits with 1 below a floor of floors.toml.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import kernels
from benchmarks.kernels import Case, Inputs, Provider, Rows
from engine_fast import ops
from engine_fast.operators import OPERATORS, get_operator

MAIN = (1024, 10000, 512)
SIZES = ((1024, 32000, 512), (4096, 10000, 512), (4096, 32000, 512), (1024, 128000, 512))
GPU_SIZES = ((16384, 32000, 512), (4096, 32000, 1024))
WAYS = ("eager", "compile", "ours", "gemm_only")
SCALE = 3.0


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        memory = ("eager-fp32", "ours-fp32")
        main = _case((128, 1000, 64), "SX", rounds=3, memory=memory)
        return [main, *(_case((16, 100, 8), name, ("eager", "ours"), rounds=3) for name in OPERATORS)]
    sizes = [*SIZES, *(GPU_SIZES if device == "cuda" else ())]
    return [
        _case((64, 1000, 64), "SX", ("eager", "ours"), rounds=15, repeats=20),
        _case(MAIN, "SX", rounds=9, memory=("eager-fp32", "compile-fp32", "ours-fp32", "ours-bf16")),
        *(_case(MAIN, name) for name in OPERATORS if name != "SX"),
        *(_case(size, "SX") for size in sizes),
    ]


def draw(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    z = (SCALE * torch.randn(case.rows, case.vocabulary, device=device)).to(dtype).requires_grad_()
    table = torch.randn(case.vocabulary, case.width, device=device) * case.width**-0.5
    return Inputs((z, table.to(dtype)), torch.randn(case.rows, case.width, device=device))


def plain(case: Case, noise: Tensor | None) -> Callable[..., Tensor]:
    return lambda z, table: ops.reference.soft_embedding(
        z, table, case.operator, noise=kernels.noise_for(case, z, noise)
    )


def ours(case: Case, noise: Tensor | None) -> Callable[..., Tensor]:
    return lambda z, table: ops.soft_embedding(z, table, case.operator, noise=noise)


def other(case: Case, way: str, inputs: Inputs) -> Provider:
    if way != "gemm_only":
        raise ValueError(f"way = {way!r}, expected gemm_only.")
    z, table = (tensor.detach() for tensor in inputs.tensors)
    x, du, dq = z.new_empty(case.rows, case.width), inputs.upstream.to(z.dtype), torch.empty_like(z)
    hard = get_operator(case.operator).hard
    return lambda: (None if hard else torch.mm(z, table, out=x), torch.mm(du, table.t(), out=dq))


def figures(rows: Rows) -> dict[str, float]:
    """Speeds are times as fast as compile in fp32; memory is the peak above inputs and outputs over compile's."""
    row = rows.get(f"soft_embedding-SX-{'x'.join(map(str, MAIN))}", {})
    return kernels.measured(
        {
            "fp32_speed": kernels.speed(row, "ours-fp32", "compile-fp32"),
            "bf16_speed": kernels.speed(row, "ours-bf16", "compile-fp32"),
            "fp32_time_over_gemm_only": kernels.speed(row, "gemm_only-fp32", "ours-fp32"),
            "fp32_memory": kernels.memory_ratio(row, "ours-fp32", "compile-fp32", "inputs_and_outputs"),
            "slowest_over_eager": kernels.slowest_over_eager(rows),
            "error_ratio": kernels.worst_error_ratio(rows),
        }
    )


def _case(
    size: tuple[int, int, int],
    operator: str,
    ways: tuple[str, ...] = WAYS,
    *,
    rounds: int = 5,
    repeats: int = 1,
    memory: tuple[str, ...] = (),
) -> Case:
    providers = tuple(f"{way}-{dtype}" for dtype in kernels.DTYPES for way in ways)
    rows, vocabulary, width = size
    return Case("soft_embedding", operator, rows, vocabulary, providers, width, memory, rounds, repeats)


BENCHMARK = kernels.Benchmark(
    name="soft_embed",
    description=__doc__,
    cases=cases,
    draw=draw,
    plain=plain,
    ours=ours,
    other=other,
    error_case=lambda case: replace(case, rows=min(case.rows, 64)),
    outputs=lambda case: ("x", "dz"),
    figures=figures,
    parts={"gemm_only": "the matrix products alone, into tensors that exist"},
)

if __name__ == "__main__":
    sys.exit(kernels.main(BENCHMARK))
