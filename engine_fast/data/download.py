"""Archives: found where the user has them, or downloaded with a checksum; and text taken out of them."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pooch

from engine_fast.data.atomic import sha256_of, writing
from engine_fast.errors import DataError


@dataclass(frozen=True, slots=True)
class Archive:
    """One tar archive of a catalog corpus."""

    name: str
    """File name, as the user's own copy must be called."""
    url: str | None
    """Where a program can download it; None when only a person can."""
    sha256: str | None
    """Checksum in hex; None when its publisher states none."""
    origin: str = ""
    """Where a person gets it, when url is None."""


def cache_directory() -> Path:
    """$ENGINE_FAST_CACHE, else the platform's cache directory."""
    return Path(os.environ.get("ENGINE_FAST_CACHE") or pooch.os_cache("engine_fast"))


def fetch(archive: Archive, root: Path | None, *, sha256: str | None = None, allow_unverified: bool = False) -> Path:
    """The archive's path: in `root` when it lies there, else in the cache, downloaded if needed.

    `sha256` is the user's own statement, used where the catalog has none. Raises DataError: a wrong checksum (of the
    user's copy too), a download without any checksum unless allow_unverified, no connection, no place to download from.
    """
    expected = archive.sha256 or sha256
    local = root / archive.name if root is not None else None
    if local is not None and local.is_file():
        if expected is not None and sha256_of(local) != expected:
            raise DataError(f"{local}: sha256 is {sha256_of(local)}, expected {expected}. Get the archive again.")
        return local
    if archive.url is None:
        raise DataError(
            f"{archive.name}: cannot be downloaded by a program. Get it from {archive.origin} and name its folder in "
            "data.root."
        )
    if expected is None and not allow_unverified:
        raise DataError(
            f"{archive.name}: no checksum is known for {archive.url}. State one in data.sha256 "
            f"({{{archive.name}: HEX}}), or take the file as it comes with data.allow_unverified=true, or put your own "
            "copy into data.root."
        )
    return _download(archive, expected)


def _download(archive: Archive, expected: str | None) -> Path:
    folder = cache_directory()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    pooch.get_logger().setLevel("WARNING")
    known_hash = None if expected is None else f"sha256:{expected}"
    try:
        path = pooch.retrieve(archive.url, known_hash=known_hash, fname=archive.name, path=folder)
    except ValueError as error:
        raise DataError(
            f"{archive.url}: what came has another sha256 than {expected} ({error}). Nothing was kept. Try again, or "
            "put a good copy into data.root."
        ) from error
    except Exception as error:  # requests and urllib3 raise many kinds
        raise DataError(
            f"{archive.url}: could not be downloaded ({error}). Check the connection, or put {archive.name} into "
            "data.root."
        ) from error
    return Path(path)


def member_lines(archive: Path, name: str) -> Iterator[bytes]:
    """The lines of the regular file whose base name is `name`, without their ends. Raises DataError without one."""
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                if member.isfile() and Path(member.name).name == name:
                    stream = tar.extractfile(member)
                    if stream is not None:
                        for line in stream:
                            yield line.rstrip(b"\r\n")
                        return
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive}: is damaged ({error}). Get the archive again.") from error
    raise DataError(f"{archive}: holds no {name}. Get the archive that the catalog names, see docs/data.md.")


def member_text(archive: Path, name: str) -> Iterator[str]:
    """member_lines() as text. Raises DataError naming the line that is not UTF-8."""
    for number, line in enumerate(member_lines(archive, name), start=1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{archive}: line {number} of {name} is not UTF-8. Get the archive again.") from error
