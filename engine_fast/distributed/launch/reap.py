"""End what is left of an attempt's ranks on this host: `python -m engine_fast.distributed.launch.reap TOKEN QUESTION`.

By number and start time from the ranks' own records, and by the attempt's random mark in the environment of what they
started; never by name. A process that only has the number of a rank, or belongs to another attempt, is left alone.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from engine_fast.distributed.launch import processes
from engine_fast.distributed.launch.attempt import Attempt, read_json
from engine_fast.distributed.launch.probe import MARK, unpack
from engine_fast.distributed.launch.processes import Process
from engine_fast.distributed.launch.rank import mark_of

_PATIENCE = 2.0


def reap(attempt: Attempt, host: str) -> dict[str, Any]:
    """SIGCONT, SIGTERM, two seconds, SIGKILL for each rank that is left on the host, and for what came out of it.

    The ranks were asked to save before, through their guards. Returns {"found", "killed", "left"}.
    """
    spec = attempt.spec()
    records = [read_json(attempt.rank_path(rank, "json")) or {} for rank in spec.ranks_of(host)]
    ranks = [found for record in records if (found := _process(record)) is not None and found.is_alive()]
    below = processes.descendants(process.pid for process in ranks)
    killed = processes.end([*ranks, *below], patience=_PATIENCE)
    guards = [found for record in records if (found := _process(record.get("guard"))) is not None]
    parents = []
    if spec.launcher in ("torchrun", "pdsh"):  # MPI's and SLURM's own daemons are not ours to end
        parents = [found for record in records if (found := _process(record.get("parent"))) is not None]
    rest = [process for process in {*guards, *parents, *processes.carrying(*mark_of(spec, host))} if process.is_alive()]
    killed += processes.end(rest, patience=_PATIENCE)
    everything = [*ranks, *below, *rest]
    left = [process.pid for process in everything if process.is_alive()]
    return {"found": len(everything), "killed": sorted(process.pid for process in killed), "left": left}


def _process(record: Any) -> Process | None:
    if not isinstance(record, dict) or "pid" not in record:
        return None
    return Process(int(record["pid"]), int(record["start_ticks"]))


def main(argv: list[str]) -> None:
    found = reap(Attempt.of_token(argv[0]), unpack(argv[1])["host"])
    print(MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
