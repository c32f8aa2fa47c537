"""Snapshots of several ranks: each answers for its own files, and all come to the same end."""

import errno
import json
import shutil
import threading
from pathlib import Path

import pytest

from engine_fast.distributed import CheckpointStore, checkpoint, manifest, sealing
from engine_fast.distributed.checkpoint import update_name
from engine_fast.distributed.manifest import read_manifest, share
from engine_fast.errors import CheckpointError

from .crew import together

SIZE = 3


def own_file(rank):
    return f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def save(world, directory, update, wait=True):
    store = CheckpointStore(directory, world=world)

    def write(fresh):
        (fresh / own_file(world.rank)).write_bytes(bytes([world.rank]) * 1000)
        if world.is_main:
            (fresh / "weights.safetensors").write_bytes(b"w" * 500)

    name = update_name(update)
    store.save(
        name, {"update": update}, write, num_bytes=0, then=lambda: store.advance(name, keep_last=9, best=None)
    )  # fmt: skip
    if wait:
        store.join()
    return store


def newest(directory, size=SIZE):
    """(update or error, what was said) for every rank."""

    def find(world):
        said = []
        snapshot = CheckpointStore(directory, world=world).newest(said.append)
        return snapshot.update, said

    return together(size, find)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def directory(tmp_path):
    for update in (1, 2):
        together(SIZE, lambda world, update=update: save(world, tmp_path, update))
    return tmp_path


def test_every_file_is_listed_once_and_read_by_its_own_rank(directory, monkeypatch):
    snapshot = directory / update_name(2)
    files = read_manifest(snapshot)
    assert sorted(files) == sorted([*map(own_file, range(SIZE)), "state.json", "weights.safetensors"])
    assert names(snapshot) == sorted([*files, "manifest.json"])
    for size in (1, 2, 3, 5):
        shares = [share(list(files), rank, size) for rank in range(size)]
        assert sorted(name for part in shares for name in part) == sorted(files)
    read, real = [], manifest._sum

    def reading(path, **options):
        read.append((threading.get_ident(), path.name))
        return real(path, **options)

    monkeypatch.setattr(manifest, "_sum", reading)
    assert newest(directory) == [(2, [])] * SIZE
    assert sorted(name for _, name in read) == sorted(files)
    assert len({thread for thread, _ in read}) == SIZE


@pytest.mark.parametrize("rank", range(SIZE))
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "empty"])
def test_damage_to_one_ranks_file_is_everyones(directory, rank, damage):
    victim = directory / update_name(2) / own_file(rank)
    content = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes({"cut": content[:10], "flipped": b"\xff" + content[1:], "empty": b""}[damage])
    results = newest(directory)
    assert results == [results[0]] * SIZE
    update, said = results[0]
    assert update == 1
    assert own_file(rank) in said[0]
    assert said[1].startswith("falling back to checkpoint")
    assert newest(directory, size=2)[0][0] == 1


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": 2}', '{"format": 2, "files": {"x": 1}}', "\x00"])
def test_a_manifest_that_cannot_be_read(directory, content):
    path = directory / update_name(2) / "manifest.json"
    path.unlink() if content is None else path.write_text(content)
    for update, said in newest(directory):
        assert update == 1
        assert "is incomplete (no readable manifest.json)" in said[0]


def test_another_versions_snapshot_is_named_as_such(directory):
    path = directory / update_name(2) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    assert "has format 1, expected 2: another version" in newest(directory)[0][1][0]


def test_no_whole_snapshot_is_the_same_error_everywhere(directory):
    for update in (1, 2):
        (directory / update_name(update) / own_file(1)).unlink()
    errors = newest(directory)
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    assert "no checkpoint is whole" in str(errors[0])


@pytest.mark.parametrize("rank", range(SIZE))
def test_a_rank_that_cannot_write_stops_all_of_them(directory, rank):
    def work(world):
        store = CheckpointStore(directory, world=world)

        def write(fresh):
            (fresh / own_file(world.rank)).write_bytes(b"half")
            if world.rank == rank:
                raise OSError(errno.ENOSPC, "No space left on device")

        store.save(update_name(3), {"update": 3}, write, num_bytes=0)

    errors = together(SIZE, work)
    assert len({str(error) for error in errors}) == 1
    assert "update-00000003 could not be written ([Errno 28] No space left on device)" in str(errors[0])
    assert names(directory) == ["latest", update_name(1), update_name(2)]


@pytest.mark.parametrize("rank", range(SIZE))
@pytest.mark.parametrize("kind", [OSError(errno.EIO, "Input/output error"), ValueError("a bug")])
def test_a_failure_in_the_background_is_everyones_at_the_next_join(directory, monkeypatch, rank, kind):
    real = sealing.sync_and_sum

    def failing(path, files):
        if own_file(rank) in files:
            raise kind
        return real(path, files)

    with monkeypatch.context() as patch:
        patch.setattr(sealing, "sync_and_sum", failing)
        errors = together(SIZE, lambda world: save(world, directory, 3))
    assert len({str(error) for error in errors}) == 1
    assert isinstance(errors[0], CheckpointError)
    assert f"update-00000003 could not be written ({kind})" in str(errors[0])
    assert "last good checkpoint is update-00000002" in str(errors[0])
    assert names(directory) == ["latest", update_name(1), update_name(2)]
    together(SIZE, lambda world: save(world, directory, 3))
    assert newest(directory) == [(3, [])] * SIZE


def test_files_that_are_not_seen_on_rank_0_are_a_directory_that_is_not_shared(directory, monkeypatch):
    monkeypatch.setattr(sealing.Sealing, "_leave", lambda self, files: None)
    monkeypatch.setattr(sealing, "_VISIBLE", 0.1)
    errors = together(SIZE, lambda world: save(world, directory, 3))
    assert all("all ranks must share the directory" in str(error) for error in errors)
    assert newest(directory) == [(2, [])] * SIZE


def test_a_run_that_fails_leaves_its_last_snapshot_whole_or_not_at_all(directory):
    def fail(world):
        save(world, directory, 3, wait=False).close()

    together(SIZE, fail)
    assert newest(directory) == [(3, [])] * SIZE


def test_a_lost_rank_is_not_waited_for(directory, monkeypatch):
    monkeypatch.setattr(checkpoint, "_GRACE", 0.2)
    monkeypatch.setattr(sealing.Sealing, "_leave", lambda self, files: None)

    def fail(world):
        save(world, directory, 3, wait=False).close()

    together(SIZE, fail)
    assert newest(directory) == [(2, [])] * SIZE
    together(SIZE, lambda world: CheckpointStore(directory, world=world).prepare())
    assert names(directory) == ["latest", update_name(1), update_name(2)]


@pytest.mark.parametrize("size", [1, 2])
def test_a_kill_at_any_moment_leaves_a_whole_snapshot(tmp_path, monkeypatch, size):
    """The directory as it stands before each step of a save, and in the middle of each removal."""
    directory, moments = tmp_path / "checkpoints", []
    directory.mkdir()
    together(size, lambda world: save(world, directory, 1))
    lock, copytree, rmtree = threading.Lock(), shutil.copytree, shutil.rmtree

    def remember():
        with lock:
            moments.append(tmp_path / f"moment-{len(moments)}")
            copytree(directory, moments[-1], ignore_dangling_symlinks=True)

    def before(owner, name):
        real = getattr(owner, name)

        def step(*arguments, **options):
            if str(directory) in str(arguments[0]):
                remember()
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, step)

    def half(path, ignore_errors=False):
        for file in list(Path(path).rglob("*.pt"))[:1]:
            file.unlink()
        remember()
        rmtree(path, ignore_errors=ignore_errors)

    for owner, name in ((sealing, "sync"), (manifest, "sync"), (checkpoint, "sync"), (sealing.os, "replace")):
        before(owner, name)
    monkeypatch.setattr(sealing.shutil, "rmtree", half)

    def work(world):
        store = save(world, directory, 2)
        store.save(update_name(2), {"update": 2}, lambda fresh: None, num_bytes=0)  # again
        store.join()
        if world.is_main:
            store.advance(update_name(2), keep_last=1, best=None)

    assert together(size, work) == [None] * size
    assert len(moments) > 15
    found = []
    for moment in moments:
        together(size, lambda world, moment=moment: CheckpointStore(moment, world=world).prepare())
        found.append(newest(moment, size)[0])
        assert not [name for name in names(moment) if name.startswith(".")]
    assert {update for update, _ in found} == {1, 2}
    assert all(said == [] for _, said in found)
    assert names(directory) == ["latest", update_name(2)]
