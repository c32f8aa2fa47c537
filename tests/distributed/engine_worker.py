"""A few ENGINE updates of a small student under one ZeRO stage, printed; also started by torchrun, for two ranks."""

from __future__ import annotations

import json
import sys

import torch

from engine_fast.config import Architecture, EngineConfig, OptimConfig, RuntimeConfig
from engine_fast.data.batching import Batch
from engine_fast.data.symbols import EOS, NUM_SPECIAL
from engine_fast.distributed import Engine, start
from engine_fast.distributed.runtime import leave
from engine_fast.models import CMLM, Transformer, freeze
from engine_fast.training.objectives import EngineObjective

VOCABULARY, NUM_MICRO, NUM_UPDATES = 53, 4, 3
SMALL = Architecture(width=16, ffn_width=24, heads=2, encoder_layers=1, decoder_layers=1, max_positions=12, dropout=0.0)


def micro_batch(update: int, number: int) -> Batch:
    torch.manual_seed(10 * update + number)
    ids = torch.randint(NUM_SPECIAL, VOCABULARY, (2, 3, 4 + number))
    ids[:, :, -1] = EOS
    return Batch(ids[0], ids[1], torch.arange(3))


def main(stage: int, head_memory: str) -> dict[str, object]:
    world = start(RuntimeConfig(device="cpu", threads=1))
    config = EngineConfig.model_validate(
        {"head_memory": head_memory, "zero_stage": stage, "optim": OptimConfig(lr=1e-2, clip_norm=0.5)}
    )
    torch.manual_seed(0)
    student, teacher = CMLM(SMALL, VOCABULARY, VOCABULARY), freeze(Transformer(SMALL, VOCABULARY, VOCABULARY))
    engine = Engine(EngineObjective(student, teacher, config), student, config, extra={}, world=world)
    losses, norms = [], []
    for update in range(NUM_UPDATES):
        batches = [micro_batch(update, number) for number in range(NUM_MICRO)]
        tokens, loss = sum(batch.num_target_tokens for batch in batches), torch.zeros(())
        for batch in batches[world.rank :: world.size]:
            loss += engine.backward(batch, num_target_tokens=tokens)["loss"]
        norms.append(engine.step(1e-2).grad_norm)
        losses.append(float(world.all_reduce_sum(loss)) / tokens)
    return {"rank": world.rank, "losses": losses, "norms": norms}


if __name__ == "__main__":
    result = main(int(sys.argv[1]), sys.argv[2])
    if result["rank"] == 0:
        print("RESULT " + json.dumps(result))
    leave(0)
