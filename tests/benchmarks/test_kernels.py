"""The providers of the operators' benchmarks compute the same numbers, and a floor that is missed is reported."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import bench_energy, bench_linear, bench_soft_embed, harness, kernels
from engine_fast import ops
from engine_fast.operators import OPERATORS

BENCHMARKS = [bench_energy.BENCHMARK, bench_soft_embed.BENCHMARK, bench_linear.BENCHMARK]
NOISELESS = [name for name, operator in OPERATORS.items() if not operator.gumbel]  # the others draw in every call
TINY = [
    (bench_energy.BENCHMARK, "energy", name, ways, 0)
    for name in NOISELESS
    for ways in (("ours", "ours_overwrite", *(("cross_entropy_softmax",) if name == "SX" else ())),)
]
TINY += [(bench_soft_embed.BENCHMARK, "soft_embedding", name, ("ours",), 16) for name in NOISELESS]
TINY += [(bench_linear.BENCHMARK, "linear_energy", name, ("ours", "ours_rows"), 16) for name in NOISELESS]
TINY += [(bench_linear.BENCHMARK, "linear_soft_embedding", name, ("ours",), 16) for name in NOISELESS]


def tiny(operation="energy", operator="ST", *, ways=("eager", "ours"), width=0, dtype="fp32", **fields):
    return kernels.Case(operation, operator, 6, 37, tuple(f"{way}-{dtype}" for way in ways), width, **fields)


def drawn(benchmark, case, dtype=torch.float32):
    torch.manual_seed(1)
    inputs = benchmark.draw(case, dtype, "cpu")
    inputs.restore()
    return inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("benchmark", "operation", "operator", "ways", "width"), TINY)
def test_every_provider_computes_one_value_and_gradient(benchmark, operation, operator, ways, width, dtype):
    case = tiny(operation, operator, width=width)
    inputs = drawn(benchmark, case, dtype)
    expected = kernels.make_provider(benchmark, case, "eager", inputs)()
    assert len(expected) == len(benchmark.outputs(case))
    for way in ways:
        got = kernels.make_provider(benchmark, case, way, inputs)()
        for name, x, true in zip(benchmark.outputs(case), got, expected, strict=True):
            x = x.sum() if way == "ours_rows" and name == "energy" else x
            allowed = (1e-5 if dtype == torch.float32 else 3e-2) * true.abs().max()
            assert (x.double() - true.double()).abs().max() <= allowed, f"{way}: {name}"
        inputs.restore()


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_the_definitions_compile(benchmark):
    torch.compiler.reset()
    for case in benchmark.cases("cpu", True):
        if case.operator in NOISELESS and "compile-fp32" in case.providers:
            inputs = drawn(benchmark, case)
            plain, compiled = (kernels.make_provider(benchmark, case, way, inputs)() for way in ("eager", "compile"))
            for x, y in zip(plain, compiled, strict=True):
                assert torch.allclose(x, y, rtol=1e-3, atol=1e-4 * float(x.abs().max()))


def test_comparable_parts_are_parts_of_ours():
    case = tiny()
    inputs = drawn(bench_energy.BENCHMARK, case)
    energy, dz, ds = kernels.make_provider(bench_energy.BENCHMARK, case, "eager", inputs)()
    for x, true in zip(
        kernels.ForwardBackward(bench_energy.finite_energy, inputs.tensors, inputs.upstream)(),
        (energy, dz, ds),
        strict=True,
    ):
        assert torch.allclose(x, true, atol=1e-5)
    peer_energy, peer_ds = kernels.make_provider(bench_energy.BENCHMARK, case, "cross_entropy", inputs)()
    assert torch.allclose(peer_energy, energy, atol=1e-5)
    assert torch.allclose(peer_ds, ds, atol=1e-6)

    case = tiny("linear_energy", width=16)
    inputs = drawn(bench_linear.BENCHMARK, case)
    torch.manual_seed(2)
    loss, dh, dw = kernels.make_provider(bench_linear.BENCHMARK, case, "linear_cross_entropy", inputs)()
    h, w = inputs.tensors[:2]
    torch.manual_seed(2)
    target = torch.randint(len(w), (len(h),))
    plain = F.cross_entropy(F.linear(h, w), target, reduction="sum")
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    for x, true in zip((dh, dw), torch.autograd.grad(plain, (h, w), inputs.upstream), strict=True):
        assert torch.allclose(x, true, atol=1e-5)


def test_what_a_provider_overwrites_is_put_back():
    case = tiny(ways=("eager", "ours_overwrite", "stream", "copy"))
    inputs = drawn(bench_energy.BENCHMARK, case)
    before = [tensor.detach().clone() for tensor in inputs.tensors]
    for way in ("stream", "copy"):
        kernels.make_provider(bench_energy.BENCHMARK, case, way, inputs)()
        assert all(torch.equal(x, y) for x, y in zip(inputs.tensors, before, strict=True))
    _, dz, ds = kernels.make_provider(bench_energy.BENCHMARK, case, "ours_overwrite", inputs)()
    assert [dz.data_ptr(), ds.data_ptr()] == [tensor.data_ptr() for tensor in inputs.tensors]
    assert not torch.equal(inputs.tensors[0], before[0])
    inputs.restore()
    assert all(torch.equal(x, y) for x, y in zip(inputs.tensors, before, strict=True))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("benchmark", "operation"), [(BENCHMARKS[0], "energy"), (BENCHMARKS[1], "soft_embedding")])
def test_errors_of_ours_are_within_the_rule(benchmark, operation, dtype, operator):
    case = tiny(operation, operator, width=0 if operation == "energy" else 8)
    errors = kernels.measure_errors(benchmark, case, dtype, "cpu")
    assert errors["ours"].keys() == errors["eager"].keys() == set(benchmark.outputs(case))
    assert max(errors["ratio"].values()) <= 2


def test_a_dropped_factor_is_an_error():
    wrong = replace(bench_energy.BENCHMARK, ours=lambda case, noise: lambda z, s: ops.energy(z, 1.001 * s, "ST"))
    errors = kernels.measure_errors(wrong, tiny(), "fp32", "cpu")
    assert max(errors["ratio"].values()) > 2


def test_an_error_that_is_not_a_number_is_below_the_floor():
    ratios = [{"ours-fp32": {"error_ratio": {"dz": value}}} for value in (1.0, math.nan, 0.5)]
    worst = kernels.worst_error_ratio({str(i): row for i, row in enumerate(ratios)})
    assert worst is not None
    assert math.isnan(worst)
    assert harness.judge({"error_ratio": worst}, {"error_ratio": {"at_most": 2.0}}) == ["error_ratio is not a number."]


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_cases_have_names_of_their_own_and_report_every_floor(benchmark):
    row = {"seconds": 1.0, "peak_mib_above_inputs": 2.0, "peak_mib_above_inputs_and_outputs": 1.0}
    row |= {"error_ratio": {"dz": 1.0}}
    for device, table in (("cpu", benchmark.name), ("cuda", f"{benchmark.name}_gpu")):
        cases = benchmark.cases(device, False)
        assert len({case.name for case in cases}) == len(cases)
        rows = {
            case.name: {
                name: {key: value for key, value in row.items() if "peak" not in key or name in case.memory}
                for name in case.providers
            }
            for case in cases
        }
        assert harness.floors(table).keys() <= benchmark.figures(rows).keys()
        assert benchmark.figures({}) == {}


@pytest.mark.parametrize(("floor", "status"), [({"at_least": 1e-9}, 0), ({"at_least": 1e9}, 1), ({"at_most": 0.0}, 1)])
def test_a_run_writes_its_rows_and_fails_below_a_floor(monkeypatch, tmp_path, capsys, floor, status):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(harness, "floors", lambda name: {"slowest_over_eager": floor})
    ways = ("eager", "ours", "ours_overwrite", "stream", "copy", "forward_kl", "liger_kl")
    small = replace(bench_energy.BENCHMARK, cases=lambda device, quick: [tiny(ways=ways, rounds=2, repeats=2)])
    threads = torch.get_num_threads()
    assert kernels.main(small, ["--threads", "1"]) == status
    torch.set_num_threads(threads)
    printed = capsys.readouterr()
    assert "liger_kl-fp32: left out, it needs a GPU" in printed.out
    assert ("below the floor: slowest_over_eager" in printed.err) == bool(status)
    written = json.loads((tmp_path / "benchmarks" / "results" / "energy.json").read_text())
    assert len(written["below_floor"]) == status
    rows = written["cases"]["energy-ST-6x37"]
    assert {"seconds", "spread", "error", "error_ratio"} <= rows["ours-fp32"].keys()
    assert set(ways) - {name.split("-")[0] for name in rows} <= {"forward_kl", "liger_kl"}


def test_quick_judges_and_writes_nothing_and_a_budget_leaves_cases_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "floors", lambda name: {"never": {"at_least": 1.0}})
    small = replace(bench_energy.BENCHMARK, cases=lambda device, quick: [tiny(rounds=1)])
    threads = torch.get_num_threads()
    assert kernels.main(small, ["--threads", "1", "--quick"]) == 0
    assert kernels.main(small, ["--threads", "1", "--quick", "--budget", "1e-9"]) == 0
    torch.set_num_threads(threads)
    assert "energy-ST-6x37: left out" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_peak_in_a_fresh_process_knows_what_is_handed_back():
    arguments = ["--quick", "--threads", "1", "--memory"]
    fresh, overwritten = (
        harness.in_fresh_process("benchmarks.bench_energy", *arguments, f"energy-ST-64x1000:{way}-fp32")
        for way in ("ours", "ours_overwrite")
    )
    table, energies = 64 * 1000 * 4 / harness.MiB, 64 * 4 / harness.MiB
    assert fresh["outputs"] == pytest.approx(2 * table + energies)
    assert overwritten["outputs"] == pytest.approx(energies)
    assert fresh["above_outputs"] <= fresh["above"]


def test_interleaving_repeats_and_prepares_outside_the_clock():
    calls: list[str] = []
    rows = harness.interleave(
        {name: lambda name=name: calls.append(name) for name in "ab"},
        rounds=1,
        warmup=1,
        repeats=2,
        before=lambda name: calls.append(name.upper()),
    )
    assert calls == list("AaaBbbBbbAaa")
    assert set(rows) == {"a", "b"}


@pytest.mark.parametrize("operator", ["SG", "GX"])
def test_peers_draw_noise_anew_in_every_call(operator):
    case = tiny(operator=operator)
    inputs = drawn(bench_energy.BENCHMARK, case)
    first, second = (kernels.make_provider(bench_energy.BENCHMARK, case, "eager", inputs)() for _ in range(2))
    assert not torch.equal(first[1], second[1])
