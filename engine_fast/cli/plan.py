"""The plan that `engine-fast doctor --plan` shows: memory of each rank before any of it is paid for."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engine_fast.config import ROUNDING_ONLY, RunConfig, load_config
from engine_fast.errors import ConfigError
from engine_fast.training.plan import STAGES, MemoryPlan, Stage, plan_memory
from engine_fast.training.plan.advice import Change, fitting_changes
from engine_fast.training.plan.memory import MEANING, Device

GB = 10**9
COMPARED = (8, 64, 512)


def show_plan(
    path: Path,
    overrides: list[str],
    *,
    ranks: str,
    stage: Stage | None,
    device: Device,
    device_memory: float | None,
    as_json: bool,
) -> bool:
    """Print the plan of the trained stages; False if device_memory (GB) does not suffice for one of them."""
    run, numbers = load_config(path, overrides), parse_ranks(ranks)
    if device_memory is not None and device_memory <= 0:
        raise ConfigError(f"--device-memory {device_memory}, expected gigabytes, for example 80.")
    compared = numbers if len(numbers) > 1 else sorted({*numbers, *COMPARED})
    report = [_stage(run, each, numbers[0], compared, device, device_memory) for each in ([stage] if stage else STAGES)]
    if as_json:
        print(
            json.dumps({"config": str(path), "device": device, "stages": [_plain(entry) for entry in report]}, indent=2)
        )
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = max(console.width, 140)  # a log file has no width; do not wrap the table
        for entry in report:
            _print(console, entry, device, device_memory)
    return all(entry["fits"] is not False for entry in report)


def parse_ranks(text: str) -> list[int]:
    """ "8" or "8,64,512". Raises ConfigError."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--ranks {text!r}, expected a number of ranks, or several with commas, for example 8,64.")
    return numbers


def _stage(
    run: RunConfig, stage: Stage, ranks: int, compared: list[int], device: Device, device_memory: float | None
) -> dict[str, Any]:
    plan = plan_memory(run, stage, ranks=ranks, device=device)
    limit = None if device_memory is None else round(device_memory * GB)
    entry: dict[str, Any] = {
        "plan": plan,
        "scaling": [plan_memory(run, stage, ranks=number, device=device) for number in compared],
        "settings": getattr(run, stage),
        "fits": None if limit is None else plan.total <= limit,
        "changes": [],
        "changes_suffice": None,
    }
    if limit is not None and plan.total > limit:
        entry["changes"], entry["changes_suffice"] = fitting_changes(
            run, stage, ranks=ranks, limit=limit, device=device
        )
    return entry


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    def plain(plan: MemoryPlan) -> dict[str, Any]:
        return asdict(plan) | {"total": plan.total, "host_total": plan.host_total, "dominant": plan.dominant}

    return {
        **plain(entry["plan"]),
        "scaling": [plain(plan) for plan in entry["scaling"]],
        "fits": entry["fits"],
        "changes": [{"set": dict(change), "total": plan.total} for change, plan in entry["changes"]],
        "changes_suffice": entry["changes_suffice"],
    }


def _print(console: Console, entry: dict[str, Any], device: Device, device_memory: float | None) -> None:
    plan, settings = entry["plan"], entry["settings"]
    shape, host = plan.shape, plan.host_total > 0
    console.print(
        f"[bold]{plan.stage}[/bold]: {plan.parameters / 1e6:.1f} M parameters, {settings.precision}, ZeRO "
        f"{settings.effective_zero_stage}, {plan.ranks} ranks; the largest micro-batch has {shape.sentences} sentences "
        f"of {shape.source} and {shape.target} tokens"
    )
    table = Table("on each rank", *(["device GB", "host GB"] if host else ["GB"]), "what")
    for term, size in plan.device.items():
        column = [f"{size / GB:.3f}", *([f"{plan.host[term] / GB:.3f}"] if host else [])]
        table.add_row(term, *column, MEANING[term])
    total = [f"{plan.total / GB:.3f}", *([f"{plan.host_total / GB:.3f}"] if host else [])]
    table.add_section()
    table.add_row("total", *total, f"at its largest: {plan.moment}")
    console.print(table)
    share = plan.device[plan.dominant] / plan.total
    console.print(f"Most is {plan.dominant}: {share:.0%}. {_scaling(entry['scaling'])}")
    if device == "cuda":
        console.print("A GPU holds besides: CUDA's context, NCCL's buffers, fragments. Leave about 2 GB.")
    if device_memory is not None:
        console.print(_verdict(entry, device_memory))
    console.print()


def _scaling(plans: list[MemoryPlan]) -> str:
    parts = ", ".join(f"{plan.ranks} ranks {plan.total / GB:.3f} GB" for plan in plans)
    first, last = plans[0], plans[-1]
    changed = [term for term in first.device if first.device[term] != last.device[term]]
    if not changed:
        return f"{parts}: the number of ranks changes nothing."
    moved = ", ".join(f"{t} {(last.device[t] - first.device[t]) / GB:+.3f}" for t in changed)
    return f"{parts}. From {first.ranks} to {last.ranks}: {moved} GB."


def _verdict(entry: dict[str, Any], device_memory: float) -> str:
    if entry["fits"]:
        return f"It fits into {device_memory:g} GB."
    lines = [f"It does not fit into {device_memory:g} GB."]
    if entry["changes_suffice"]:
        alone = len(entry["changes"]) > 1
        lines[0] += " Each of these alone would make it fit:" if alone else " This would make it fit:"
    else:
        lines[0] += " Nothing that is tried suffices; the best is:"
    lines += [f"  {plan.total / GB:9.3f} GB  {_flags(change)}" for change, plan in entry["changes"]]
    again = sorted({key for change, _ in entry["changes"] for key, _ in change if not _goes_on(key)})
    if again:
        lines.append(f"A stage that has begun starts again with another {', '.join(again)}; with the rest it goes on.")
    return "\n".join(lines)


def _goes_on(key: str) -> bool:
    """Whether a stage that has begun continues when this setting changes."""
    return key.startswith("deepspeed.zero_optimization.") or bool(ROUNDING_ONLY & set(key.split(".")))


def _flags(change: Change) -> str:
    return " ".join(f"--set {key}={str(value).lower()}" for key, value in change)
