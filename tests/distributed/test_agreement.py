"""A rank that works on something else is named before its collectives pair with the others'."""

from pathlib import Path

import torch

from engine_fast.distributed import require_agreement
from engine_fast.distributed.runtime import World

from .test_ranks import launch


def test_a_lone_process_agrees_with_itself():
    require_agreement(World(0, 1, torch.device("cpu")), {"update": 1}, "engine")


def test_the_rank_that_differs_is_named_on_all():
    message = launch(3, worker=Path(__file__).with_name("agreement_worker.py"))
    assert message.startswith("engine, update 7: the ranks do not agree. rank 2 on ")
    assert "target tokens = 901, the others have 900." in message
