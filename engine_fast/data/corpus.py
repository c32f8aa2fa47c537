"""A prepared corpus: sentence pairs as ids, memory-mapped."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine_fast.data.atomic import sha256_of
from engine_fast.data.batching import Batch, Indices, Lengths
from engine_fast.data.shards import Manifest, ShardInfo, read_manifest
from engine_fast.data.symbols import PAD
from engine_fast.errors import DataError, VocabularyError

Ids = npt.NDArray[np.unsignedinteger[Any]]


class ParallelCorpus:
    """Random access to sentence pairs; every sentence ends in EOS.

    Memory: 8 bytes a pair (its two lengths); ids and offsets stay on disk until touched.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.source_fingerprint = manifest.source_fingerprint
        self.target_fingerprint = manifest.target_fingerprint
        self._shards = [_Shard(directory / info.name, info) for info in manifest.shards]
        self._starts = np.cumsum([0, *(info.num_sentences for info in manifest.shards)]).tolist()
        self.source_lengths = self._lengths(0)
        self.target_lengths = self._lengths(1)

    @classmethod
    def open(cls, directory: Path, *, verify: bool = True) -> ParallelCorpus:
        """Open what ShardWriter wrote. verify=True also compares every shard's sha256 (about 1 s a GB).

        Raises DataError: manifest or shard missing, of another size, or with other bytes than when it was written.
        """
        manifest = read_manifest(directory)
        for info in manifest.shards:
            path = directory / info.name
            hint = "Run engine-fast prepare again."
            if not path.is_file():
                raise DataError(f"{path}: this shard is missing. {hint}")
            size = path.stat().st_size
            if size != info.num_bytes:
                raise DataError(f"{path}: has {size} bytes, expected {info.num_bytes}; it was cut or changed. {hint}")
            if verify and sha256_of(path) != info.sha256:
                raise DataError(f"{path}: its checksum differs from the manifest's, the file is corrupt. {hint}")
        return cls(directory, manifest)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def source(self, index: int) -> Ids:
        """Ids of one source sentence, EOS included; a read-only view."""
        return self._side(0, index)

    def target(self, index: int) -> Ids:
        """Ids of one target sentence, EOS included; a read-only view."""
        return self._side(1, index)

    def collate(self, indices: Indices | Sequence[int]) -> Batch:
        """The pairs at `indices`, in that order, right-padded; no indices give tensors of shape (0, 0)."""
        numbers = np.asarray(indices, dtype=np.int64)
        source = _padded([self.source(index) for index in numbers])
        target = _padded([self.target(index) for index in numbers])
        return Batch(source, target, torch.from_numpy(numbers.copy()))

    def require_vocabularies(self, source_fingerprint: str, target_fingerprint: str) -> None:
        """Raise VocabularyError unless the ids were made with these two vocabularies."""
        for side, own, wanted in (
            ("source", self.source_fingerprint, source_fingerprint),
            ("target", self.target_fingerprint, target_fingerprint),
        ):
            if own != wanted:
                raise VocabularyError(
                    f"{self.directory}: its {side} ids were made with vocabulary {own[:12]}, the other part of the run "
                    f"uses {wanted[:12]}. Use the data and the models of one run, or prepare the data again."
                )

    def _side(self, side: int, index: int) -> Ids:
        if not 0 <= index < len(self):
            raise IndexError(f"sentence {index} of {len(self)}")
        number = bisect_right(self._starts, index) - 1
        return self._shards[number].sentence(side, int(index) - self._starts[number])

    def _lengths(self, side: int) -> Lengths:
        parts = [np.diff(shard.offsets[side]).astype(np.int32) for shard in self._shards]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)


class _Shard:
    """Views into one mapped file."""

    def __init__(self, path: Path, info: ShardInfo) -> None:
        content = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))  # slices of a memmap object are slow
        ends = np.cumsum(
            [
                8 * (info.num_sentences + 1),
                8 * (info.num_sentences + 1),
                np.dtype(info.dtype).itemsize * info.num_source_ids,
                np.dtype(info.dtype).itemsize * info.num_target_ids,
            ]
        )
        if int(ends[-1]) != content.size:
            raise DataError(f"{path}: its size does not fit the manifest. Run engine-fast prepare again.")
        parts = np.split(content, ends[:-1])
        self.offsets = (parts[0].view("<i8"), parts[1].view("<i8"))
        self._ids = (parts[2].view(info.dtype), parts[3].view(info.dtype))

    def sentence(self, side: int, index: int) -> Ids:
        start, end = self.offsets[side][index : index + 2]
        ids: Ids = self._ids[side][start:end]
        return ids


def _padded(rows: list[Ids]) -> torch.Tensor:
    width = max((len(row) for row in rows), default=0)
    table = np.full((len(rows), width), PAD, dtype=np.int64)
    for place, row in zip(table, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(table)
