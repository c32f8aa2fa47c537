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
from engine_fast.errors import ConfigError

_SILENCE = 4.0
_BEATS_SECONDS = 3.5
"""In so long a launcher that lives has beaten three times."""
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


def left_behind(root: Path, given_up: threading.Event) -> tuple[Attempt, Spec] | None:
    """The last attempt, if something of it may still run: its launcher was killed, or could not clean up.

    Raises ConfigError if that launcher lives, which a lock need not tell: some file systems have none between hosts.
    """
    older = attempts(root)
    if not older:
        return None
    attempt, closed = older[-1], older[-1].closed()
    if closed is not None and not closed["restart"] and closed["clean"]:
        return None
    _refuse_if_alive(attempt, given_up)
    try:
        spec = attempt.spec()
    except (OSError, ValueError, TypeError):
        return None  # it came no further than making the directory
    untouched = (read_json(attempt.beat_path) or {}).get("stop") is None  # guards may be about to start
    watch = Watch(attempt, spec, Limits(hang=spec.grace_seconds), time.monotonic())
    watch.look(time.monotonic())
    running = any(watch.ranks[rank].record is not None for rank in watch.unended())
    return (attempt, spec) if untouched or running else None


def _refuse_if_alive(attempt: Attempt, given_up: threading.Event) -> None:
    before, limit = read_json(attempt.beat_path), time.monotonic() + _BEATS_SECONDS
    while before is not None and time.monotonic() < limit and not given_up.wait(_POLL):
        now = read_json(attempt.beat_path)
        if now is not None and now["count"] != before["count"]:
            raise ConfigError(
                f"{attempt.directory.parent}: another `engine-fast launch` works here, perhaps on another host "
                f"({attempt.beat_path.name} of {attempt.directory.name} moves). Wait for it, or choose another --out."
            )


def take_over(attempt: Attempt, spec: Spec, ask: Ask | None, say: Say, given_up: threading.Event) -> None:
    """In the place of a killed launcher: let the ranks save, then end them all."""
    closed = attempt.closed()
    how = "left by a launcher that was killed" if closed is None or closed["restart"] else "not cleaned up everywhere"
    say(f"attempt {spec.number} was {how}; ending what runs of it")
    watch = Watch(attempt, spec, Limits(hang=spec.grace_seconds), time.monotonic())
    limit = time.monotonic() + spec.grace_seconds + _SILENCE
    count = 0
    while time.monotonic() < limit and not given_up.is_set():
        count -= 1  # its own launcher counted upwards
        attempt.order(count, {"action": "save", "why": "another launcher takes over"})
        now = time.monotonic()
        watch.look(now)
        silence = max(_SILENCE, 3 * spec.beat_seconds)
        if all(now - watch.ranks[rank].alive_at > silence for rank in watch.unended()):
            break
        time.sleep(_POLL)
    quit_ = {"action": "quit", "why": "another launcher has taken over"}
    attempt.order(count - 1, quit_)
    complaints = reap_hosts(attempt, spec, hosts_of(watch), ask)
    for host, complaint in complaints.items():
        say(f"{host}: {complaint}")
    closed = {"code": 2, "restart": False, "delay": 0.0, "why": quit_["why"], "clean": not complaints}
    attempt.order(count - 2, quit_, closed)
    for known in spec.hosts:
        attempt.forget(known.name)


def hosts_of(watch: Watch) -> list[str]:
    """Where ranks have not ended."""
    return list(dict.fromkeys(watch.spec.place(rank)[0].name for rank in watch.unended()))
