"""Started by torchrun in test_ranks: a few updates of a small net on one rank's share of fixed sentences, printed."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine_fast.config import OptimConfig, RuntimeConfig, TrainConfig
from engine_fast.distributed import Engine, start
from engine_fast.distributed.runtime import leave

NUM_MICRO, NUM_UPDATES, WIDTH = 4, 5, 7


@dataclass
class Loss:
    total: Tensor
    stats: dict[str, Tensor]


class Objective(nn.Module):
    """Sum of squared errors over a micro-batch; each row stands for a token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trained = nn.Sequential(nn.Linear(WIDTH, 13), nn.Tanh(), nn.Linear(13, 3))

    def forward(self, batch: tuple[Tensor, Tensor]) -> Loss:
        total = (self.trained(batch[0].to(next(self.parameters()).dtype)).float() - batch[1]).square().sum()
        return Loss(total, {"loss": total.detach(), "tokens": torch.tensor(float(len(batch[0])))})


def micro_batch(update: int, number: int) -> tuple[Tensor, Tensor]:
    """Micro-batches of unequal size, the same whoever computes them."""
    generator = torch.Generator().manual_seed(100 * update + number)
    rows = 1 + (3 * update + 5 * number) % 6
    return torch.randn(rows, WIDTH, generator=generator), torch.randn(rows, 3, generator=generator)


def main(stage: int, precision: str) -> dict[str, object]:
    world = start(RuntimeConfig(device="cpu", threads=1))
    config = TrainConfig(
        precision=precision, zero_stage=stage, optim=OptimConfig(lr=1e-2, weight_decay=0.1, clip_norm=0.5)
    )
    objective = Objective()
    engine = Engine(objective, objective.trained, config, extra={}, world=world)
    losses, norms = [], []
    for update in range(NUM_UPDATES):
        batches = [micro_batch(update, number) for number in range(NUM_MICRO)]
        tokens, loss = sum(len(batch[0]) for batch in batches), torch.zeros(())
        for batch in batches[world.rank :: world.size]:
            loss += engine.backward(batch, num_target_tokens=tokens)["loss"]
        norms.append(engine.step(1e-2 / (1 + update)).grad_norm)
        losses.append(float(world.all_reduce_sum(loss)) / tokens)
    weights = {name: tensor.flatten().tolist() for name, tensor in engine.weights().items()}
    assert world.gather(world.rank) == list(range(world.size))
    assert world.broadcast(world.rank) == 0
    assert world.any(world.rank == world.size - 1)
    return {"rank": world.rank, "losses": losses, "norms": norms, "weights": weights}


if __name__ == "__main__":
    result = main(int(sys.argv[1]), sys.argv[2])
    if result["rank"] == 0:
        print("RESULT " + json.dumps(result))
    leave(0)
