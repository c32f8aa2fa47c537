"""ENGINE updates of a small student, in plain torch and on the DeepSpeed engine; also started by torchrun, for ranks.

Every run works on the same global micro-batches: rank r of W takes those numbered r, r + W, ...
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from engine_fast import ops
from engine_fast.config import Architecture, EngineConfig, LSTMArchitecture, RuntimeConfig, TaggerArchitecture
from engine_fast.data.batching import Batch
from engine_fast.data.symbols import EOS, NUM_SPECIAL, PAD
from engine_fast.distributed import Engine, shard_frozen, start
from engine_fast.distributed.runtime import leave
from engine_fast.energies import TeacherEnergy
from engine_fast.models import CMLM, Seq2Seq, Student, Tagger, Teacher, Transformer, freeze
from engine_fast.training.objectives import EngineObjective

VOCABULARY, NUM_MICRO, NUM_UPDATES, LR = 53, 4, 20, 2e-3
SMALL = Architecture(width=16, ffn_width=24, heads=2, encoder_layers=1, decoder_layers=1, max_positions=12, dropout=0.0)
LSTM = LSTMArchitecture(embedding_width=16, encoder_width=12, decoder_width=20, max_positions=12, dropout=0.0)
TAGGER = TaggerArchitecture(embedding_width=16, width=12, max_positions=12, dropout=0.0)
NOTHING_STAYS_WHOLE = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
    }
}  # fmt: skip
"""Or stage 3 would leave weights as small as these on every rank, or for their next use."""


def micro_batch(update: int, number: int) -> Batch:
    """Sentences of unequal lengths, the same whoever computes them."""
    generator = torch.Generator().manual_seed(10 * update + number)
    ids = torch.randint(NUM_SPECIAL, VOCABULARY, (2, 3, 4 + number), generator=generator)
    ids[:, :, -1] = EOS
    ids[:, 0, -2:] = torch.tensor([EOS, PAD])
    return Batch(ids[0], ids[1], torch.arange(3))


def config_of(**settings: Any) -> EngineConfig:
    optim = {"lr": LR, "clip_norm": 0.5, "weight_decay": 0.1}
    return EngineConfig.model_validate({"optim": optim, **settings})


def models(networks: str = "transformers", teacher_dtype: torch.dtype | None = None) -> tuple[Student, Teacher]:
    """networks: "transformers", or "recurrent" or "feeding", an LSTM without or with input feeding and a tagger."""
    torch.manual_seed(0)
    student: Student
    teacher: Teacher
    if networks == "transformers":
        student, teacher = CMLM(SMALL, VOCABULARY, VOCABULARY), Transformer(SMALL, VOCABULARY, VOCABULARY)
    else:
        lstm = LSTM.model_copy(update={"input_feeding": networks == "feeding"})
        student, teacher = Tagger(TAGGER, VOCABULARY, VOCABULARY), Seq2Seq(lstm, VOCABULARY, VOCABULARY)
    return student, freeze(teacher, dtype=teacher_dtype)


def plain(networks: str = "transformers") -> dict[str, Any]:
    """No DeepSpeed and no fused operator: one process, AdamW, everything in float32."""
    student, teacher = models(networks)
    masters = [parameter.detach().clone().requires_grad_() for parameter in student.parameters()]
    objective = EngineObjective(student, TeacherEnergy(teacher), config_of())
    optimizer = torch.optim.AdamW(masters, lr=LR, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
    losses, norms = [], []
    with ops.using("reference"):
        for update in range(NUM_UPDATES):
            batches = [micro_batch(update, number) for number in range(NUM_MICRO)]
            tokens, loss = sum(batch.num_target_tokens for batch in batches), 0.0
            for master in masters:
                master.grad = torch.zeros_like(master)
            for batch in batches:
                student.zero_grad()
                total = objective(batch).total
                (total / tokens).backward()
                loss += float(total.detach())
                for master, parameter in zip(masters, student.parameters(), strict=True):
                    master.grad += parameter.grad.float()
            norms.append(float(torch.nn.utils.clip_grad_norm_(masters, 0.5)))
            optimizer.step()
            with torch.no_grad():
                for master, parameter in zip(masters, student.parameters(), strict=True):
                    parameter.copy_(master)
            losses.append(loss / tokens)
    return {"losses": losses, "norms": norms}


def on_engine(networks: str = "transformers", **settings: Any) -> dict[str, Any]:
    """The same updates on the engine; `settings` are those of the engine stage."""
    world = start(RuntimeConfig(device="cpu", threads=1))
    config = config_of(**settings)
    half = (config.teacher_precision or config.precision) == "bf16"
    student, teacher = models(networks, torch.bfloat16 if half else None)
    within = (
        shard_frozen(teacher, device=world.device, extra=NOTHING_STAYS_WHOLE)
        if config.teacher_placement == "sharded"
        else None
    )
    objective = EngineObjective(student, TeacherEnergy(teacher.eval()), config, within=within)
    engine = Engine(objective, student, config, extra=NOTHING_STAYS_WHOLE, world=world)
    losses, norms = [], []
    for update in range(NUM_UPDATES):
        batches = [micro_batch(update, number) for number in range(NUM_MICRO)]
        tokens, loss = sum(batch.num_target_tokens for batch in batches), torch.zeros(())
        mine = batches[world.rank :: world.size]
        engine.prepare(mine, done=0.0)
        for batch in mine:
            loss += engine.backward(batch, num_target_tokens=tokens)["loss"]
        norms.append(engine.step(LR).grad_norm)
        losses.append(float(world.all_reduce_sum(loss)) / tokens)
    return {
        "losses": losses,
        "norms": norms,
        "whole": sum(parameter.numel() for parameter in student.parameters()) / engine.num_parameters,
        "teacher_whole": sum(parameter.numel() for parameter in teacher.parameters()),
    }


if __name__ == "__main__":
    results = [on_engine(**settings) for settings in json.loads(sys.argv[1])]
    if start(RuntimeConfig(device="cpu", threads=1)).is_main:
        print("RESULT " + json.dumps(results))
    leave(0)
