"""A run as stages: each is done once for given inputs, continued when half done, done anew when an input changed.

A stage owns one directory. `begun.json` says for which inputs its files were made; `stage.json`, written last and in
one step, says that they are all there. Both hold the stage's key:

    key = sha256(name, format version, settings, {upstream stage: hash of its outputs})

So kill -9 at any point leaves a stage that is either whole or marked as begun, and a changed input can never mix with
files made from the old one: the old directory is moved aside as `<stage>.stale-<n>`, and taken back with them.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine_fast import __version__
from engine_fast.data.atomic import sha256_of
from engine_fast.distributed.presence import beat
from engine_fast.errors import DataError
from engine_fast.evaluation.files import write_json

FORMAT = 1
"""Raise when a stage's files change in meaning: every stage of an older run then runs again."""

_MISSING = object()
_SMALL = 1 << 20
"""Bytes of an output that is read again whenever a run looks at it."""
_LONGEST_VALUE = 80
"""Characters of a setting that are shown."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of a run, as data."""

    name: str
    upstream: tuple[str, ...]
    """Stages whose outputs it reads."""
    settings: Mapping[str, Any]
    """Everything else that decides its result, as JSON."""
    outputs: tuple[str, ...]
    """Globs, relative to its directory, of the files that later stages read; each must match something."""
    run: Callable[[Path], None]
    """Fills the directory; called on a half-filled one, it continues."""
    every_rank: bool = False
    """Whether every rank calls run(), or rank 0 alone while the others wait. All wait until rank 0 is done."""
    directory: Path | None = None
    """Its directory; by default the one of its name in the run's."""

    def place(self, out: Path) -> Path:
        """Its directory in a run at `out`."""
        return out / self.name if self.directory is None else self.directory


State = Literal["done", "fresh", "resumed", "changed", "damaged"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to happen to one stage, and why."""

    state: State
    key: str
    reason: str = ""


def stage_key(stage: Stage, outputs: Mapping[str, str]) -> str:
    """The stage's key; `outputs` maps each upstream stage to the hash of its outputs."""
    return _digest(json.dumps([stage.name, _inputs(stage, outputs)], sort_keys=True).encode())


def plan_stage(stage: Stage, directory: Path, outputs: Mapping[str, str]) -> Plan:
    """Compare what the directory was made from with what is wanted now. Changes nothing."""
    key = stage_key(stage, outputs)
    begun, finished = read_json(directory / "begun.json"), read_json(directory / "stage.json")
    if begun is None:
        # hidden files are what a crash left of begun.json itself
        occupied = directory.exists() and any(not path.name.startswith(".") for path in directory.iterdir())
        return Plan("changed", key, "its directory holds files of unknown origin") if occupied else Plan("fresh", key)
    if begun.get("key") != key:
        return Plan("changed", key, _difference(begun.get("inputs", {}), _inputs(stage, outputs)))
    if finished is None or finished.get("key") != key:
        return Plan("resumed", key)
    name = _damaged(directory, finished)
    if name is not None:
        return Plan("damaged", key, f"{name} is missing or not what it was when the stage finished")
    return Plan("done", key)


def take_back(stage: Stage, directory: Path, outputs: Mapping[str, str]) -> Path | None:
    """Let the last directory that was begun for these inputs, and moved aside, change places with the present one, if
    it is whole or can be continued. Returns which it was."""
    key = stage_key(stage, outputs)
    found = []
    for path in directory.parent.glob(f"{directory.name}.stale-*"):
        begun = read_json(path / "begun.json") if path.is_dir() else None
        if begun is not None and begun.get("key") == key:
            found.append((float(begun.get("time", 0.0)), path))
    old = max(found)[1] if found else None
    if old is None or plan_stage(stage, old, outputs).state not in ("done", "resumed"):
        return None
    _move_aside(directory)
    old.rename(directory)
    return old


def begin(stage: Stage, directory: Path, plan: Plan, outputs: Mapping[str, str]) -> Path | None:
    """Make the directory ready for the stage to run. Returns where old files were moved, if any were."""
    moved = _move_aside(directory) if plan.state in ("changed", "damaged") else None
    directory.mkdir(parents=True, exist_ok=True)
    if plan.state != "resumed":
        begun = {"key": plan.key, "inputs": _inputs(stage, outputs), "time": time.time()}
        write_json(directory / "begun.json", begun)
    return moved


def _move_aside(directory: Path) -> Path:
    taken = (directory.with_name(f"{directory.name}.stale-{number}") for number in itertools.count(1))
    moved = next(path for path in taken if not path.exists())
    directory.rename(moved)
    return moved


def _damaged(directory: Path, finished: dict[str, Any]) -> str | None:
    """The first output that is not as it was; of large ones only the size is compared."""
    for name, entry in finished["outputs"].items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return str(name)
        try:
            if entry["bytes"] <= _SMALL and hash_file(path) != entry["sha256"]:
                return str(name)
        except DataError:  # it cannot be read, or another process has just moved it aside
            return str(name)
    return None


def finish(stage: Stage, directory: Path, plan: Plan, seconds: float) -> None:
    """Write stage.json: from now on the stage is done. `seconds` add up over interrupted attempts."""
    files = sorted({path for glob in stage.outputs for path in directory.glob(glob) if path.is_file()})
    empty = [glob for glob in stage.outputs if not any(path.is_file() for path in directory.glob(glob))]
    assert not empty, f"stage {stage.name} wrote nothing for {empty}"
    entries = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in files
    }
    content = "".join(f"{name} {entry['sha256']}\n" for name, entry in entries.items())
    write_json(
        directory / "stage.json",
        {
            "stage": stage.name,
            "key": plan.key,
            "outputs_hash": _digest(content.encode()),
            "outputs": entries,
            "seconds": round(seconds, 1),
            "engine_fast": __version__,
        },
    )


def read_record(directory: Path) -> dict[str, Any] | None:
    """What finish() wrote; None while the stage is not finished."""
    return read_json(directory / "stage.json")


def hash_file(path: Path) -> str:
    """sha256 of the file's bytes. Raises DataError when it cannot be read."""
    beat(f"hashing {path.name}")
    return sha256_of(path)


class StageClock:
    """Seconds spent in a stage over all its attempts, kept in `attempts.jsonl` of its directory."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "attempts.jsonl"
        self._start = time.monotonic()

    def stop(self) -> float:
        """Note this attempt (finished, failed or interrupted; kill -9 leaves none) and return the total."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"seconds": time.monotonic() - self._start}) + "\n")
        total = 0.0
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                total += float(json.loads(line)["seconds"])
            except (ValueError, KeyError):
                continue  # half a line, from a crash while writing it
        return total


def ancestors(stages: Sequence[Stage], last: str) -> set[str]:
    """Names of `last` and of every stage that it needs, at any distance."""
    wanted = {last}
    for stage in reversed(stages):
        if stage.name in wanted:
            wanted |= set(stage.upstream)
    return wanted


def identities(stages: Sequence[Stage]) -> dict[str, str]:
    """Stage -> what it is before anything has run: the same for stages of two graphs that do the same work."""
    found: dict[str, str] = {}
    for stage in stages:
        tree = [stage.name, stage.settings, [found[name] for name in stage.upstream]]
        found[stage.name] = _digest(json.dumps(tree, sort_keys=True).encode())
    return found


def check_order(stages: Sequence[Stage], known: Collection[str] = ()) -> None:
    """Every stage stands after what it reads, once. `known`: stages that are done."""
    seen = set(known)
    for stage in stages:
        assert stage.name not in seen, f"stage {stage.name} stands twice"
        assert seen.issuperset(stage.upstream), f"stage {stage.name} stands before one of {stage.upstream}"
        seen.add(stage.name)


def _inputs(stage: Stage, outputs: Mapping[str, str]) -> dict[str, Any]:
    upstream = {name: outputs[name] for name in stage.upstream}
    tree = {"format": FORMAT, "settings": stage.settings, "upstream": upstream}
    # through JSON, so that tuples and lists compare equal to what was read back
    return dict(json.loads(json.dumps(tree, sort_keys=True)))


def _difference(old: Any, new: Any, prefix: str = "") -> str:
    """The first key that differs, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            before, after = old.get(key, _MISSING), new.get(key, _MISSING)
            if before != after:
                return _difference(before, after, f"{prefix}.{key}" if prefix else key)
    root, _, rest = prefix.partition(".")
    if root == "upstream":
        return f"stage {rest} gave another result"
    was, now = ("absent" if value is _MISSING else _shown(json.dumps(value)) for value in (old, new))
    return f"{rest or root} was {was}, is {now}"


def _shown(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none or it was cut short."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):  # the last: replaced just now, on NFS
            return None
        raise
    except ValueError:
        return None
    return tree if isinstance(tree, dict) else None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
