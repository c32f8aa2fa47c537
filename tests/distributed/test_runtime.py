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
from engine_fast.errors import CheckpointError, ConfigError, PeerError

from .threads import run_ranks


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


@pytest.mark.parametrize("error", [CheckpointError("no room"), OSError(28, "no room")])
def test_what_one_rank_raises_all_raise(error):
    def alone(world):
        with world.together():
            if world.rank == 1:
                raise error

    first, second, third = run_ranks(3, alone)
    assert second is error
    for other in (first, third):
        assert type(other) is PeerError
        assert "rank 1 failed" in str(other)
        assert "no room" in str(other)

    def both(world):
        with world.together():
            raise error
        return "never"

    assert run_ranks(2, both) == [error, error]


def test_what_rank_0_raises_all_raise():
    def refused():
        raise CheckpointError("no")

    def full():
        raise OSError(28, "full")

    first, second = run_ranks(2, lambda world: world.on_main(refused))
    assert type(first) is type(second) is CheckpointError
    first, second = run_ranks(2, lambda world: world.on_main(full))
    assert type(first) is OSError
    assert type(second) is PeerError
    assert "rank 0 failed" in str(second)
    assert "full" in str(second)


def test_together_returns_what_each_found():
    def body(world):
        with world.together():
            found = world.rank + 5
        return world.gather(found), world.on_main(lambda: found)

    assert run_ranks(2, body) == [([5, 6], 5)] * 2


def test_threads_are_divided_among_the_ranks_of_a_host_once(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        start(RuntimeConfig(device="cpu"))  # the group exists: whoever made it has divided before
        assert torch.get_num_threads() == 8
    finally:
        torch.set_num_threads(threads)
