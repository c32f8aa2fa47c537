"""linear_energy and linear_soft_embedding, heads included, forward and backward, against eager and torch.compile.

    python -m benchmarks.bench_linear [--quick] [--device cpu|cuda] [--only TEXT]

linear_energy         sum over N rows of energy(h_s W_s', h_t W_t'): gradients to h_s, W_s and h_t; W_t is frozen
linear_soft_embedding (N, D) embeddings O(h W_s') @ table: gradients to h and W_s; the table is frozen
ours_rows             linear_energy with reduction="none", whose backward recomputes the tiles; the others sum

Beside them fused cross-entropies with one head and class indices (benchmarks/libraries.py): 3 of the 5 products.
The peak is above the inputs; dW_s (V, D), which everyone hands back, is part of it. Errors are measured at N = 256,
V = 4000. Each row's choice is clear, because a bf16 product may tip one that is not, which says nothing of an op.
Writes benchmarks/results/linear.json, on a GPU results/gpu/linear.json; exits with 1 below a floor of floors.toml.
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

SIZE = (4096, 32000, 512)
GPU_SIZE = (16384, 32000, 1024)
ENERGY_FP32 = ("eager", "compile", "ours", "ours_rows", "linear_cross_entropy")
ENERGY_BF16 = ("compile", "ours", "linear_cross_entropy")
GPU_PEERS = ("cut_cross_entropy", "liger_linear_cross_entropy", "liger_linear_jsd")
EMBEDDING_FP32 = ("eager", "compile", "ours")
EMBEDDING_BF16 = ("compile", "ours")
MEMORY = ("eager-fp32", "compile-fp32", "ours-fp32", "ours-bf16")
MARGIN = 8.0
"""How far a row's word stands above the others' mean; the others spread by about 1."""


def cases(device: str, quick: bool) -> list[Case]:
    more = GPU_PEERS if device == "cuda" else ()
    energy = (*_named(ENERGY_FP32, "fp32"), *_named((*ENERGY_BF16, *more), "bf16"))
    embedding = (*_named(EMBEDDING_FP32, "fp32"), *_named(EMBEDDING_BF16, "bf16"))
    sizes = [(128, 1000, 64)] if quick else [SIZE, GPU_SIZE] if device == "cuda" else [SIZE]
    memory = ("eager-fp32", "ours-fp32") if quick else MEMORY
    found = []
    for n, v, d in sizes:
        found.append(Case("linear_energy", "ST", n, v, energy, d, (*memory, "linear_cross_entropy-fp32"), rounds=3))
        found.append(Case("linear_soft_embedding", "SX", n, v, embedding, d, memory, rounds=3))
    return found


def draw(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    w_student, other_table = (torch.randn(case.vocabulary, case.width, device=device) for _ in range(2))
    w_student, other_table = (table * case.width**-0.5 for table in (w_student, other_table))
    words = torch.randint(case.vocabulary, (case.rows,), device=device)
    h_student, h_teacher = (torch.randn(case.rows, case.width, device=device) for _ in range(2))
    h_student += MARGIN * w_student[words]
    hidden = h_student.to(dtype).requires_grad_(), w_student.to(dtype).requires_grad_()
    if case.operation == "linear_soft_embedding":
        return Inputs((*hidden, other_table.to(dtype)), torch.randn(case.rows, case.width, device=device))
    teacher = (3 * h_teacher).to(dtype).requires_grad_(), other_table.to(dtype)
    return Inputs((*hidden, *teacher), torch.tensor(0.37, device=device))


def plain(case: Case, noise: Tensor | None) -> Callable[..., Tensor]:
    if case.operation == "linear_soft_embedding":
        return lambda h, w, table: ops.reference.linear_soft_embedding(h, w, table, case.operator, noise=noise)
    return lambda h_s, w_s, h_t, w_t: ops.reference.linear_energy(
        h_s, w_s, h_t, w_t, case.operator, noise=noise, reduction="sum"
    )


def ours(case: Case, noise: Tensor | None) -> Callable[..., Tensor]:
    if case.operation == "linear_soft_embedding":
        return lambda h, w, table: ops.linear_soft_embedding(h, w, table, case.operator, noise=noise)
    return lambda h_s, w_s, h_t, w_t: ops.linear_energy(h_s, w_s, h_t, w_t, case.operator, noise=noise, reduction="sum")


def other(case: Case, way: str, inputs: Inputs) -> Provider:
    if way == "ours_rows":
        return ForwardBackward(
            lambda h_s, w_s, h_t, w_t: ops.linear_energy(h_s, w_s, h_t, w_t, case.operator, reduction="none"),
            inputs.tensors,
            inputs.upstream.expand(case.rows),
        )
    return libraries.linear_peer(way, inputs)


def figures(rows: Rows) -> dict[str, float]:
    """Speeds are times as fast as compile in fp32; memory is the peak above the inputs over compile's, fp32."""
    found: dict[str, float | None] = {}
    for operation, operator in (("energy", "ST"), ("soft_embedding", "SX")):
        row = rows.get(f"linear_{operation}-{operator}-{'x'.join(map(str, SIZE))}", {})
        found[f"{operation}_fp32_speed"] = kernels.speed(row, "ours-fp32", "compile-fp32")
        found[f"{operation}_bf16_speed"] = kernels.speed(row, "ours-bf16", "compile-fp32")
        found[f"{operation}_fp32_memory"] = kernels.memory_ratio(row, "ours-fp32", "compile-fp32", "inputs")
    found["error_ratio"] = kernels.worst_error_ratio(rows)
    return kernels.measured(found)


def error_case(case: Case) -> Case:
    return replace(case, rows=min(case.rows, 256), vocabulary=min(case.vocabulary, 4000))


def _named(ways: tuple[str, ...], dtype: str) -> tuple[str, ...]:
    return tuple(f"{way}-{dtype}" for way in ways)


BENCHMARK = kernels.Benchmark(
    name="linear",
    description=__doc__,
    cases=cases,
    draw=draw,
    plain=plain,
    ours=ours,
    other=other,
    error_case=error_case,
    outputs=lambda case: ("x", "dh", "dW") if "embedding" in case.operation else ("energy", "dh_s", "dW_s", "dh_t"),
    figures=figures,
    parts=libraries.LINEAR_PARTS,
)

if __name__ == "__main__":
    sys.exit(kernels.main(BENCHMARK))
