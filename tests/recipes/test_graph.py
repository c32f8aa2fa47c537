"""Stages: done once, continued, redone when an input changes, safe against kill -9. Toy stages, no training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_fast.config import parse_config
from engine_fast.data.atomic import only_one
from engine_fast.distributed import World
from engine_fast.errors import CheckpointError, PeerError
from engine_fast.recipes import execute
from engine_fast.recipes.execute import run_graph
from engine_fast.recipes.graph import Stage
from engine_fast.recipes.stages import build_stages
from tests.distributed.threads import run_ranks

ALONE = World(0, 1, torch.device("cpu"))


class Toy:
    """Two stages: `copy` writes its setting, `double` writes what copy wrote twice. Counts runs, can be told to die."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.runs: list[str] = []
        self.said: list[str] = []
        self.interrupt: str | None = None

    def go(self, value: Any = 1, **options: Any) -> None:
        stages = [
            Stage("copy", (), {"value": value}, ("out/*",), self._body("copy", lambda: str(value))),
            Stage("double", ("copy",), {}, ("*.txt",), self._body("double", lambda: 2 * self.text("copy"))),
        ]
        run_graph(stages, self.out, world=ALONE, say=self.said.append, **options)

    def text(self, stage: str) -> str:
        where = {"copy": "out/value", "double": "value.txt"}[stage]
        return (self.out / stage / where).read_text()

    def _body(self, name: str, content: Callable[[], str]) -> Callable[[Path], None]:
        def body(directory: Path) -> None:
            self.runs.append(name)
            half = directory / "half"
            resumed = half.exists()
            half.touch()
            if self.interrupt == name:
                raise KeyboardInterrupt
            path = directory / {"copy": "out/value", "double": "value.txt"}[name]
            path.parent.mkdir(exist_ok=True)
            path.write_text(content())
            self.said.append(f"{name} resumed={resumed}")

        return body


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path / "run")


def test_every_stage_runs_once(toy: Toy) -> None:
    toy.go()
    assert toy.text("double") == "11"
    toy.go()
    assert toy.runs == ["copy", "double"]
    assert toy.said[-2:] == ["copy: done before, inputs unchanged", "double: done before, inputs unchanged"]


def test_a_changed_setting_reruns_it_and_what_reads_it(toy: Toy) -> None:
    toy.go(1)
    toy.go(2)
    assert toy.runs == ["copy", "double"] * 2
    assert toy.text("double") == "22"
    assert "copy: running again because value was 1, is 2; the old files are in copy.stale-1" in toy.said
    assert (
        "double: running again because stage copy gave another result; the old files are in double.stale-1" in toy.said
    )
    assert (toy.out / "double.stale-1" / "value.txt").read_text() == "11"
    assert "copy resumed=False" in toy.said[-5:]  # a fresh directory: nothing of the old run is there


def test_the_same_output_from_other_settings_stops_the_chain(toy: Toy) -> None:
    toy.go("1")
    toy.go(1)  # another setting, the same text
    assert toy.runs == ["copy", "double", "copy"]


def test_an_interrupted_stage_continues_in_its_directory(toy: Toy) -> None:
    toy.interrupt = "double"
    with pytest.raises(KeyboardInterrupt):
        toy.go()
    assert not (toy.out / "double" / "stage.json").exists()
    toy.interrupt = None
    toy.go()
    assert toy.runs == ["copy", "double", "double"]
    assert "double: was interrupted, continuing" in toy.said
    assert "double resumed=True" in toy.said


def test_an_interrupted_stage_is_not_continued_for_other_inputs(toy: Toy) -> None:
    toy.interrupt = "double"
    with pytest.raises(KeyboardInterrupt):
        toy.go(1)
    toy.interrupt = None
    toy.go(2)
    assert "double resumed=False" in toy.said
    assert toy.text("double") == "22"


def test_what_was_moved_aside_is_taken_back_when_it_is_wanted_again(toy: Toy) -> None:
    toy.go(1)
    toy.interrupt = "copy"
    with pytest.raises(KeyboardInterrupt):
        toy.go(2)  # a mistake, say, that is found only now
    toy.interrupt = None
    toy.go(1)
    assert toy.runs == ["copy", "double", "copy"]
    assert "copy: the files in copy.stale-1 were made from these inputs, and are taken back" in toy.said
    assert toy.text("double") == "11"
    assert sorted(path.name for path in toy.out.iterdir() if "stale" in path.name) == ["copy.stale-2"]
    (toy.out / "copy.stale-9.tar").write_text("somebody's")
    toy.go(2)
    assert "copy: was interrupted, continuing" in toy.said
    toy.go(1)
    assert toy.runs == ["copy", "double", "copy", "copy", "double"]
    assert toy.text("double") == "11"


def test_what_is_asked_to_run_again_is_not_taken_back(toy: Toy) -> None:
    toy.go(1)
    toy.go(2)
    toy.go(1, redo=["copy"])
    assert toy.runs == ["copy", "double", "copy", "double", "copy"]
    assert not any("copy.stale" in line and "taken back" in line for line in toy.said)


def test_the_last_attempt_is_taken_back_and_no_older_one(toy: Toy) -> None:
    toy.go(1)
    toy.interrupt = "copy"
    with pytest.raises(KeyboardInterrupt):
        toy.go(1, redo=["copy"])  # what is there is not wanted
    toy.interrupt = None
    toy.go(2)
    (toy.out / "copy.stale-1").touch()
    toy.go(1)
    assert "copy: was interrupted, continuing" in toy.said
    assert toy.runs.count("copy") == 4


def test_where_a_stage_must_not_run_nothing_is_taken_back(toy: Toy) -> None:
    toy.go(1)
    toy.go(2)
    with pytest.raises(CheckpointError, match="stage copy is not done for this configuration"):
        toy.go(1, only=["double"])
    assert toy.text("copy") == "2"


def test_a_damaged_one_is_not_taken_back(toy: Toy) -> None:
    toy.go(1)
    toy.go(2)
    (toy.out / "copy.stale-1" / "out" / "value").write_text("7")
    toy.go(1)
    assert toy.runs == ["copy", "double"] * 2 + ["copy"]  # the same content again, so the old double is taken back
    assert toy.text("double") == "11"


@pytest.mark.parametrize("damage", ["delete", "grow", "alter"])
def test_a_damaged_output_is_made_again(toy: Toy, damage: str) -> None:
    toy.go()
    path = toy.out / "copy" / "out" / "value"
    path.unlink() if damage == "delete" else path.write_text("longer" if damage == "grow" else "2")
    toy.go()
    assert toy.runs == ["copy", "double", "copy"]  # the same content again, so double stands
    assert toy.text("copy") == "1"


def test_files_of_unknown_origin_are_moved_aside(toy: Toy) -> None:
    (toy.out / "copy").mkdir(parents=True)
    (toy.out / "copy" / "mine.txt").write_text("precious")
    toy.go()
    assert (toy.out / "copy.stale-1" / "mine.txt").read_text() == "precious"
    assert [path.name for path in (toy.out / "copy" / "out").iterdir()] == ["value"]


def test_redo_runs_a_done_stage_again(toy: Toy) -> None:
    toy.go()
    toy.go(redo=("double",))
    assert toy.runs == ["copy", "double", "double"]


def test_only_refuses_to_run_other_stages(toy: Toy) -> None:
    with pytest.raises(CheckpointError, match=r"copy is not done for this configuration.*engine-fast run"):
        toy.go(only=("double",))
    assert toy.runs == []


def test_the_record_names_every_output(toy: Toy) -> None:
    toy.go()
    record = json.loads((toy.out / "copy" / "stage.json").read_text())
    assert list(record["outputs"]) == ["out/value"]
    assert record["outputs"]["out/value"]["bytes"] == 1
    assert record["seconds"] >= 0


def test_kill_9_leaves_a_stage_begun_never_done(tmp_path: Path) -> None:
    """The process kills itself inside the stage, then between its last file and stage.json."""
    script = tmp_path / "toy.py"
    script.write_text(
        textwrap.dedent("""
            import os, signal, sys
            from pathlib import Path
            import torch
            from engine_fast.distributed import World
            from engine_fast.recipes import execute, graph
            out, where = Path(sys.argv[1]), sys.argv[2]
            def die():
                os.kill(os.getpid(), signal.SIGKILL)
            def body(directory):
                with (directory / "lines.txt").open("a") as stream:
                    for number in range(len((directory / "lines.txt").read_text().splitlines()), 4):
                        stream.write(f"{number}\\n")
                        stream.flush()
                        if where == "inside" and number == 2:
                            die()
            if where == "end":
                execute.finish = lambda *args: die()
            stage = graph.Stage("lines", (), {}, ("lines.txt",), body)
            execute.run_graph([stage], out, world=World(0, 1, torch.device("cpu")), say=print)
        """)
    )
    outs = {}
    for name, deaths in (("killed", ["inside", "end"]), ("whole", [])):
        out = tmp_path / name
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        for where in deaths:
            dead = subprocess.run([sys.executable, script, out, where], env=environment, check=False)
            assert dead.returncode == -signal.SIGKILL
            assert not (out / "lines" / "stage.json").exists()
        subprocess.run([sys.executable, script, out, "never"], env=environment, check=True)
        outs[name] = json.loads((out / "lines" / "stage.json").read_text())["outputs_hash"]
    assert outs["killed"] == outs["whole"]


def go_together(out: Path, body: Callable[[World, Path], None], *, every_rank: bool = True, size: int = 2) -> list[Any]:
    """One stage that writes lines.txt, on ranks that are threads; what each returned or raised."""

    def rank(world: World) -> None:
        def run(directory: Path) -> None:
            body(world, directory)
            if world.is_main:
                (directory / "lines.txt").write_text("done")

        stage = Stage("lines", (), {}, ("lines.txt",), run, every_rank=every_rank)
        run_graph([stage], out, world=world, say=lambda line: None)

    return run_ranks(size, rank)


def no_work(world: World, directory: Path) -> None: ...


@pytest.mark.parametrize("every_rank", [True, False])
def test_all_ranks_wait_until_rank_0_is_done(tmp_path: Path, every_rank: bool) -> None:
    ran: list[int] = []

    def body(world: World, directory: Path) -> None:
        ran.append(world.rank)
        if world.is_main:
            time.sleep(0.5)  # a collective would have to wait as long

    assert go_together(tmp_path, body, every_rank=every_rank, size=3) == [None] * 3
    assert sorted(ran) == ([0, 1, 2] if every_rank else [0])
    assert json.loads((tmp_path / "lines" / "stage.json").read_text())["outputs"]
    assert go_together(tmp_path, body, every_rank=every_rank) == [None] * 2
    assert len(ran) == (3 if every_rank else 1)


@pytest.mark.parametrize("every_rank", [True, False])
@pytest.mark.parametrize("error", [CheckpointError("no teacher"), ZeroDivisionError("a bug"), KeyboardInterrupt()])
def test_the_end_of_rank_0_in_a_stage_is_the_end_of_all(tmp_path: Path, error: BaseException, every_rank: bool) -> None:
    def body(world: World, directory: Path) -> None:
        if world.is_main:
            raise error

    first, second = go_together(tmp_path, body, every_rank=every_rank)
    assert first is error
    assert type(second) is (KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else PeerError)
    assert "stage lines ended on rank 0" in str(second)
    assert str(error) in str(second)
    assert go_together(tmp_path, no_work, every_rank=every_rank) == [None, None]  # an old failure is no failure


def test_an_old_failure_that_a_file_server_still_shows_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(world: World, directory: Path) -> None:
        if world.is_main:
            failure = {"attempt": "an earlier one", "error": "no", "interrupted": False}
            (directory / "failure.json").write_text(json.dumps(failure))
            time.sleep(0.5)

    assert go_together(tmp_path, slow, every_rank=False) == [None, None]


@pytest.mark.parametrize("step", ["plan_stage", "begin"])
def test_rank_0_failing_before_a_stage_reaches_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(execute, step, full)
    first, second = go_together(tmp_path, no_work)
    assert type(first) is OSError
    assert type(second) is PeerError
    assert "No space left" in str(second)


def test_a_follower_notices_that_rank_0_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 lets go of the lock, as kill -9 would, and is silent until the other has ended."""
    monkeypatch.setattr(execute, "_CHECK_SECONDS", 0.2)
    ended = threading.Event()

    def rank(world: World) -> None:
        lock = ExitStack()
        if world.is_main:
            lock.enter_context(only_one(tmp_path))

        def silent(directory: Path) -> None:
            time.sleep(1)
            assert not ended.is_set(), "gave up although rank 0 lived"
            lock.close()
            assert ended.wait(30)
            (directory / "lines.txt").touch()

        world.barrier()
        try:
            run_graph([Stage("lines", (), {}, ("*.txt",), silent)], tmp_path, world=world, say=lambda line: None)
        finally:
            ended.set()

    _, second = run_ranks(2, rank)
    assert type(second) is PeerError
    assert "rank 0 is gone without a word" in str(second)


def test_where_things_are_kept_starts_no_stage_again(tmp_path):
    """A stage that did not fit goes on with what `doctor --plan` advises; one with other numbers does not."""

    def settings_of(**changes):
        tree = {"data": {"source_language": "a", "target_language": "b", "synthetic": {}}, **changes}
        stages = build_stages(parse_config(tree), tmp_path, world=World(0, 1, torch.device("cpu")), say=print)
        return {stage.name: stage.settings for stage in stages}

    before = settings_of()
    moved = {"zero_stage": 3, "offload": {"optimizer": True}, "activation_checkpointing": True}
    buckets = {"zero_optimization": {"reduce_bucket_size": 50_000_000}, "wall_clock_breakdown": True}
    assert settings_of(engine={**moved, "head_memory": "recompute"}, cmlm=moved, deepspeed=buckets) == before
    assert settings_of(engine={"precision": "bf16"}) != before
    assert settings_of(deepspeed={"zero_optimization": {"zero_quantized_weights": True}}) != before
