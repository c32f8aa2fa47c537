"""Real launchers, guards and ranks that train nothing: every way in which a rank or the launcher can end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FAULTS = {
    "done": [], "exit7": [], "exception": [], "mistake": ["restarts=2"], "kill": [], "stop": ["stopped=0.5"],
    "silent": [], "hang": ["hang=2"], "lost": ["contact=3"], "absent": ["start=4"], "signalled": [],
    "once": ["restarts=2"], "again": ["restarts=1"],
}  # fmt: skip


@dataclass
class Launched:
    out: Path
    process: subprocess.Popen[str]
    said: str = ""

    def finish(self) -> int:
        _, self.said = self.process.communicate(timeout=120)
        return self.process.returncode

    def attempt(self, number: int = 0) -> Path:
        return self.out / "launch" / f"attempt-{number:03d}"

    def ends(self, number: int = 0) -> dict[int, dict]:
        paths = sorted(self.attempt(number).glob("rank-*.end.json"))
        return {int(path.name[5:10]): json.loads(path.read_text()) for path in paths}

    def pids(self) -> list[int]:
        return [json.loads(path.read_text())["pid"] for path in self.out.glob("launch/attempt-*/rank-?????.json")]

    @property
    def summary(self) -> dict:
        return json.loads((self.out / "launch" / "summary.json").read_text())


def start(out: Path, what: str, *given: str) -> Launched:
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *filter(None, sys.path)]),
    }
    out.mkdir(parents=True, exist_ok=True)
    behaviour = "exit7" if what == "again" else what
    command = [sys.executable, str(HERE / "fake_launch.py"), str(out), behaviour, *given]
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace", preexec_fn=heed_interrupts
    )
    return Launched(out, process)


def heed_interrupts() -> None:
    """Also where these tests run in the background of a shell, which lets them ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def left_of(out: Path) -> list[str]:
    """Command lines of living processes that name this directory, or carry it in their environment."""
    mark = str(out).encode()
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdecimal() and int(path.name) != os.getpid():
            try:
                text = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
            except OSError:
                continue
            if mark in text:
                found.append((path / "cmdline").read_text())
    return found


def running(out: Path, *given: str, what: str = "work") -> Launched:
    """A launch whose ranks are at work."""
    one = start(out, what, *given)
    limit = time.monotonic() + 60
    while not all(_beat(one, rank).get("count", 0) > 5 for rank in (0, 1)):
        assert one.process.poll() is None, one.process.stderr.read()
        assert time.monotonic() < limit
        time.sleep(0.05)
    return one


def _beat(one: Launched, rank: int) -> dict:
    try:
        return json.loads((one.attempt() / f"rank-{rank:05d}.beat").read_text())
    except (OSError, ValueError):
        return {}


def signal_launcher(out: Path, number: int) -> Launched:
    one = running(out)
    one.process.send_signal(number)
    one.finish()
    return one


def signal_launcher_of_one_that_cannot_save(out: Path) -> Launched:
    one = running(out, "restarts=1", what="unsaved")
    one.process.send_signal(signal.SIGINT)
    one.finish()
    return one


def hold_launcher(out: Path) -> Launched:
    """Until its ranks have given it up."""
    one = running(out, "lost=1", "restarts=1", what="deserted")
    one.process.send_signal(signal.SIGSTOP)
    limit = time.monotonic() + 60
    while len(one.ends()) < 2 and time.monotonic() < limit:
        time.sleep(0.1)
    one.process.send_signal(signal.SIGCONT)
    one.finish()
    return one


def signal_twice(out: Path) -> Launched:
    one = running(out, "grace=60", what="deaf")
    one.process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert one.process.poll() is None
    one.process.send_signal(signal.SIGINT)
    one.finish()
    return one


def outlast_grace(out: Path) -> Launched:
    one = running(out, "grace=1", what="deaf")
    one.process.send_signal(signal.SIGTERM)
    one.finish()
    return one


def kill_launcher(out: Path) -> Launched:
    one = running(out)
    one.process.kill()
    one.process.wait()
    limit = time.monotonic() + 60
    while left_of(out) and time.monotonic() < limit:
        time.sleep(0.1)
    return one


def kill_launcher_and_start_again(out: Path) -> Launched:
    """With a rank that cannot end by itself."""
    one = running(out, "lost=600")
    os.kill(one.pids()[1], signal.SIGSTOP)
    one.process.kill()
    again = start(out, "done")
    again.finish()
    return again


def kill_transport(out: Path) -> Launched:
    one = running(out)
    for path in Path("/proc").iterdir():
        if path.name.isdecimal() and _is_transport(path, one.process.pid):
            os.kill(int(path.name), signal.SIGKILL)
    one.finish()
    return one


def _is_transport(path: Path, parent: int) -> bool:
    try:
        status = (path / "status").read_text()
        return b"fake_transport" in (path / "cmdline").read_bytes() and f"PPid:\t{parent}\n" in status
    except OSError:
        return False


def start_second(out: Path) -> Launched:
    one = running(out)
    second = start(out, "done")
    second.finish()
    one.process.send_signal(signal.SIGTERM)
    one.finish()
    return second


SCENARIOS = {
    "sigint": lambda out: signal_launcher(out, signal.SIGINT),
    "sigterm": lambda out: signal_launcher(out, signal.SIGTERM),
    "unsaved": signal_launcher_of_one_that_cannot_save,
    "held": hold_launcher,
    "twice": signal_twice,
    "grace": outlast_grace,
    "killed": kill_launcher,
    "again after kill": kill_launcher_and_start_again,
    "transport": kill_transport,
    "second": start_second,
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Launched]]:
    """Everything at once: these processes mostly wait."""
    root = tmp_path_factory.mktemp("faults")
    running = {what: start(root / what, what, *given) for what, given in FAULTS.items()}
    try:
        with ThreadPoolExecutor(len(SCENARIOS)) as pool:
            scenarios = {name: pool.submit(body, root / name.replace(" ", "-")) for name, body in SCENARIOS.items()}
            for one in running.values():
                one.finish()
        yield {**running, **{name: future.result() for name, future in scenarios.items()}}
    finally:
        for one in running.values():
            one.process.kill()


@pytest.mark.parametrize(
    ("what", "kind", "says"),
    [
        ("exit7", "exit", "it exited with 7 without a word"),
        ("exception", "exception", "ValueError: a shape is wrong"),
        ("mistake", "mistake", "engine.o2 = 'STX'"),
        ("kill", "signal", "killed by SIGKILL"),
        ("stop", "stopped", "stopped by a signal"),
        ("silent", "silent", "it exited with 0 without having finished"),
        ("hang", "hung", "no progress for"),
        ("lost", "lost", "no sign of its host"),
        ("absent", "never started", "did not start it within"),
    ],
)
def test_a_failed_rank_is_found_and_named(launched, what, kind, says):
    one = launched[what]
    assert one.process.returncode == 2, one.said
    first = one.summary["first_failure"]
    assert (first["rank"], first["host"], first["kind"]) == (1, "localhost", kind)
    assert says in first["why"]
    assert f"rank 1 on localhost was the first ({kind}): " in one.said
    assert says in one.said
    assert len(one.said.splitlines()) < 50
    assert "restart" not in one.said
    if what not in ("lost", "absent"):
        assert one.ends()[1]["code"] != 0
    assert one.ends()[0]["kind"] == "ended"
    assert left_of(one.out) == []


def test_the_one_that_hangs_is_named_with_its_last_act_and_traceback(launched):
    one = launched["hang"]
    assert "at: the step that hangs" in one.said
    log = (one.attempt() / "rank-00001.log").read_text()
    assert "most recent call first" in log
    assert "in misbehave" in log


def test_success_needs_every_marker(launched):
    one = launched["done"]
    assert one.process.returncode == 0, one.said
    assert {rank: end["code"] for rank, end in one.ends().items()} == {0: 0, 1: 0}
    assert "done: all 2 ranks finished" in one.said
    assert "rank 0 of 2 begins" in one.said  # shown as it comes
    assert "rank 1 of 2 begins" not in one.said
    assert one.summary["code"] == 0
    assert not list(one.attempt().glob("environment-*"))
    assert left_of(one.out) == []


def test_a_signal_to_one_rank_stops_all_of_them(launched):
    one = launched["signalled"]
    assert one.process.returncode == 130, one.said
    assert "interrupted by a signal to rank 1" in one.said
    assert {end["code"] for end in one.ends().values()} == {130}
    assert left_of(one.out) == []


def test_restart_with_a_fresh_port(launched):
    one = launched["once"]
    assert one.process.returncode == 0, one.said
    assert "restart 1 of 2 in 0.2 s" in one.said
    ports = [json.loads((one.attempt(number) / "attempt.json").read_text())["master_port"] for number in (0, 1)]
    assert ports[0] != ports[1]
    assert [attempt["code"] for attempt in one.summary["attempts"]] == [2, 0]
    assert not one.attempt(2).exists()


def test_restarts_end(launched):
    one = launched["again"]
    assert one.process.returncode == 2
    assert one.said.count("restart 1 of 1") == 1
    assert [attempt["first_failure"]["kind"] for attempt in one.summary["attempts"]] == ["exit", "exit"]


@pytest.mark.parametrize("which", ["sigint", "sigterm"])
def test_a_signal_to_the_launcher_reaches_the_ranks(launched, which):
    one = launched[which]
    assert one.process.returncode == 130, one.said
    assert "all ranks have saved. The same command continues." in one.said
    assert {(end["code"], end["kind"]) for end in one.ends().values()} == {(130, "interrupted")}
    assert json.loads((one.attempt() / "stop.json").read_text())["action"] == "save"
    assert left_of(one.out) == []


def test_a_rank_that_fails_to_save_is_no_interrupt(launched):
    one = launched["unsaved"]
    assert one.process.returncode == 2, one.said
    assert "rank 1 on localhost was the first (mistake): runs/x: No space left on device" in one.said
    assert one.ends()[0]["code"] == 130
    assert "restart" not in one.said
    assert left_of(one.out) == []


def test_a_launcher_that_was_held_restarts(launched):
    one = launched["held"]
    assert one.process.returncode == 0, one.said
    first = one.summary["attempts"][0]["first_failure"]
    assert first["kind"] == "ended"
    assert first["why"] == "the launcher has given no sign for 1 s; it has saved"
    assert {end["code"] for end in one.ends().values()} == {130}
    assert left_of(one.out) == []


def test_a_second_signal_stops_at_once(launched):
    one = launched["twice"]
    assert one.process.returncode == 130, one.said
    assert "stopping at once" in one.said
    assert "0 of 2 ranks saved by themselves" in one.said
    assert {end["kind"] for end in one.ends().values()} == {"ended"}
    assert left_of(one.out) == []


def test_grace_ends(launched):
    one = launched["grace"]
    assert one.process.returncode == 130, one.said
    assert "it did not end within 1 s of being asked to" in one.ends()[0]["error"]
    assert "most recent call first" in (one.attempt() / "rank-00001.log").read_text()
    assert left_of(one.out) == []


def test_ranks_of_a_killed_launcher_save_and_end(launched):
    one = launched["killed"]
    assert left_of(one.out) == []
    assert {end["code"] for end in one.ends().values()} == {130}


def test_the_next_launcher_clears_what_a_killed_one_left(launched):
    again = launched["again after kill"]
    assert again.process.returncode == 0, again.said
    assert "attempt 0 was left by a launcher that was killed" in again.said
    assert again.attempt(1).exists()
    assert again.ends(0)[0]["code"] == 130
    assert left_of(again.out) == []


def test_a_killed_transport_saves_first(launched):
    one = launched["transport"]
    assert one.process.returncode == 2, one.said
    assert "what starts the ranks ended by signal 9 before they did" in one.said
    assert {end["code"] for end in one.ends().values()} == {130}
    assert left_of(one.out) == []


def test_one_launcher_at_a_time(launched):
    second = launched["second"]
    assert second.process.returncode == 1  # the command line makes 2 of a ConfigError
    assert "ConfigError" in second.said
    assert "another `engine-fast launch` works here" in second.said
    assert not second.attempt(1).exists()
    assert second.ends()[1]["code"] == 130
