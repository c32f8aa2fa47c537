"""What a checkpoint costs the step loop: python -m benchmarks.bench_checkpoint [--millions 60] [--repeats 5]

One rank, fp32, ZeRO stage 1, a stack of linear layers of that many parameters. `written` is what the loop waits for in
any case; `sealed` is the rest (flush, checksums, rename), waited for at once or left to the thread. The extra seconds
of the updates after a save, beside that thread, count as its cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engine_fast.config import RuntimeConfig, TrainConfig
from engine_fast.distributed import CheckpointStore, Engine, World, start
from engine_fast.distributed.checkpoint import WEIGHTS

WIDTH, ROWS = 1024, 256


@dataclass
class Loss:
    total: Tensor
    stats: dict[str, Tensor]


class Objective(nn.Module):
    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.trained = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(num_layers)))

    def forward(self, batch: Tensor) -> Loss:
        total = self.trained(batch).square().sum()
        return Loss(total, {"loss": total.detach()})


def timed(action: Callable[[], None]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def measure(world: World, millions: int, repeats: int, updates: int) -> dict[str, float]:
    """Medians in seconds."""
    objective = Objective(max(1, round(millions * 1e6 / (WIDTH * (WIDTH + 1)))))
    engine = Engine(objective, objective.trained, TrainConfig(zero_stage=1), extra={}, world=world)
    batch = torch.randn(ROWS, WIDTH)
    rows: dict[str, list[float]] = {"written": [], "sealed_at_once": [], "joined_later": [], "alone": [], "beside": []}

    def train() -> None:
        for _ in range(updates):
            engine.backward(batch, num_target_tokens=ROWS)
            engine.step(1e-4)

    with tempfile.TemporaryDirectory(dir=".") as directory:
        store = CheckpointStore(Path(directory), world=world)

        def write(path: Path) -> None:
            engine.save(path)
            save_file(engine.weights(), path / WEIGHTS)

        def save() -> None:
            store.save("update-00000001", {"update": 1}, write, num_bytes=0)

        train()
        for _ in range(repeats):
            rows["alone"].append(timed(train))
            rows["written"].append(timed(save))
            rows["sealed_at_once"].append(timed(store.join))
            rows["written"].append(timed(save))
            rows["beside"].append(timed(train))
            rows["joined_later"].append(timed(store.join))
    medians = {name: statistics.median(values) for name, values in rows.items()}
    slower = max(0.0, medians["beside"] - medians["alone"])
    return {
        "parameters": engine.num_parameters, "updates": updates, **medians,
        "blocked_synchronous": medians["written"] + medians["sealed_at_once"],
        "blocked_in_background": medians["written"] + medians["joined_later"] + slower,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    world = start(RuntimeConfig(device="cpu", threads=given.threads))
    result = measure(world, given.millions, given.repeats, given.updates)
    print(json.dumps({name: round(value, 3) for name, value in result.items()}, indent=2))


if __name__ == "__main__":
    main()
