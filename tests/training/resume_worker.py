"""Also started by torchrun: part of a tiny stage, hashes of the state that it loads and saves, and its sentences."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed import utils
from torch import Tensor, distributed

from engine_fast.config import RunConfig, load_config
from engine_fast.data.prepared import Prepared
from engine_fast.distributed.engine import Engine
from engine_fast.distributed.master import MasterState
from engine_fast.distributed.runtime import leave
from engine_fast.errors import CheckpointError
from engine_fast.training import Interrupted, loop, train_teacher
from engine_fast.training.checkpoints import Checkpoints


def state_of(engine: Engine) -> dict[str, str]:
    """Hashes of every parameter's whole master weight and moments, and Adam's step."""
    master = MasterState(engine._engine, engine.stage)
    master.begin()  # DeepSpeed's own loading leaves it to the next step to find the moments
    hashes = {}
    for name, parameter in master.parameters():
        if engine.stage:
            moments = [utils.safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")]
            tensors: list[Tensor] = [utils.safe_get_full_fp32_param(parameter), *moments]
        else:
            tensors = [parameter.data, *(master._base.state[parameter][key] for key in ("exp_avg", "exp_avg_sq"))]
        hashes[name] = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()
    hashes["step"] = repr(next(float(master._base.state[weights]["step"]) for weights in master.flat()))
    return hashes


def average_of(checkpoints: Checkpoints) -> str:
    weights = checkpoints.weights()
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in weights.values())).hexdigest()


def main(config: RunConfig, data: Path, directory: Path, stop: int) -> dict[str, Any]:
    """Train until update `stop` has been done and saved, or to the end."""
    seen: dict[str, Any] = {"sentences": [], "loaded": None, "saved": None}
    load, save, update = Checkpoints._load, Checkpoints.save, loop.Trainer._update

    def loading(self: Any, snapshot: Any) -> None:
        load(self, snapshot)
        seen["loaded"] = {**state_of(self._engine), "average": average_of(self)}

    def saving(self: Any, *arguments: Any, **options: Any) -> None:
        save(self, *arguments, **options)
        seen["saved"] = {**state_of(self._engine), "average": average_of(self)}

    def updating(self: Any) -> None:
        if self.progress.update == stop:
            self._stop.request(15, None)
            self._interrupt()
        self._feeder.prefetch()
        mine = [sorted(batch.indices.tolist()) for batch, weight in self._feeder._ahead.batches if weight]
        everyone = [batch for part in self._world.gather(mine) for batch in part]
        seen["sentences"].append([self.progress.epoch, sorted(everyone)])
        update(self)

    Checkpoints._load, Checkpoints.save, loop.Trainer._update = loading, saving, updating
    try:
        train_teacher(config, Prepared.open(data), directory)
    except Interrupted:
        pass
    finally:
        Checkpoints._load, Checkpoints.save, loop.Trainer._update = load, save, update
    return seen


def fill_disk(rank: int) -> None:
    """Let every file that DeepSpeed writes on this rank fail."""
    real = torch.save

    def save(*arguments: Any, **options: Any) -> None:
        if distributed.get_rank() == rank:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments, **options)

    torch.save = save


if __name__ == "__main__":
    if "FULL_DISK_ON_RANK" in os.environ:
        fill_disk(int(os.environ["FULL_DISK_ON_RANK"]))
    try:
        result = main(load_config(Path(sys.argv[1]), []), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    except CheckpointError as error:
        result = {"error": str(error)}
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, result)
    if distributed.get_rank() == 0:
        print("RESULT " + json.dumps(everyone[-1]))
    leave(0)
