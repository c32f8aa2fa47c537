"""Run a recipe: every stage in order, on one process or on all that a launcher started."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from engine_fast.config import RunConfig, dump_config
from engine_fast.data.atomic import only_one
from engine_fast.distributed import start
from engine_fast.errors import require
from engine_fast.evaluation.files import write_atomic
from engine_fast.evaluation.results import read_results
from engine_fast.recipes.execute import Say, run_graph
from engine_fast.recipes.stages import build_stages
from engine_fast.recipes.tables import check_table, name_of, run_stage
from engine_fast.recipes.trials import run_sweep

_AGAIN = "Its trials are measured again by `engine-fast run` when evaluate.* changes."


def run(
    config: RunConfig, out: Path, *, say: Say = print, redo: Sequence[str] = (), only: Sequence[str] | None = None
) -> dict[str, Any] | None:
    """Bring every stage of `config` under `out` to its end and return results.json as a tree (None on the other ranks).

    A sweep brings every trial to its end, and its table; a run with `table` makes that besides its report.

    Args: say: gets one line for every decision. redo: stages to run again although their inputs are unchanged.
        only: stages that may run, besides the table; another one that is not done raises CheckpointError.
    Writes: out/config.yaml, one directory per stage, out/results.json, out/report.html (not of a sweep).
    Raises: what a stage raises; SweepError when trials failed; ConfigError when another process works in `out`.
        Starting again continues.
    """
    check_table(config)
    require(only is None or config.sweep is None, "sweep", "a sweep", "a single run here", _AGAIN)
    world, table = start(config.runtime), name_of(config)
    with ExitStack() as stack:
        with world.together():
            if world.is_main:
                stack.enter_context(only_one(out))  # while rank 0 lives: two runs never write into one directory
                if only is None:
                    write_atomic(out / "config.yaml", dump_config(config))
        if config.sweep is not None:
            run_sweep(config, out, world=world, say=say)
        else:
            stages = build_stages(config, out, world=world, say=say, trains=only is None)
            if table is not None:
                stages.append(run_stage(config, out))
                only = None if only is None else [*only, table]
            run_graph(stages, out, world=world, say=say, redo=redo, only=only)
        with world.together():
            if world.is_main:
                # with `only`, not before the graph has accepted it: a refused setting must not stay behind
                write_atomic(out / "config.yaml", dump_config(config))
                write_atomic(out / "results.json", (out / (table or "evaluate") / "results.json").read_bytes())
                if config.sweep is None:
                    write_atomic(out / "report.html", (out / "report" / "report.html").read_bytes())
    return read_results(out / "results.json") if world.is_main else None
