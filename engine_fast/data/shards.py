"""Id shards on disk: one file of flat arrays for each `shard_sentences` pairs, one manifest for all.

NNNNN.shard = source offsets (n+1) int64 | target offsets (n+1) int64 | source ids | target ids, little endian; ids are
uint16 where they fit, else uint32. Sentence i is ids[offsets[i]:offsets[i+1]], its end symbol included.
manifest.json names every shard with its sizes and sha256, and the hashes of the two vocabularies.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from engine_fast.data.atomic import new_directory, write_file, writing
from engine_fast.errors import DataError

MANIFEST = "manifest.json"
VERSION = 1


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One line of the manifest."""

    name: str
    num_sentences: int
    num_source_ids: int
    num_target_ids: int
    dtype: Literal["<u2", "<u4"]
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What manifest.json holds."""

    source_fingerprint: str
    target_fingerprint: str
    shards: tuple[ShardInfo, ...]


class ShardWriter:
    """Writes a corpus; a context manager. Nothing stands at `directory` unless the block ended well.

    Memory: one shard. Raises DataError when the disk is full or the directory cannot be written.
    """

    def __init__(
        self, directory: Path, *, source_fingerprint: str, target_fingerprint: str, shard_sentences: int = 200_000
    ) -> None:
        self._final = directory
        self._fingerprints = (source_fingerprint, target_fingerprint)
        self._shard_sentences = shard_sentences
        self._shards: list[ShardInfo] = []
        self._stack = ExitStack()
        self._clear()

    def __enter__(self) -> ShardWriter:
        self._directory = self._stack.enter_context(new_directory(self._final, marker=MANIFEST))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack.pop_all():
            if len(self._offsets[0]) > 1:
                self._flush()
            content: dict[str, Any] = {
                "version": VERSION,
                "source_fingerprint": self._fingerprints[0],
                "target_fingerprint": self._fingerprints[1],
                "shards": [asdict(shard) for shard in self._shards],
            }
            with writing(self._final):
                write_file(self._directory / MANIFEST, json.dumps(content, indent=1).encode())

    def add(self, source_ids: Iterable[int], target_ids: Iterable[int]) -> None:
        """Append one pair; both sides end in EOS. Raises DataError on an empty side, an id below 0 or above 2^32-1."""
        for ids, offsets, added in zip(self._ids, self._offsets, (source_ids, target_ids), strict=True):
            try:
                ids.extend(added)
            except (OverflowError, TypeError) as error:
                raise DataError(f"{self._final}: cannot store these ids ({error}), expected 0 to 2^32-1.") from error
            if len(ids) == offsets[-1]:
                raise DataError(f"{self._final}: a side without ids, expected at least the end symbol.")
            offsets.append(len(ids))
        if len(self._offsets[0]) > self._shard_sentences:
            self._flush()

    def _clear(self) -> None:
        self._ids = (array("I"), array("I"))
        self._offsets = (array("q", [0]), array("q", [0]))

    def _flush(self) -> None:
        name = f"{len(self._shards):05d}.shard"
        sides = [np.frombuffer(ids, dtype=np.uint32) for ids in self._ids]
        dtype: Literal["<u2", "<u4"] = "<u2" if max(int(side.max()) for side in sides) < 2**16 else "<u4"
        parts = [np.frombuffer(offsets, dtype=np.int64).astype("<i8") for offsets in self._offsets]
        digest, size = hashlib.sha256(), 0
        path = self._directory / name
        with writing(path), path.open("xb") as stream:
            for part in (*parts, *(side.astype(dtype) for side in sides)):
                content = part.tobytes()
                digest.update(content)
                size += stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        self._shards.append(
            ShardInfo(name, len(parts[0]) - 1, len(sides[0]), len(sides[1]), dtype, size, digest.hexdigest())
        )
        self._clear()


def read_manifest(directory: Path) -> Manifest:
    """Raises DataError when it is missing or damaged."""
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != VERSION:
            raise DataError(
                f"{path}: format version {content['version']}, expected {VERSION}. Run engine-fast prepare again."
            )
        return Manifest(
            content["source_fingerprint"],
            content["target_fingerprint"],
            tuple(ShardInfo(**shard) for shard in content["shards"]),
        )
    except OSError as error:
        raise DataError(f"{path}: is missing ({error.strerror}). Run engine-fast prepare again.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is damaged ({error}). Run engine-fast prepare again.") from error
