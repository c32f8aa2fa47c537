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
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from engine_fast.distributed.presence import beat
from engine_fast.distributed.runtime import World
from engine_fast.errors import CheckpointError

MANIFEST, STATE, WEIGHTS = "manifest.json", "state.json", "weights.safetensors"
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot that was found whole."""

    directory: Path
    state: dict[str, Any]

    @property
    def update(self) -> int:
        return int(self.state["update"])


class CheckpointStore:
    """The checkpoints of one stage. All ranks call every method but `weights`; the directory is one they share."""

    def __init__(self, directory: Path, *, world: World, min_free_bytes: int = 0) -> None:
        self.directory, self._world, self._min_free_bytes = directory, world, min_free_bytes

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

    def save(self, name: str, state: dict[str, Any], write: Callable[[Path], None], *, num_bytes: int) -> Path:
        """Make snapshot `name`: `write(directory)` is called on every rank, then rank 0 seals it.

        `num_bytes` is an estimate of the whole, for the check of free space before anything is written.
        Raises CheckpointError with nothing half written in place; earlier snapshots are untouched.
        """
        final, fresh = self.directory / name, self.directory / f".{name}.tmp"
        self._world.on_main(lambda: self._check_space(num_bytes))
        hint = f"{self._kept()} Free some space; the same command continues."

        def begin() -> None:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)

        def seal() -> None:
            (fresh / STATE).write_text(json.dumps(state), encoding="utf-8")
            files = {}
            for path in sorted(path for path in fresh.rglob("*") if path.is_file()):
                files[str(path.relative_to(fresh))] = _sync_and_sum(path)
            (fresh / MANIFEST).write_text(json.dumps({"format": 1, "files": files}), encoding="utf-8")
            for path in (fresh / MANIFEST, *(path for path in fresh.rglob("*") if path.is_dir()), fresh):
                _sync(path)
            if final.exists():
                shutil.rmtree(final)
            os.replace(fresh, final)
            _sync(self.directory)

        try:
            self._guarded(begin, f"{final} could not be written", hint)
            self._guarded(lambda: write(fresh), f"{final} could not be written", hint, everywhere=True)
            self._guarded(seal, f"{final} could not be written", hint)
        except CheckpointError:
            if self._world.is_main:
                shutil.rmtree(fresh, ignore_errors=True)
            raise
        return final

    def set_latest(self, name: str) -> None:
        """Point `latest` at a snapshot, atomically."""

        def point() -> None:
            fresh = self.directory / "latest.new"
            fresh.write_text(name + "\n", encoding="utf-8")
            _sync(fresh)
            os.replace(fresh, self.directory / "latest")
            _sync(self.directory)

        self._guarded(point, f"{self.directory / 'latest'} could not be written", self._kept())

    def newest(self, say: Callable[[str], None]) -> Snapshot | None:
        """The newest whole snapshot; each damaged one on the way is reported to `say`. None: nothing to resume from.

        Raises CheckpointError if there are snapshots but none is whole.
        """
        return self._world.on_main(lambda: self._newest(say))

    def updates(self) -> list[Path]:
        """Snapshots by update, oldest first, unchecked."""
        return sorted(self.directory.glob("update-*"))

    def prune(self, update: int, *, keep_last: int, best: int | None) -> None:
        """Keep the newest `keep_last` snapshots up to `update` and every best one that these or `best` refer to.

        A snapshot beyond `update` was damaged, or training would have continued from it.
        """
        if self._world.is_main:
            past = [path for path in self.updates() if path.name <= update_name(update)]
            kept = past[-keep_last:]
            for path in self.updates():
                if path not in kept:
                    shutil.rmtree(path, ignore_errors=True)
            wanted = {best_name(best)} if best is not None else set()
            for path in kept:
                referred = _read_state(path).get("best_update")
                wanted |= {best_name(referred)} if referred is not None else set()
            for path in self.directory.glob("best-*"):
                if path.name not in wanted:
                    shutil.rmtree(path, ignore_errors=True)
        self._world.barrier()

    def weights(self, name: str) -> dict[str, Tensor]:
        """The float32 weights of a snapshot. Raises CheckpointError if it is damaged."""
        from safetensors.torch import load_file

        directory = self.directory / name
        verify(directory)
        return load_file(directory / WEIGHTS)

    def _newest(self, say: Callable[[str], None]) -> Snapshot | None:
        names = [path.name for path in reversed(self.updates())]
        try:
            latest = (self.directory / "latest").read_text(encoding="utf-8").strip()
        except OSError:
            latest = ""
        # A snapshot newer than `latest` was sealed too; the kill came between the two renames.
        failures: list[str] = []
        for name in names:
            try:
                verify(self.directory / name)
                if failures:
                    say(f"falling back to checkpoint {self.directory / name}.")
                return Snapshot(self.directory / name, _read_state(self.directory / name))
            except CheckpointError as error:
                failures.append(str(error))
                say(str(error))
        if failures:
            raise CheckpointError(
                f"{self.directory}: no checkpoint is whole. {failures[0]} "
                "Remove the directory to start this stage again."
            )
        if latest:
            raise CheckpointError(
                f"{self.directory}: `latest` names {latest}, which is missing. "
                "Restore it, or remove the directory to start again."
            )
        return None

    def _check_space(self, num_bytes: int) -> None:
        free = shutil.disk_usage(self.directory).free
        if free - num_bytes < self._min_free_bytes:
            raise CheckpointError(
                f"{self.directory}: a checkpoint needs about {num_bytes / 1e6:.0f} MB and "
                f"{self._min_free_bytes / 1e6:.0f} MB must stay free (runtime.min_free_bytes), "
                f"but {free / 1e6:.0f} MB are. {self._kept()} Free some space; the same command continues."
            )

    def _kept(self) -> str:
        kept = self.updates()
        return f"The last good checkpoint is {kept[-1].name}." if kept else "There is no earlier checkpoint."

    def _guarded(self, action: Callable[[], None], what: str, hint: str, *, everywhere: bool = False) -> None:
        """Run on rank 0 (or everywhere); if it fails anywhere, every rank raises the same CheckpointError."""
        failure = ""
        if everywhere or self._world.is_main:
            try:
                action()
            except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
                failure = " ".join(str(error).split())[:300]
        failures = [text for text in self._world.gather(failure) if text]
        if failures:
            raise CheckpointError(f"{what} ({failures[0]}). {hint}")


def update_name(update: int) -> str:
    return f"update-{update:08d}"


def best_name(update: int) -> str:
    return f"best-{update:08d}"


def verify(directory: Path) -> None:
    """Raise CheckpointError unless every listed file has its size and CRC-32."""
    try:
        listed = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {directory} is incomplete (no readable {MANIFEST}).") from error
    for name, (size, checksum) in listed.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {directory} is damaged: {name} is missing.")
        if path.stat().st_size != size:
            raise CheckpointError(
                f"checkpoint {directory} is damaged: {name} has {path.stat().st_size} bytes, expected {size}."
            )
        if _sum(path) != checksum:
            raise CheckpointError(f"checkpoint {directory} is damaged: {name} has changed since it was written.")


def _read_state(directory: Path) -> dict[str, Any]:
    try:
        state = json.loads((directory / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _sum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            beat(f"reading {path.name}")
            checksum = zlib.crc32(block, checksum)
    return checksum


def _sync_and_sum(path: Path) -> tuple[int, int]:
    _sync(path)
    return path.stat().st_size, _sum(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
