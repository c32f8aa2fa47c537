"""Faults strike real training runs: a few here, the whole matrix among the slow tests (tests/cluster/matrix.py)."""

from collections import Counter

import pytest

from tests.cluster import hosts, strike
from tests.cluster.cases import FAULTS, MOMENTS, VICTIMS, Case, every_combination, left_out, tried

QUICK = (Case("full disk", "in save", "rank 0", "writing"), Case("truncated file", "in load", "rank 1"))
QUICK_HOSTS = ("a rank is killed, --max-restarts 1",)


def test_every_combination_is_tried_or_left_out_for_a_reason():
    cells = Counter((case.fault, case.moment, case.victim) for case in every_combination())
    assert set(cells) == {(fault, moment, victim) for fault in FAULTS for moment in MOMENTS for victim in VICTIMS}
    assert len({case.name for case in every_combination()}) == cells.total()
    for fault in FAULTS:
        for moment in MOMENTS:
            if all(left_out(Case(fault, moment, victim)) for victim in VICTIMS):
                assert (fault, moment) in {("truncated file", "in save"), ("flipped bit", "in save")}


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_the_same_command_continues_after(case, cluster, made, tmp_path):
    assert strike.try_case(case, cluster, made, tmp_path).problems == []


@pytest.mark.parametrize("name", QUICK_HOSTS)
def test_two_hosts(name, cluster, made, tmp_path):
    assert hosts.try_case(name, cluster, made, tmp_path).problems == []


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in tried() if case not in QUICK], ids=lambda case: case.name)
def test_the_same_command_continues_after_every(case, cluster, made, tmp_path):
    assert strike.try_case(case, cluster, made, tmp_path).problems == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in hosts.CASES if name not in QUICK_HOSTS])
def test_two_hosts_every(name, cluster, made, tmp_path):
    assert hosts.try_case(name, cluster, made, tmp_path).problems == []
