"""What is told at the end: who failed first, when and why, what became of the others, and what to do next."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine_fast.distributed.launch.attempt import ASKED, Attempt, Spec, write_json
from engine_fast.distributed.launch.supervise import Outcome, read_log

_LOG_LINES = 12
_SHOWN_RANKS = 8
_ADVICE = {
    "mistake": "Mend what the message names, then start the same command again.",
    "exception": "If it is not your data or disk, report it with the log; the same command continues.",
    "signal": "An unexpected SIGKILL is mostly the out-of-memory killer's (see dmesg); the same command continues.",
    "exit": "The log should say why; the same command continues.",
    "silent": "Something ended the process early; the same command continues.",
    "stopped": "Nothing was lost; the same command continues.",
    "hung": "The log holds the tracebacks of every thread. If that step may take so long, raise --hang-seconds.",
    "lost": "Look at that host and its network; the same command continues, with --elastic without it.",
    "never started": "Look at what the transport said, below; try the command of --dry-run by hand.",
    "transport": "The ranks have saved what they could; the same command continues.",
    "ended": "The same command continues.",
}


def describe(outcome: Outcome, attempt: Attempt, spec: Spec) -> str:
    """At most one screen."""
    took = _duration(outcome.seconds)
    if outcome.code == 0:
        return f"done: all {spec.world_size} ranks finished after {took}"
    lines = [_headline(outcome, spec, took)]
    trouble = outcome.trouble
    rank = trouble.rank if trouble is not None else None
    if outcome.code != 130 and rank is not None:
        seen = outcome.watch.ranks[rank]
        what = seen.end.what if seen.end is not None and seen.end.what else seen.what
        if what:
            lines.append(f"  last it did: {what}")
        if seen.end is not None:
            clock = time.strftime("%H:%M:%S", time.localtime(seen.end.when))
            lines.append(
                f"  when: {clock}, {seen.end.when - spec.started:.0f} s after the start; exit code {seen.end.code}"
            )
    others = _others(outcome, spec, rank)
    if others:
        lines.append(f"  the others: {others}")
    lines += [f"  {host}: clean-up failed: {complaint}" for host, complaint in outcome.unreaped.items()]
    if outcome.code != 130:
        lines += _log(outcome, attempt, rank)
        if trouble is not None:
            lines.append(f"  next: {_ADVICE.get(trouble.kind, _ADVICE['ended'])}")
    lines.append(f"  logs of every rank: {attempt.directory}")
    return "\n".join(lines)


def record(outcome: Outcome, spec: Spec) -> dict[str, Any]:
    """The same for summary.json."""
    trouble = outcome.trouble
    ranks = []
    for rank, seen in outcome.watch.ranks.items():
        end = seen.end
        ranks.append(
            {
                "rank": rank, "host": spec.place(rank)[0].name, "started": seen.record is not None,
                "code": end.code if end is not None else None, "kind": end.kind if end is not None else None,
                "error": end.error if end is not None else "", "what": (end and end.what) or seen.what,
            }
        )  # fmt: skip
    first = None
    if trouble is not None:
        host = spec.place(trouble.rank)[0].name if trouble.rank is not None else None
        first = {"rank": trouble.rank, "host": host, "kind": trouble.kind, "why": trouble.why}
    return {
        "attempt": spec.number, "code": outcome.code, "started": spec.started, "seconds": round(outcome.seconds, 1),
        "world_size": spec.world_size, "hosts": {host.name: host.slots for host in spec.hosts},
        "master": f"{spec.master_addr}:{spec.master_port}", "first_failure": first, "ranks": ranks,
        "clean_up_failed": dict(outcome.unreaped),
    }  # fmt: skip


def write(root: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """OUT/launch/summary.json: the last attempt in full, and all of this launch."""
    try:
        write_json(root / "summary.json", {**history[-1], "attempts": list(history)})
    except OSError:
        pass  # it has been printed


def _headline(outcome: Outcome, spec: Spec, took: str) -> str:
    trouble = outcome.trouble
    if outcome.code == 130:
        ends = [seen.end for seen in outcome.watch.ranks.values()]
        saved = sum(end is not None and end.code in (0, 130) for end in ends)
        kept = "all ranks have saved" if saved == len(ends) else f"{saved} of {len(ends)} ranks saved by themselves"
        by = "" if trouble is None else f" by a signal to rank {trouble.rank}"
        if trouble is not None and trouble.why.startswith(ASKED):
            by = f", {trouble.why.partition('. ')[0]},"
        return f"interrupted{by} after {took}: {kept}. The same command continues."
    if trouble is None:
        return f"failed after {took}"
    if trouble.rank is None:
        return f"failed after {took}: {trouble.why}"
    host = spec.place(trouble.rank)[0].name
    why = trouble.why.strip().splitlines() or [trouble.kind]
    return f"failed after {took}: rank {trouble.rank} on {host} was the first ({trouble.kind}): " + "\n    ".join(
        why[:6]
    )


def _others(outcome: Outcome, spec: Spec, rank: int | None) -> str:
    kinds: Counter[str] = Counter()
    named = []
    for other, seen in outcome.watch.ranks.items():
        if other == rank:
            continue
        kind = seen.end.kind if seen.end is not None else "no marker" if seen.record is not None else "not started"
        code = f" {seen.end.code}" if seen.end is not None else ""
        kinds[kind] += 1
        named.append(f"{other} {kind}{code}")
    if len(named) <= _SHOWN_RANKS:
        return ", ".join(named)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def _log(outcome: Outcome, attempt: Attempt, rank: int | None) -> list[str]:
    path = outcome.transport_log
    if rank is not None:
        there = attempt.runner_log(outcome.watch.spec.place(rank)[0].name)  # in nodes mode
        started = outcome.watch.ranks[rank].record is not None
        path = attempt.rank_path(rank, "log") if started else there if there.exists() else path
    text = read_log(path)
    tail = [line.rstrip()[:200] for line in text.splitlines() if line.strip()][-_LOG_LINES:]
    return [f"  end of {path}:", *(f"    | {line}" for line in tail)] if tail else [f"  {path} is empty"]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
