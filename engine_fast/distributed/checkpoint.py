"""Checkpoints that are whole or not there: written aside, synced, listed with their checksums, then renamed.

    checkpoints/
        latest                 name of the newest whole snapshot
        update-00000200/       DeepSpeed's files, weights.safetensors, state.json, manifest.json
        best-00000200/         weights.safetensors, state.json, manifest.json

DeepSpeed's own `latest` is never read: a crash leaves it pointing at half a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from engine_fast.distributed.manifest import read_manifest, share, sync, verify
from engine_fast.distributed.runtime import World
from engine_fast.distributed.sealing import Sealing, discard
from engine_fast.errors import CheckpointError

STATE, WEIGHTS = "state.json", "weights.safetensors"
PASSING = "passing"
"""In the state of a snapshot that goes as soon as there is a later one."""
_GRACE = 30.0
"""Seconds that a run which fails waits for its last snapshot."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot that was found whole."""

    directory: Path
    state: dict[str, Any]

    @property
    def update(self) -> int:
        return int(self.state["update"])


class CheckpointStore:
    """The checkpoints of one stage, in a directory that all ranks share.

    All ranks call `prepare`, `save`, `join`, `newest` and `scratch`, in the same order; the rest is local.
    """

    def __init__(self, directory: Path, *, world: World, min_free_bytes: int = 0) -> None:
        self.directory, self._world, self._min_free_bytes = directory, world, min_free_bytes
        self._sealing: Sealing | None = None

    def prepare(self) -> None:
        """Make the directory and remove what an interrupted write left behind. Raises CheckpointError if read-only."""

        def make() -> None:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.glob(".*.tmp"):
                shutil.rmtree(path)
            probe = self.directory / ".writable.tmp"
            probe.mkdir()
            probe.rmdir()

        self._guarded(make, f"{self.directory} cannot be written to", "Choose another --out directory.")

    def save(
        self,
        name: str,
        state: dict[str, Any],
        write: Callable[[Path], None],
        *,
        num_bytes: int,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin snapshot `name`: `write(directory)` has run on every rank when this returns; `join` makes sure of it.

        A thread seals the snapshot meanwhile, and calls `then` on rank 0 when it is in place. `num_bytes` is an
        estimate of the whole, for the check of free space before anything is written.
        Raises CheckpointError, also for the snapshot before; earlier ones are untouched and nothing is half there.
        """
        self.join()
        final, fresh = self.directory / name, self.directory / f".{name}.tmp"
        self._world.on_main(lambda: self._check_space(num_bytes))

        def begin() -> None:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            (fresh / STATE).write_text(json.dumps(state), encoding="utf-8")

        try:
            self._guarded(begin, f"{final} could not be written", self._hint())
            self._guarded(lambda: write(fresh), f"{final} could not be written", self._hint(), everywhere=True)
        except CheckpointError:
            if self._world.is_main:
                shutil.rmtree(fresh, ignore_errors=True)
            raise
        self._sealing = Sealing(fresh, final, rank=self._world.rank, size=self._world.size, then=then)

    def join(self) -> None:
        """Wait until the last save is in place. Raises the same CheckpointError on every rank if it is not."""
        sealing, self._sealing = self._sealing, None
        if sealing is None:
            return
        failures = [text for text in self._world.gather(sealing.synced()) if text]
        if self._world.is_main:
            if failures:
                sealing.stop(0.0)
            elif failure := sealing.sealed():
                failures.append(failure)
        failures = self._world.broadcast(failures)
        if failures:
            if self._world.is_main:
                shutil.rmtree(sealing.fresh, ignore_errors=True)
            raise CheckpointError(f"{sealing.final} could not be written ({failures[0]}). {self._hint()}")

    def close(self) -> None:
        """For a run that fails: let the last save come to its end if it can, without the other ranks."""
        if self._sealing is not None:
            self._sealing.stop(_GRACE)
            self._sealing = None

    def advance(self, name: str, *, keep_last: int, best: int | None) -> None:
        """Rank 0: point `latest` at update snapshot `name`, then remove what it replaces.

        Kept are this one, the newest `keep_last` up to it that are not passing, and every best one that these or
        `best` refer to. One beyond it was damaged, or training would have continued from it.
        """
        fresh = self.directory / "latest.new"
        fresh.write_text(name + "\n", encoding="utf-8")
        sync(fresh)
        os.replace(fresh, self.directory / "latest")
        sync(self.directory)
        kept = [path for path in self.updates(passing=False) if path.name <= name][-keep_last:]
        kept += [path for path in (self.directory / name,) if path not in kept]
        for path in self.updates():
            if path not in kept:
                discard(path)
        wanted = {best_name(best)} if best is not None else set()
        for path in kept:
            referred = _read_state(path).get("best_update")
            wanted |= {best_name(referred)} if referred is not None else set()
        for path in self.directory.glob("best-*"):
            if path.name not in wanted:
                discard(path)

    def newest(self, say: Callable[[str], None]) -> Snapshot | None:
        """The newest whole snapshot; each damaged one on the way is reported to `say`. None: nothing to resume from.

        Each rank compares the checksums of its own files; all come to the same answer.
        Raises CheckpointError if there are snapshots but none is whole.
        """
        names = self._world.broadcast([path.name for path in reversed(self.updates())])
        # A snapshot newer than `latest` was sealed too; the kill came between the two renames.
        failures: list[str] = []
        for name in names:
            directory = self.directory / name
            failure = self._damage(directory)
            if not failure:
                if failures:
                    say(f"falling back to checkpoint {directory}.")
                return Snapshot(directory, self._world.broadcast(_read_state(directory)))
            failures.append(failure)
            say(failure)
        if failures:
            raise CheckpointError(
                f"{self.directory}: no checkpoint is whole. {failures[0]} "
                "Remove the directory to start this stage again."
            )
        latest = self._world.broadcast(self._latest())
        if latest:
            raise CheckpointError(
                f"{self.directory}: `latest` names {latest}, which is missing. "
                "Restore it, or remove the directory to start again."
            )
        return None

    @contextmanager
    def scratch(self, num_bytes: int) -> Iterator[Path]:
        """A hidden directory beside the snapshots while the block runs. Raises CheckpointError without the space."""
        path = self.directory / ".scratch.tmp"
        self._world.on_main(lambda: self._check_space(num_bytes))
        self._guarded(path.mkdir, f"{path} could not be made", self._hint())
        try:
            yield path
            self._world.barrier()
        finally:
            if self._world.is_main:
                shutil.rmtree(path, ignore_errors=True)

    def updates(self, *, passing: bool = True) -> list[Path]:
        """Snapshots by update, oldest first, unchecked; without the passing ones if these are not wanted."""
        found = sorted(self.directory.glob("update-*"))
        return found if passing else [path for path in found if not _read_state(path).get(PASSING)]

    def weights(self, name: str) -> dict[str, Tensor]:
        """The float32 weights of a snapshot. Raises CheckpointError if they are damaged."""
        from safetensors.torch import load_file

        directory = self.directory / name
        verify(directory, [WEIGHTS])
        return load_file(directory / WEIGHTS)

    def _damage(self, directory: Path) -> str:
        """What is wrong with a snapshot, or ''; the same on every rank."""
        failure = ""
        try:
            verify(directory, share(list(read_manifest(directory)), self._world.rank, self._world.size))
        except CheckpointError as error:
            failure = str(error)
        return next((text for text in self._world.gather(failure) if text), "")

    def _latest(self) -> str:
        try:
            return (self.directory / "latest").read_text(encoding="utf-8").strip()
        except OSError:
            return ""

    def _check_space(self, num_bytes: int) -> None:
        try:
            free = shutil.disk_usage(self.directory).free
        except OSError as error:
            raise CheckpointError(
                f"{self.directory}: cannot be written to ({error.strerror}). {self._hint()}"
            ) from error
        if free - num_bytes < self._min_free_bytes:
            raise CheckpointError(
                f"{self.directory}: a checkpoint needs about {num_bytes / 1e6:.0f} MB and "
                f"{self._min_free_bytes / 1e6:.0f} MB must stay free (runtime.min_free_bytes), "
                f"but {free / 1e6:.0f} MB are. {self._hint()}"
            )

    def _hint(self) -> str:
        kept = self.updates()
        last = f"The last good checkpoint is {kept[-1].name}." if kept else "There is no earlier checkpoint."
        return f"{last} Free some space; the same command continues."

    def _guarded(self, action: Callable[[], None], what: str, hint: str, *, everywhere: bool = False) -> None:
        """Run on rank 0 (or everywhere); if it fails anywhere, every rank raises the same CheckpointError."""
        failure = ""
        if everywhere or self._world.is_main:
            try:
                action()
            except (OSError, RuntimeError, SafetensorError) as error:  # the last two: a full disk, says each library
                failure = " ".join(str(error).split())[:300]
        failures = [text for text in self._world.gather(failure) if text]
        if failures:
            raise CheckpointError(f"{what} ({failures[0]}). {hint}")


def update_name(update: int) -> str:
    return f"update-{update:08d}"


def best_name(update: int) -> str:
    return f"best-{update:08d}"


def _read_state(directory: Path) -> dict[str, Any]:
    try:
        state = json.loads((directory / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}
