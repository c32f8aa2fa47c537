"""Processes, the DeepSpeed engine and checkpoints. The only layer that knows DeepSpeed.

Names are loaded when first asked for: the launcher, which lives below, must start fast and must not touch a GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine_fast.distributed.agreement import require_agreement
    from engine_fast.distributed.checkpoint import CheckpointStore, Snapshot
    from engine_fast.distributed.engine import Engine, StepResult
    from engine_fast.distributed.runtime import World, start
    from engine_fast.distributed.teacher import shard_frozen

__all__ = ["CheckpointStore", "Engine", "Snapshot", "StepResult", "World", "require_agreement", "shard_frozen", "start"]

_HOMES = {
    "CheckpointStore": "checkpoint",
    "Snapshot": "checkpoint",
    "Engine": "engine",
    "StepResult": "engine",
    "World": "runtime",
    "start": "runtime",
    "require_agreement": "agreement",
    "shard_frozen": "teacher",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
