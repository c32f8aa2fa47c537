"""The plan holds for real updates, and the measurement that says so can fail."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import bench_plan, harness, memory
from engine_fast.training.plan import Shape, plan_memory


@pytest.mark.parametrize("case", bench_plan.quick_cases(), ids=lambda case: case.name)
def test_the_plan_is_within_15_percent_of_the_measured_peak(case):
    row = bench_plan.compare(case)
    assert 0.85 <= row["ratio"] <= 1.15, row
    assert row["planned_mib"].keys() == row["measured_mib"].keys()
    assert min(row["measured_mib"].values()) > 20
    for phase, planned in row["planned_mib"].items():
        assert planned == pytest.approx(row["measured_mib"][phase], rel=0.15), phase


def test_the_plan_of_something_else_is_not(monkeypatch):
    """What the comparison would miss if it judged nothing: another stage or width differs by more than 15%."""
    case = bench_plan.quick_cases()[1]
    work = case.work()
    shape = Shape(work.sentences, work.source, work.target)
    plan = plan_memory(case.config(), case.stage, ranks=1, device="cpu", shape=shape, vocabulary=work.vocabulary)
    monkeypatch.setattr(bench_plan, "measure", lambda _: plan.moments)
    assert bench_plan.compare(case)["ratio"] == pytest.approx(1, rel=1e-3)
    for key, value in (("teacher.zero_stage", 0), ("teacher.architecture.width", 320)):
        other = replace(case, settings=(*case.settings, (key, value)))
        assert abs(bench_plan.compare(other)["ratio"] - 1) > 0.15, key


def test_the_running_total_follows_allocations_and_unseen_frees():
    events = [(1, 1000, 100), (2, 2000, 50), (3, 1000, -100), (4, 1900, 200), (5, 7, -10), (6, 5000, 10)]
    assert memory._running_total(events) == ([1, 2, 3, 4, 5, 6], [100, 150, 50, 200, 200, 210])
    times, totals = memory._running_total(events)
    assert memory._peak(times, totals, 1, 3) == 150
    assert memory._peak(times, totals, 3, 3) == 50
    assert memory._peak(times, totals, 9, 10) == 210


def test_cases_have_names_of_their_own_and_fit_the_configuration():
    cases = list(bench_plan.cases())
    assert len({case.name for case in cases}) == len(cases)
    stages = {(case.config().teacher.effective_zero_stage, case.ranks) for case in cases if case.stage == "teacher"}
    assert stages == {(stage, ranks) for stage in range(4) for ranks in (1, 2)}
    assert harness.floors("plan").keys() == {"most_over", "most_under"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [case for case in bench_plan.cases() if case.ranks == 2 and case.load == "states"],
    ids=lambda case: case.name,
)
def test_so_is_that_of_two_ranks(case):
    assert 0.85 <= bench_plan.compare(case)["ratio"] <= 1.15
