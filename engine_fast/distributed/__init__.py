"""Processes, the DeepSpeed engine and checkpoints. The only layer that knows DeepSpeed."""

from engine_fast.distributed.checkpoint import CheckpointStore, Snapshot
from engine_fast.distributed.engine import Engine, StepResult
from engine_fast.distributed.runtime import World, start

__all__ = ["CheckpointStore", "Engine", "Snapshot", "StepResult", "World", "start"]
