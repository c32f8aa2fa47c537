"""Processes, the DeepSpeed engine and checkpoints. The only layer that knows DeepSpeed."""

from engine_fast.distributed.agreement import require_agreement
from engine_fast.distributed.checkpoint import CheckpointStore, Snapshot
from engine_fast.distributed.engine import Engine, StepResult
from engine_fast.distributed.runtime import World, start
from engine_fast.distributed.teacher import shard_frozen

__all__ = ["CheckpointStore", "Engine", "Snapshot", "StepResult", "World", "require_agreement", "shard_frozen", "start"]
