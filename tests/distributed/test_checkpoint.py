"""Snapshots are whole or absent."""

import errno
import shutil

import pytest
import torch
from safetensors.torch import save_file

from engine_fast.distributed import CheckpointStore, World
from engine_fast.distributed.checkpoint import best_name, update_name
from engine_fast.distributed.manifest import verify
from engine_fast.errors import CheckpointError

WORLD = World(0, 1, torch.device("cpu"))


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", world=WORLD)
    store.prepare()
    return store


def write(directory):
    save_file({"w": torch.arange(4.0)}, directory / "weights.safetensors")
    (directory / "inner").mkdir()
    (directory / "inner" / "optimizer.bin").write_bytes(bytes(range(256)))


def save(store, update, best=None, keep_last=9):
    name = update_name(update)
    store.save(
        name, {"update": update, "best_update": best}, write, num_bytes=1000,
        then=lambda: store.advance(name, keep_last=keep_last, best=best),
    )  # fmt: skip
    store.join()


def names(store):
    return sorted(path.name for path in store.directory.iterdir())


def test_round_trip(store):
    save(store, 5)
    snapshot = store.newest(pytest.fail)
    assert snapshot.update == 5
    assert (snapshot.directory / "inner" / "optimizer.bin").read_bytes() == bytes(range(256))
    assert torch.equal(store.weights(update_name(5))["w"], torch.arange(4.0))
    assert names(store) == ["latest", "update-00000005"]


def test_nothing_to_resume_from(store):
    assert store.newest(pytest.fail) is None


def test_saving_again_replaces(store):
    save(store, 5)
    save(store, 5)
    assert store.newest(pytest.fail).update == 5


@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_damage_is_named(store, damage):
    save(store, 5)
    victim = store.directory / "update-00000005" / "inner" / "optimizer.bin"
    if damage == "cut":
        victim.write_bytes(b"x" * 10)
    elif damage == "changed":
        victim.write_bytes(bytes(reversed(range(256))))
    else:
        victim.unlink()
    expected = {"cut": "has 10 bytes, expected 256", "changed": "has changed", "missing": "is missing"}[damage]
    with pytest.raises(CheckpointError, match=f"inner/optimizer.bin {expected}"):
        verify(victim.parent.parent)


def test_fall_back_to_the_newest_whole_one(store):
    for update in (5, 10, 15):
        save(store, update)
    for update in (10, 15):
        (store.directory / update_name(update) / "manifest.json").unlink()
    said = []
    assert store.newest(said.append).update == 5
    assert [next(name for name in ("00000015", "00000010", "00000005") if name in line) for line in said] == [
        "00000015", "00000010", "00000005",
    ]  # fmt: skip


def test_an_unfinished_write_is_removed_at_the_next_start(store):
    save(store, 5)
    (store.directory / ".update-00000010.tmp").mkdir()
    (store.directory / ".update-00000010.tmp" / "half").write_text("x")
    store.prepare()
    assert names(store) == ["latest", "update-00000005"]


def test_a_missing_latest_snapshot_is_an_error(store):
    save(store, 5)
    shutil.rmtree(store.directory / "update-00000005")
    with pytest.raises(CheckpointError, match="`latest` names update-00000005, which is missing"):
        store.newest(pytest.fail)


def test_pruning_keeps_every_best_that_something_kept_refers_to(store):
    for update, best in ((5, None), (10, 5), (15, 5)):
        save(store, update, best)
    for update in (5, 12, 18, 21):
        store.save(best_name(update), {"update": update}, write, num_bytes=0)
    store.save(update_name(20), {"update": 20, "best_update": 18}, write, num_bytes=0)
    store.join()
    store.advance(update_name(20), keep_last=2, best=21)
    assert names(store) == [
        "best-00000005", "best-00000018", "best-00000021", "latest", "update-00000015", "update-00000020",
    ]  # fmt: skip


def test_pruning_drops_a_damaged_future_rather_than_the_present(store):
    for update in (5, 10):
        save(store, update)
    store.advance(update_name(5), keep_last=1, best=None)
    assert names(store) == ["latest", "update-00000005"]
    assert (store.directory / "latest").read_text() == "update-00000005\n"


@pytest.mark.parametrize(
    "kind", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed")]
)
def test_a_failing_write_leaves_only_what_was_whole(store, kind):
    save(store, 5)

    def fail(directory):
        write(directory)
        raise kind

    with pytest.raises(
        CheckpointError, match=r"update-00000010 could not be written .*last good checkpoint is update-00000005"
    ):
        store.save(update_name(10), {"update": 10}, fail, num_bytes=0)
    assert names(store) == ["latest", "update-00000005"]


def test_free_space_is_checked_before_anything_is_written(tmp_path):
    store = CheckpointStore(tmp_path, world=WORLD, min_free_bytes=10**15)
    with pytest.raises(CheckpointError, match="min_free_bytes"):
        store.save("update-00000001", {"update": 1}, lambda _: pytest.fail("written"), num_bytes=10**6)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written to"):
        CheckpointStore(tmp_path / "file" / "checkpoints", world=WORLD).prepare()
