"""Do all ranks work on the same thing? One that does not is found before its collectives pair with other ones."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Mapping

import torch

from engine_fast.distributed.runtime import World
from engine_fast.errors import DistributedError


def require_agreement(world: World, facts: Mapping[str, str | int | float | None], what: str) -> None:
    """Raise the same DistributedError on every rank unless `facts` are equal on all: one reduction of two integers.

    Every rank calls it at the same place with the same names. The message names the ranks that differ from the
    majority, their hosts, and the first fact in which they differ.
    """
    if world.size == 1:
        return
    text = json.dumps(facts, sort_keys=True)
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
    extremes = world.all_reduce_max(torch.tensor([digest, -digest], device=world.device)).tolist()
    if extremes[0] == -extremes[1]:
        return
    everywhere = world.gather((socket.gethostname(), text))
    texts = [text for _, text in everywhere]
    usual = max(texts, key=texts.count)
    odd = [rank for rank, text in enumerate(texts) if text != usual]
    common, strange = json.loads(usual), json.loads(texts[odd[0]])
    name = next(name for name in [*common, *strange] if common.get(name) != strange.get(name))
    places = ", ".join(f"rank {rank} on {everywhere[rank][0]}" for rank in odd[:8])
    raise DistributedError(
        f"{what}: the ranks do not agree. {places}{' and others' if len(odd) > 8 else ''}: {name} = "
        f"{strange.get(name)!r}, the others have {common.get(name)!r}. Start all with one configuration, one version "
        "of engine-fast and one copy of the data; the last checkpoint is kept."
    )
