"""The list of a snapshot's files with sizes and checksums: what tells a whole snapshot from a damaged one."""

from __future__ import annotations

import json
import os
import re
import zlib
from pathlib import Path

from engine_fast.distributed.presence import beat
from engine_fast.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 2
Files = dict[str, tuple[int, int]]
"""Relative path -> (bytes, CRC-32)."""
_RANK = re.compile(r"zero_pp_rank_(\d+)_")
_BLOCK = 1 << 20


def share(names: list[str], rank: int, size: int) -> list[str]:
    """The files that one of `size` ranks answers for: DeepSpeed's of that rank, and rank 0 all that have no rank.

    With fewer ranks than wrote them, each answers for several; every file is somebody's.
    """
    found = ((name, _RANK.search(name)) for name in names)
    return [name for name, match in found if (int(match.group(1)) if match else 0) % size == rank]


def listing(directory: Path) -> list[str]:
    """Every file below `directory` that is not hidden, sorted."""
    names = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return sorted(str(name) for name in names if not name.name.startswith("."))


def sync_and_sum(directory: Path, names: list[str]) -> Files:
    """Flush these files to the disk and read them back for their checksums."""
    result = {}
    for name in names:
        sync(directory / name)
        result[name] = (directory / name).stat().st_size, _sum(directory / name, beating=False)
    return result


def write_manifest(directory: Path, files: Files) -> None:
    (directory / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}), encoding="utf-8")
    sync(directory / MANIFEST)


def read_manifest(directory: Path) -> Files:
    """Raises CheckpointError without one that this version understands."""
    try:
        content = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        written, files = content["format"], {name: (size, sum_) for name, (size, sum_) in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {directory} is incomplete (no readable {MANIFEST}).") from error
    if written != FORMAT:
        raise CheckpointError(
            f"checkpoint {directory} has format {written}, expected {FORMAT}: another version of engine-fast wrote it."
        )
    return files


def verify(directory: Path, names: list[str] | None = None) -> None:
    """Raise CheckpointError unless every listed file, or these of them, have their sizes and checksums."""
    files = read_manifest(directory)
    for name in files if names is None else names:
        path, (size, checksum) = directory / name, files[name]
        try:
            found = path.stat().st_size
            if found != size:
                raise CheckpointError(f"checkpoint {directory} is damaged: {name} has {found} bytes, expected {size}.")
            if _sum(path, beating=True) != checksum:
                raise CheckpointError(f"checkpoint {directory} is damaged: {name} has changed since it was written.")
        except FileNotFoundError as error:
            raise CheckpointError(f"checkpoint {directory} is damaged: {name} is missing.") from error
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {directory} is damaged: {name} cannot be read ({error.strerror})."
            ) from error


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sum(path: Path, *, beating: bool) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            if beating:
                beat(f"reading {path.name}")
            checksum = zlib.crc32(block, checksum)
    return checksum
