"""Starting without a launcher."""

import os
from datetime import timedelta

import deepspeed
import pytest
import torch
import torch.distributed as dist

from engine_fast.config import RuntimeConfig
from engine_fast.distributed import runtime, start
from engine_fast.distributed.runtime import World
from engine_fast.errors import CheckpointError, ConfigError


def test_one_process_needs_no_launcher_and_leaves_no_rank_behind():
    world = start(RuntimeConfig(device="cpu", threads=1))
    assert (world.rank, world.size, world.device.type) == (0, 1, "cpu")
    assert "RANK" not in os.environ
    assert start(RuntimeConfig(device="cpu", threads=1)) == world


def test_half_a_launcher_is_an_error(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="set RANK but not WORLD_SIZE"):
        start(RuntimeConfig(device="cpu"))


@pytest.mark.parametrize(("seconds", "given"), [(0, None), (7, timedelta(seconds=7))])
def test_waiting_for_other_ranks_has_a_limit(monkeypatch, seconds, given):
    asked = {}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **settings: asked.update(settings))
    runtime._join(torch.device("cpu"), seconds)
    assert asked.get("timeout") == given


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_must_exist():
    with pytest.raises(ConfigError, match="sees no GPU"):
        start(RuntimeConfig(device="cuda"))


def test_a_lone_world_answers_itself():
    world = World(0, 1, torch.device("cpu"))
    assert world.broadcast("x") == "x"
    assert world.gather(3) == [3]
    assert world.on_main(lambda: 5) == 5
    assert not world.any(False)

    def fail() -> None:
        raise CheckpointError("no")

    with pytest.raises(CheckpointError, match="no"):
        world.on_main(fail)
