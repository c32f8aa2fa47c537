"""A directory that appears whole or not at all.

Everything is written to a hidden sibling, flushed, and renamed at the end. The sibling holds a file lock while its
writer lives, so that what a killed run left behind is told from what another run is writing, and removed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from engine_fast.errors import ConfigError, DataError

_LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system without locks answers, some parallel ones among them."""
_MOMENTS = 60.0
"""Seconds after which a sibling without a lock is nobody's."""


@contextmanager
def new_directory(final: Path, *, marker: str) -> Iterator[Path]:
    """Yield a temporary directory; when the block ends without an exception it stands at `final`.

    A `final` that holds `marker` is an older product of ours and is replaced; an empty one is filled.
    Raises DataError: `final` holds something else, or the disk is full or read-only. An exception leaves nothing.
    """
    final = final.resolve()
    with writing(final):
        if final.exists() and not (final / marker).exists() and (not final.is_dir() or any(final.iterdir())):
            raise DataError(f"{final}: exists, and was not written by this command. Choose another directory.")
        final.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{final.name}.partial-"
        _remove_abandoned(final.parent, prefix)
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=final.parent))
    lock = None
    try:
        with writing(final):
            temporary.chmod(0o777 & ~_umask())
            lock = os.open(temporary / _LOCK, os.O_CREAT | os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            yield temporary
            (temporary / _LOCK).unlink()
            sync_directory(temporary)
            _move_in(temporary, final, marker)
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)


def _open_lock(directory: Path) -> IO[str]:
    """Raises ConfigError for a directory that cannot be written to."""
    try:
        return (directory / _LOCK).open("w")
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be written to ({error.strerror}). Choose another --out.") from error


@contextmanager
def only_one(directory: Path) -> Iterator[None]:
    """Make `directory` and hold its .lock, so that two commands never write into it at once.

    Warns where the file system has no locks, and goes on: then nothing stops a second command.
    Raises ConfigError when another process holds the lock, or the directory cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{directory}: a file is in the way, expected a directory. Choose another --out.") from error
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be made ({error.strerror}). Choose another --out.") from error
    with _open_lock(directory) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{directory}: another engine-fast works here. Wait for it, or choose another place for the output."
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"{directory}: this file system has no locks ({error.strerror}), so nothing stops a second command "
                "from writing here at the same time. See to it that there is none.",
                stacklevel=3,
            )
        yield


@contextmanager
def try_only_one(directory: Path) -> Iterator[bool]:
    """only_one(directory) without waiting for anybody: False where another process, or this one, holds it.

    Raises ConfigError where the file system has no locks: several processes cannot share work there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _open_lock(directory) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise ConfigError(
                f"{directory}: this file system has no locks ({error.strerror}), which tell processes what others work "
                "on. Choose an --out on another one."
            ) from error
        yield True


def is_held(directory: Path) -> bool:
    """Whether a process is seen to hold only_one(directory): its death ends that, also of kill -9 and on another host.

    False also where locks cannot be seen, as on a network file system that keeps them to each host.
    """
    try:
        with (directory / _LOCK).open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of writing into a DataError that says what to do."""
    try:
        yield
    except OSError as error:
        place = error.filename or path
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "Free some space or choose another directory; nothing half-written was left."
        else:
            hint = "Choose a directory that you may write to."
        raise DataError(f"{place}: cannot be written ({error.strerror or error}). {hint}") from error


@contextmanager
def replacing(path: Path, mode: str) -> Iterator[Any]:
    """A file that takes its name only when it is whole and on disk. Text is UTF-8.

    A link stays, and what it points to is replaced. Raises DataError as writing(), and as require_replaceable().
    """
    require_replaceable(path)
    path = path.resolve() if path.is_symlink() else path
    fresh = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex}")  # ranks may sit on several hosts
    try:
        with writing(path), open(fresh, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def require_replaceable(path: Path) -> None:
    """Raises DataError for what no file should take the place of: a directory, a device, a pipe, and links to them."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is no regular file, so none is put in its place. Choose another name.")


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries; the files in it are flushed by whoever writes them."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a new file and flush it."""
    with path.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes. Raises DataError when it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error


def _move_in(temporary: Path, final: Path, marker: str) -> None:
    replaced = None
    if (final / marker).exists():
        # A kill between the two renames leaves no `final`, never half of one; the next run writes it again.
        replaced = Path(tempfile.mkdtemp(prefix=f".{final.name}.partial-", dir=final.parent))
        os.rename(final, replaced / "replaced")
    os.rename(temporary, final)
    sync_directory(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for folder in parent.glob(prefix + "*"):
        try:
            descriptor = os.open(folder / _LOCK, os.O_RDWR)
        except FileNotFoundError:  # just made, just finished, or left by a kill in those moments
            if time.time() - folder.stat().st_mtime > _MOMENTS:
                shutil.rmtree(folder, ignore_errors=True)
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # its writer is alive
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            # it may be alive: what was left behind stays
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
