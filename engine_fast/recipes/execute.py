"""Run a graph of stages: rank 0 decides and keeps the records, the other ranks follow."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine_fast.distributed import World
from engine_fast.distributed.presence import beat, patient
from engine_fast.errors import CheckpointError, EngineFastError
from engine_fast.evaluation.files import write_atomic
from engine_fast.recipes.graph import Plan, Stage, StageClock, begin, check_order, finish, plan_stage, read_record

Say = Callable[[str], None]

_POLL_SECONDS = 0.5


def run_graph(
    stages: Sequence[Stage],
    out: Path,
    *,
    world: World,
    say: Say,
    redo: Sequence[str] = (),
    only: Sequence[str] | None = None,
) -> None:
    """Run each stage that is not done. Rank 0 decides; the others follow."""
    check_order(stages)
    hashes: dict[str, str] = {}
    for stage in stages:
        directory = out / stage.name
        plan = world.broadcast(_decide(stage, directory, hashes, redo) if world.is_main else None)
        assert plan is not None
        if plan.state == "done":
            _tell(world, say, f"{stage.name}: done before, inputs unchanged")
        else:
            if only is not None and stage.name not in only:
                raise CheckpointError(
                    f"{directory}: stage {stage.name} is not done for this configuration"
                    + (f" ({plan.reason})" if plan.reason else "")
                    + ". Bring the run to its end with `engine-fast run` first."
                )
            _run_stage(stage, directory, plan, hashes, world, say)
        hashes[stage.name] = _record(directory)["outputs_hash"]


def _decide(stage: Stage, directory: Path, hashes: dict[str, str], redo: Sequence[str]) -> Plan:
    plan = plan_stage(stage, directory, hashes)
    if plan.state == "done" and stage.name in redo:
        return Plan("changed", plan.key, "asked to run again")
    return plan


def _run_stage(stage: Stage, directory: Path, plan: Plan, hashes: dict[str, str], world: World, say: Say) -> None:
    failure = directory / "failure.txt"
    if world.is_main:
        moved = begin(stage, directory, plan, hashes)
        failure.unlink(missing_ok=True)
        _tell(world, say, _announcement(stage, plan, moved))
    world.barrier()
    clock = StageClock(directory) if world.is_main else None
    try:
        if stage.every_rank:
            beat(f"stage {stage.name}")
            stage.run(directory)
        elif world.is_main:
            with patient(f"stage {stage.name}"):
                stage.run(directory)
        else:
            with patient(f"waiting for rank 0 in stage {stage.name}"):
                _wait(directory, failure, plan)
    except EngineFastError as error:
        if world.is_main and world.size > 1:
            write_atomic(failure, str(error))
        raise
    finally:
        seconds = clock.stop() if clock is not None else 0.0
    if world.is_main:
        finish(stage, directory, plan, seconds)
        _tell(world, say, f"{stage.name}: finished after {_duration(seconds)}")
    world.barrier()


def _record(directory: Path) -> dict[str, Any]:
    record = read_record(directory)
    assert record is not None, f"{directory} is not finished"
    return record


def _wait(directory: Path, failure: Path, plan: Plan) -> None:
    """Until rank 0 has finished the stage. On the file system, because a collective would time out in a long stage."""
    while (read_record(directory) or {}).get("key") != plan.key:
        if failure.exists():
            raise EngineFastError(f"stage {directory.name} failed on rank 0: {failure.read_text(encoding='utf-8')}")
        time.sleep(_POLL_SECONDS)


def _announcement(stage: Stage, plan: Plan, moved: Path | None) -> str:
    if plan.state == "resumed":
        return f"{stage.name}: was interrupted, continuing"
    if moved is not None:
        return f"{stage.name}: running again because {plan.reason}; the old files are in {moved.name}"
    return f"{stage.name}: starting"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _tell(world: World, say: Say, line: str) -> None:
    if world.is_main:
        say(line)
