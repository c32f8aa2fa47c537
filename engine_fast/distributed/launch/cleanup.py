"""End what is left of an attempt, on every host that can be reached, in the end or before the next launch."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine_fast.distributed.launch import probe
from engine_fast.distributed.launch.attempt import Attempt, Spec, attempts, read_json
from engine_fast.distributed.launch.commands import helper
from engine_fast.distributed.launch.preflight import Ask
from engine_fast.distributed.launch.reap import reap
from engine_fast.distributed.launch.supervise import Say
from engine_fast.distributed.launch.watch import Limits, Watch

_SILENCE = 4.0
_POLL = 0.25


def reap_hosts(attempt: Attempt, spec: Spec, hosts: Sequence[str], ask: Ask | None) -> dict[str, str]:
    """Host -> complaint, for those where it could not be done; all at once. ask=None: they are all this host."""

    def one(host: str) -> str:
        if ask is None:
            found, reason = reap(attempt, host), ""
        else:
            code, said, complaint = ask(host, helper(spec.python, "reap", attempt.token, probe.pack({"host": host})))
            answer = probe.find_answer(said)
            found, reason = answer or {}, (complaint.strip().splitlines() or [f"exit code {code}"])[-1][:200]
        if not found:
            late = f"what is left there ends by itself within {spec.lost_seconds + spec.grace_seconds:g} s"
            return f"{reason}; {late}"
        return f"processes {found['left']} do not end" if found["left"] else ""

    if not hosts:
        return {}
    with ThreadPoolExecutor(64) as pool:
        complaints = dict(zip(hosts, pool.map(one, hosts), strict=True))
    return {host: complaint for host, complaint in complaints.items() if complaint}


def left_behind(root: Path) -> tuple[Attempt, Spec] | None:
    """The last attempt, if its launcher was killed before it could end it."""
    older = attempts(root)
    if not older or (read_json(older[-1].beat_path) or {}).get("stop") is not None:
        return None
    try:
        return older[-1], older[-1].spec()
    except (OSError, ValueError, TypeError):
        return None  # it came no further than making the directory


def take_over(attempt: Attempt, spec: Spec, ask: Ask | None, say: Say, given_up: threading.Event) -> None:
    """In the place of a killed launcher: let the ranks save, then end them all."""
    say(f"attempt {spec.number} was left by a launcher that was killed; ending what runs of it")
    watch = Watch(attempt, spec, Limits(hang=spec.grace_seconds), time.monotonic())
    limit = time.monotonic() + spec.grace_seconds + _SILENCE
    count = 0
    while time.monotonic() < limit and not given_up.is_set():
        count -= 1  # its own launcher counted upwards
        attempt.order(count, {"action": "save", "why": "another launcher takes over"})
        now = time.monotonic()
        watch.look(now)
        if all(now - watch.ranks[rank].alive_at > _SILENCE for rank in watch.unended()):
            break
        time.sleep(_POLL)
    attempt.order(count - 1, {"action": "quit", "why": "another launcher has taken over"})
    for host, complaint in reap_hosts(attempt, spec, hosts_of(watch), ask).items():
        say(f"{host}: {complaint}")


def hosts_of(watch: Watch) -> list[str]:
    """Where ranks have not ended."""
    return list(dict.fromkeys(watch.spec.place(rank)[0].name for rank in watch.unended()))
