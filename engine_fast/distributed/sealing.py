"""The end of a save, done by a thread of each rank while the next updates run: flush, checksum, list, rename.

Threads talk through files alone, since collectives belong to the main thread: each rank leaves the list of its own
files in the hidden directory, and rank 0 renames that once all lists are there. A kill at any moment leaves a hidden
directory, which the next start removes.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from engine_fast.distributed.manifest import Files, listing, share, sync, sync_and_sum, write_manifest

_POLL = 0.02
_VISIBLE = 120.0
"""Seconds until a file that another rank has written must be seen here; network file systems remember its absence."""


class Sealing:
    """One snapshot on its way from `fresh` to `final`. `then` runs on rank 0 once it is there."""

    def __init__(self, fresh: Path, final: Path, *, rank: int, size: int, then: Callable[[], None]) -> None:
        """Every rank has written its files when this is called."""
        self.fresh, self.final = fresh, final
        self._rank, self._size, self._then = rank, size, then
        self._own = share(listing(fresh), rank, size)
        self._synced, self._failure = threading.Event(), ""
        self._cancelled, self._deadline = threading.Event(), float("inf")
        self._thread = threading.Thread(target=self._run, name=f"seal {final.name}", daemon=True)
        self._thread.start()

    def synced(self) -> str:
        """Wait for this rank's own files to be on the disk. What went wrong, or ''."""
        self._synced.wait()
        return self._failure

    def sealed(self) -> str:
        """Rank 0, after every rank's `synced`: wait for the rename. What went wrong, or ''."""
        self._deadline = time.monotonic() + _VISIBLE
        self._thread.join()
        return self._failure

    def stop(self, grace: float) -> None:
        """Give up after `grace` seconds, without asking the other ranks. What is not sealed by then never is."""
        self._thread.join(grace)
        self._cancelled.set()
        self._thread.join(10 * _POLL)

    def _run(self) -> None:
        try:
            files = sync_and_sum(self.fresh, self._own)
            if self._rank:
                self._leave(files)
            self._synced.set()
            if self._rank == 0:
                self._seal(files)
        except Exception as error:  # whatever it is, the main thread must hear of it
            self._failure = " ".join(str(error).split())[:300] or repr(error)
        finally:
            self._synced.set()

    def _leave(self, files: Files) -> None:
        path = _list_of(self.fresh, self._rank)
        path.with_suffix(".new").write_text(json.dumps(files), encoding="utf-8")
        os.replace(path.with_suffix(".new"), path)

    def _seal(self, files: Files) -> None:
        for rank in range(1, self._size):
            files |= self._await(rank)
        write_manifest(self.fresh, files)
        for path in (*(path for path in self.fresh.rglob("*") if path.is_dir()), self.fresh):
            sync(path)
        if self._cancelled.is_set():
            return
        discard(self.final)
        os.replace(self.fresh, self.final)
        sync(self.final.parent)
        self._then()

    def _await(self, rank: int) -> Files:
        path = _list_of(self.fresh, rank)
        while not path.exists():
            if self._cancelled.wait(_POLL):
                raise OSError("another rank could not write its files")
            if time.monotonic() > self._deadline:
                raise OSError(
                    f"rank {rank} has written its files, but they are not seen here: all ranks must share the directory"
                )
        content: Files = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
        return content


def discard(path: Path) -> None:
    """Remove a directory, if it is there, so that a kill leaves all of it or a hidden rest."""
    if path.exists():
        aside = path.with_name(f".{path.name}.old.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        shutil.rmtree(aside, ignore_errors=True)


def _list_of(directory: Path, rank: int) -> Path:
    return directory / f".files-{rank:05d}.json"
