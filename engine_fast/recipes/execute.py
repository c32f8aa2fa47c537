"""Run a graph of stages: rank 0 decides and keeps the records, the other ranks follow."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from engine_fast.data.atomic import is_held
from engine_fast.distributed import World
from engine_fast.distributed.presence import beat, patient
from engine_fast.errors import CheckpointError, EngineFastError, PeerError
from engine_fast.evaluation.files import write_json
from engine_fast.recipes.graph import (
    Plan,
    Stage,
    StageClock,
    begin,
    check_order,
    finish,
    plan_stage,
    read_json,
    read_record,
    take_back,
)

Say = Callable[[str], None]

_FAILURE = "failure.json"
_POLL_SECONDS = (0.1, 5.0)
_CHECK_SECONDS = 10.0


def run_graph(
    stages: Sequence[Stage],
    out: Path,
    *,
    world: World,
    say: Say,
    redo: Sequence[str] = (),
    only: Sequence[str] | None = None,
    known: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Run each stage that is not done. Rank 0 decides; the others follow.

    known: hashes of the outputs of stages that are done and no part of `stages`.
    Returns these and those of `stages`; on rank 0, the others have no use for them.
    """
    hashes = dict(known or {})
    check_order(stages, hashes)
    for stage in stages:
        directory = stage.place(out)
        plan = world.on_main(partial(_decide, stage, directory, hashes, redo, only, say))
        if plan.state == "done":
            _tell(world, say, f"{stage.name}: done before, inputs unchanged")
        else:
            if only is not None and stage.name not in only:
                raise CheckpointError(
                    f"{directory}: stage {stage.name} is not done for this configuration"
                    + (f" ({plan.reason})" if plan.reason else "")
                    + ". Bring the run to its end with `engine-fast run` first."
                )
            attempt = world.on_main(partial(_begin, stage, directory, plan, hashes, say))
            if world.is_main:
                _lead(stage, directory, plan, attempt, say, followed=world.size > 1)
            else:
                _follow(stage, directory, plan, attempt)
            world.barrier()
        if world.is_main:
            hashes[stage.name] = _record(directory)["outputs_hash"]
    return hashes


def _decide(
    stage: Stage,
    directory: Path,
    hashes: dict[str, str],
    redo: Sequence[str],
    only: Sequence[str] | None,
    say: Say,
) -> Plan:
    plan = plan_stage(stage, directory, hashes)
    if plan.state == "changed" and stage.name not in redo and (only is None or stage.name in only):
        old = take_back(stage, directory, hashes)
        if old is not None:
            say(f"{stage.name}: the files in {old.name} were made from these inputs, and are taken back")
            plan = plan_stage(stage, directory, hashes)
    if plan.state == "done" and stage.name in redo:
        return Plan("changed", plan.key, "asked to run again")
    return plan


def _begin(stage: Stage, directory: Path, plan: Plan, hashes: dict[str, str], say: Say) -> str:
    """Returns a name for this attempt, so that the failure of an earlier one is not taken for its own."""
    moved = begin(stage, directory, plan, hashes)
    (directory / _FAILURE).unlink(missing_ok=True)
    say(_announcement(stage, plan, moved))
    return uuid.uuid4().hex


def _lead(stage: Stage, directory: Path, plan: Plan, attempt: str, say: Say, *, followed: bool) -> None:
    """Rank 0's part: run the stage and write its record, or say why not."""
    clock = StageClock(directory)
    try:
        try:
            if stage.every_rank:
                beat(f"stage {stage.name}")
                stage.run(directory)
            else:
                with patient(f"stage {stage.name}"):
                    stage.run(directory)
        finally:
            seconds = clock.stop()
        finish(stage, directory, plan, seconds)
    except BaseException as error:
        if followed:
            told = str(error) if isinstance(error, EngineFastError) else f"{type(error).__name__}: {error}"
            failure = {"attempt": attempt, "error": told, "interrupted": isinstance(error, KeyboardInterrupt)}
            with suppress(OSError):  # a full disk, say; the followers then notice that this process is gone
                write_json(directory / _FAILURE, failure)
        raise
    say(f"{stage.name}: finished after {_duration(seconds)}")


def _follow(stage: Stage, directory: Path, plan: Plan, attempt: str) -> None:
    """Another rank's part: its share of the stage, then wait until rank 0 has written the record.

    On the file system, because a collective would time out in a long stage.
    Raises PeerError: rank 0 failed, or is gone. KeyboardInterrupt: it was interrupted.
    """
    # right after a collective rank 0 lives, so a lock that is not seen now will say nothing later
    watched = is_held(directory.parent)
    if stage.every_rank:
        beat(f"stage {stage.name}")
        stage.run(directory)
    with patient(f"waiting for rank 0 in stage {stage.name}"):
        _await_record(stage, directory, plan, attempt, watched=watched)


def _await_record(stage: Stage, directory: Path, plan: Plan, attempt: str, *, watched: bool) -> None:
    start = checked = time.monotonic()
    while True:
        gone = False
        if watched and time.monotonic() - checked > _CHECK_SECONDS:
            gone, checked = not is_held(directory.parent), time.monotonic()
        if (read_record(directory) or {}).get("key") == plan.key:
            return
        failure = read_json(directory / _FAILURE) or {}
        if failure.get("attempt") == attempt:
            kind = KeyboardInterrupt if failure["interrupted"] else PeerError
            raise kind(f"stage {stage.name} ended on rank 0: {failure['error']}")
        if gone:
            raise PeerError(
                f"stage {stage.name}: rank 0 is gone without a word, as after kill -9. The same command continues."
            )
        # hundreds of ranks may ask one file server: seldom in a long stage, often in a short one
        time.sleep(min(max((time.monotonic() - start) / 20, _POLL_SECONDS[0]), _POLL_SECONDS[1]))


def _record(directory: Path) -> dict[str, Any]:
    record = read_record(directory)
    assert record is not None, f"{directory} is not finished"
    return record


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
