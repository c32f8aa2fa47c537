"""Which settings would make a stage fit a device: found by planning with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine_fast.config import RunConfig, parse_config
from engine_fast.errors import ConfigError
from engine_fast.training.plan.memory import Device, MemoryPlan, Stage, plan_memory

Change = tuple[tuple[str, Any], ...]
"""Settings that go together: (key, value), ..."""


def fitting_changes(
    run: RunConfig, stage: Stage, *, ranks: int, limit: int, device: Device = "cuda"
) -> tuple[list[tuple[Change, MemoryPlan]], bool]:
    """Changes after which `stage` takes at most `limit` bytes of the device, with the plan that each gives; cheapest
    first.

    Those that do alone. If none does: one, of several changes taken together in the same order until it fits. Then
    (that, False), if all of them do not suffice. Changes that the configuration refuses are left out.
    """
    alone = []
    for change in changes(run, stage):
        changed = applied(run, change)
        if changed is not None:
            plan = plan_memory(changed, stage, ranks=ranks, device=device)
            if plan.total <= limit:
                alone.append((change, plan))
    if alone:
        return alone, True
    together: Change = ()
    plan = plan_memory(run, stage, ranks=ranks, device=device)
    for change in changes(run, stage):
        tried = (*together, *change)
        changed = applied(run, tried)
        if changed is None:
            continue
        with_change = plan_memory(changed, stage, ranks=ranks, device=device)
        if with_change.total < plan.total:
            together, plan = tried, with_change
            if plan.total <= limit:
                break
    return [(together, plan)], plan.total <= limit


def changes(run: RunConfig, stage: Stage) -> Iterator[Change]:
    """What is worth a try, the cheaper in time and quality first."""
    settings = getattr(run, stage)
    now = settings.effective_zero_stage
    if stage == "engine":
        yield (("engine.teacher_precision", "bf16"),)
        yield (("engine.head_memory", "recompute"),)
        yield (("engine.teacher_checkpointing", True),)
    yield ((f"{stage}.activation_checkpointing", True),)
    yield ((f"{stage}.precision", "bf16"), *(((f"{stage}.zero_stage", 1),) if settings.zero_stage == 0 else ()))
    for zero_stage in range(now + 1, 4):
        yield ((f"{stage}.zero_stage", zero_stage),)
    batch = settings.batch
    name = "micro_batches" if batch.micro_batches else "accumulate"
    tokens, count = batch.max_tokens, batch.micro_batches or batch.accumulate
    while tokens > 1024:  # the update stays as large
        tokens, count = -(-tokens // 2), count * 2
        yield ((f"{stage}.batch.max_tokens", tokens), (f"{stage}.batch.{name}", count))
    least = (f"{stage}.zero_stage", max(now, 2))
    yield (least, (f"{stage}.offload.optimizer", True))
    if stage == "engine":
        yield (("engine.teacher_placement", "sharded"),)
    yield ((f"{stage}.zero_stage", 3), (f"{stage}.offload.optimizer", True), (f"{stage}.offload.parameters", True))


def applied(run: RunConfig, change: Change) -> RunConfig | None:
    """The configuration with those settings; None where it refuses them."""
    tree = run.model_dump(mode="json", exclude_unset=True)
    for key, value in change:
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    try:
        return parse_config(tree)
    except ConfigError:
        return None
