"""metrics.jsonl and TensorBoard, without a line twice after a resume; sums over the updates between two lines."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine_fast.distributed import World
from engine_fast.evaluation.files import write_atomic

SUMS = (
    "loss", "nll", "tokens", "sentences", "energy", "relaxed_energy", "length_loss", "length_correct", "masked_tokens",
    "repetition",
)  # fmt: skip


class Sums:
    """Running sums of an objective's stats, kept on the device until somebody reads them."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        self._seen: frozenset[str] = frozenset()
        self._columns: dict[tuple[str, ...], Tensor] = {}

    def add(self, stats: dict[str, Tensor]) -> None:
        names = tuple(name for name in SUMS if name in stats)
        if names not in self._columns:  # on the device once: a copy to it would wait for what the device is doing
            self._columns[names] = torch.tensor([SUMS.index(name) for name in names], device=self._sums.device)
        values = torch.stack([stats[name].to(self._sums.device) for name in names]).double()
        self._sums.index_add_(0, self._columns[names], values)
        self._seen |= frozenset(names)

    def state(self) -> dict[str, float]:
        """This rank's sums, exact."""
        return {name: value for name, value in zip(SUMS, self._sums.tolist(), strict=True) if name in self._seen}

    def load(self, state: dict[str, float]) -> None:
        self._sums.copy_(torch.tensor([state.get(name, 0.0) for name in SUMS], dtype=torch.float64))
        self._seen = frozenset(state)

    def clear(self) -> None:
        self._sums.zero_()

    def averages(self, world: World) -> dict[str, float]:
        """Loss and nll a token; energies, length loss, repetitions a sentence; length accuracy; counts."""
        seen = frozenset().union(*world.gather(self._seen))
        total = world.all_reduce_sum(self._sums.clone()).tolist()
        sums = {name: value for name, value in zip(SUMS, total, strict=True) if name in seen}
        tokens, sentences = max(sums.get("tokens", 0.0), 1.0), max(sums.get("sentences", 0.0), 1.0)
        result = {"tokens": sums.get("tokens", 0.0), "sentences": sums.get("sentences", 0.0)}
        for name, unit in (
            ("loss", tokens),
            ("nll", sums.get("masked_tokens", tokens) or 1.0),
            ("energy", sentences),
            ("relaxed_energy", sentences),
            ("length_loss", sentences),
            ("repetition", sentences),
        ):
            if name in sums:
                result[name] = sums[name] / unit
        if "length_correct" in sums:
            result["length_accuracy"] = sums["length_correct"] / sentences
        return result


def shared_out(states: list[dict[str, float]], size: int) -> list[dict[str, float]]:
    """What `Sums.state` gave on each rank, for `size` ranks: as it is, or everything to the first of them."""
    if len(states) == size:
        return states
    names = {name for state in states for name in state}
    total = {name: sum(state.get(name, 0.0) for state in states) for name in names}
    return [total, *({} for _ in range(size - 1))]


class MetricsLog:
    """Appends lines to metrics.jsonl and scalars to TensorBoard. Only rank 0 has one."""

    def __init__(self, directory: Path, *, update: int, validated: int, tensorboard: bool) -> None:
        """Start after `update` (-1: afresh). Later lines, and validations after `validated`, will come again."""
        self.path = directory / "metrics.jsonl"
        _truncate(self.path, {"train": update, "valid": validated})
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _board(directory / "tensorboard", update) if tensorboard else None

    def write(self, kind: str, update: int, values: Mapping[str, float]) -> None:
        """One line {"kind", "update", **values}, in the file when this returns, without values that are not finite."""
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        record = {"kind": kind, "update": update, **values}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, update)

    def sync(self) -> None:
        """The lines so far survive a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; a line cut off by a kill is left out."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
    return records


def _truncate(path: Path, last: dict[str, int]) -> None:
    kept = [record for record in read_metrics(path) if record["update"] <= last.get(record["kind"], -1)]
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))


def _board(directory: Path, from_update: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory), purge_step=from_update + 1)
