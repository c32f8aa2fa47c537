"""Snapshots of several ranks: each answers for its own files, and all come to the same end."""

import errno
import json
import threading

import pytest

from engine_fast.distributed import CheckpointStore, manifest, sealing
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

    def reading(path):
        read.append((threading.get_ident(), path.name))
        return real(path)

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

    monkeypatch.setattr(sealing, "sync_and_sum", failing)
    stores = together(SIZE, lambda world: save(world, directory, 3, wait=False))
    assert all(isinstance(store, CheckpointStore) for store in stores)
    errors = together(SIZE, lambda world: save(world, directory, 4, wait=False))
    assert [type(error) for error in errors] == [CheckpointStore] * SIZE  # other stores: nothing to wait for
    monkeypatch.setattr(sealing, "sync_and_sum", real)
    errors = together(SIZE, lambda world: _rejoin(stores[world.rank], world))
    assert len({str(error) for error in errors}) == 1
    assert isinstance(errors[0], CheckpointError)
    assert f"update-00000003 could not be written ({kind})" in str(errors[0])
    assert "last good checkpoint is update-00000002" in str(errors[0])


def _rejoin(store, world):
    """The barrier of the first crew is gone with it."""
    store._world = world
    store.join()
