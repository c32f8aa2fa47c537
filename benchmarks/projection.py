"""A cost model of an update on many GPUs. What it prints is a projection: nothing of it has been measured.

    time(R) = compute + sum over collectives of [ratio(R) * bytes / bandwidth(R) + latency * hops(R)]

ratio: the share of a tensor's bytes that each rank sends: 2 (R - 1) / R to reduce it for all, (R - 1) / R to gather or
scatter it (a ring moves no less). hops: 2 log2 R or log2 R of a tree. Within a node the bandwidth is NVLink's, beyond
it the network's share of a GPU. Bytes a parameter and calls of each ZeRO stage are those counted on two ranks, per
micro-batch and per update; compute is FLOP over the assumed rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

_SENT = {"all_reduce": 2.0, "reduce": 1.0, "reduce_scatter": 1.0, "all_gather": 1.0, "broadcast": 1.0}


@dataclass(frozen=True)
class Assumptions:
    """Of the machines; none is measured here."""

    teraflops: float = 100.0
    """That a GPU reaches in this work: a quarter of an H100's dense bf16 rate is 250; short sentences reach less."""
    node_gb_per_second: float = 300.0
    """That a GPU sends within its node (NVLink 4: 450 a direction, 300 in practice)."""
    network_gb_per_second: float = 40.0
    """That a GPU sends to other nodes (InfiniBand NDR, a 400 Gbit/s port a GPU: 50, 40 in practice)."""
    latency_us: float = 10.0
    """Of a hop of a collective."""
    ranks_per_node: int = 8


@dataclass(frozen=True)
class Traffic:
    """Of one rank."""

    bytes: Mapping[str, float]
    """Kind of collective -> bytes of the tensors."""
    calls: Mapping[str, float]


@dataclass(frozen=True)
class Projection:
    ranks: int
    compute: float
    """Seconds of an update."""
    communication: float
    """Seconds, none of it hidden."""

    @property
    def efficiency(self) -> tuple[float, float]:
        """Share of the time that is computation: nothing hidden, and all that can be hidden behind the backward pass
        (two thirds of the computation)."""
        hidden = max(0.0, self.communication - self.compute * 2 / 3)
        return self.compute / (self.compute + self.communication), self.compute / (self.compute + hidden)


def project(
    ranks: int, *, flop: float, micro: Traffic, update: Traffic, accumulate: int, assumptions: Assumptions
) -> Projection:
    """An update of `accumulate` micro-batches on every rank. flop: of a micro-batch; micro, update: sent in each."""
    compute = accumulate * flop / (assumptions.teraflops * 1e12)
    communication = accumulate * _seconds(micro, ranks, assumptions) + _seconds(update, ranks, assumptions)
    return Projection(ranks, compute, communication)


def _seconds(traffic: Traffic, ranks: int, assumptions: Assumptions) -> float:
    if ranks == 1:
        return 0.0
    inside = ranks <= assumptions.ranks_per_node
    bandwidth = (assumptions.node_gb_per_second if inside else assumptions.network_gb_per_second) * 1e9
    seconds = 0.0
    for kind, factor in _SENT.items():
        seconds += factor * (ranks - 1) / ranks * traffic.bytes.get(kind, 0.0) / bandwidth
        seconds += factor * math.log2(ranks) * traffic.calls.get(kind, 0.0) * assumptions.latency_us * 1e-6
    return seconds
