"""Two ranks over gloo compute what one process does, and both what plain torch does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from . import worker

WORKER = Path(worker.__file__)


def launch(ranks, *arguments, worker=WORKER):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    done = subprocess.run(
        [*command, str(worker), *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


@pytest.fixture(scope="module")
def plain():
    """The same five updates in plain torch: all micro-batches in one process, clipping and AdamW by torch."""
    objective = worker.Objective()
    optimizer = torch.optim.AdamW(objective.parameters(), betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
    losses, norms = [], []
    for update in range(worker.NUM_UPDATES):
        batches = [worker.micro_batch(update, number) for number in range(worker.NUM_MICRO)]
        tokens = sum(len(batch[0]) for batch in batches)
        loss = sum(objective(batch).total for batch in batches) / tokens
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(objective.parameters(), 0.5)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + update)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    weights = {name: tensor.flatten().tolist() for name, tensor in objective.trained.named_parameters()}
    return {"losses": losses, "norms": norms, "weights": weights}


def agree(one, other, rel):
    assert one["losses"] == pytest.approx(other["losses"], rel=rel)
    assert one["norms"] == pytest.approx(other["norms"], rel=rel)
    for name, values in other["weights"].items():
        assert one["weights"][name] == pytest.approx(values, rel=rel, abs=rel)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_process_equals_plain_torch(plain, stage):
    agree(worker.main(stage, "fp32"), plain, 2e-6)


def test_one_process_in_bf16_is_near(plain):
    agree(worker.main(1, "bf16"), plain, 3e-2)


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))])
def test_two_ranks_equal_plain_torch(plain, stage):
    agree(launch(2, stage, "fp32"), plain, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_in_bf16_are_near(plain, stage):
    agree(launch(2, stage, "bf16"), plain, 3e-2)
