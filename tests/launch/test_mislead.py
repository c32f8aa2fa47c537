"""What file systems, transports and other hosts say wrongly, and that the launcher does not believe it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine_fast.config import RuntimeConfig
from engine_fast.distributed import presence
from engine_fast.distributed import runtime as joining
from engine_fast.distributed.launch import attempt as records
from engine_fast.distributed.launch import cleanup, commands, launcher, preflight, processes, supervise, watch
from engine_fast.distributed.launch import rank as guards
from engine_fast.distributed.launch.attempt import Attempt, End, attempts, next_number
from engine_fast.distributed.launch.hostfile import Host
from engine_fast.distributed.launch.signals import Signals
from engine_fast.distributed.launch.watch import Limits, Watch
from engine_fast.errors import ConfigError

from .test_parts import Ranks, make_spec

RUNNING = {"count": 3, "what": "update 3", "alive": 1, "patient": False, "state": "running", "since": 1.0}
NEVER = threading.Event()


@pytest.fixture
def attempt(tmp_path):
    made = Attempt.begin(tmp_path, 0)
    made.describe(make_spec(), {"n1": {"A": "1"}})
    return made


# ---------------------------------------------------------------- file systems


def test_a_client_that_does_not_see_new_files_sees_ends_and_records(attempt, monkeypatch):
    seen, look = Watch(attempt, make_spec(), Limits(10), 0.0), records.read_json

    def cached(path):
        """Only what was there from the start."""
        return look(path) if path.name.endswith(".beat") else None

    for module in (records, watch):
        monkeypatch.setattr(module, "read_json", cached)
    attempt.beat(1, {**RUNNING, "record": {"pid": 7}})
    attempt.write_end(0, End(0, "done", "", 5.0), record={"pid": 6})
    seen.look(1.0)
    assert (seen.ranks[0].end.kind, seen.ranks[0].record, seen.ranks[1].record) == ("done", {"pid": 6}, {"pid": 7})
    attempt.write_end(1, End(2, "mistake", "x" * 900, 5.0, "t"), record={"pid": 7})
    seen.look(2.0)
    assert len(seen.ranks[1].end.error) == 400
    monkeypatch.undo()
    assert attempt.read_end(1).traceback == "t"


def test_a_silent_rank_may_have_ended_before_its_transport(attempt):
    seen = Watch(attempt, make_spec(), Limits(10, contact=30), time.monotonic() - 6)
    attempt.write_end(0, End(0, "done", "", 5.0))
    for rank in (1, 2):
        attempt.beat(rank, {**RUNNING, "record": {"pid": 7}})
    ended_at = time.monotonic() - 4
    seen.look(ended_at)
    assert supervise.transport_ended(seen, 0, "", ended_at) is None
    attempt.beat(2, {**RUNNING, "alive": 2, "record": {"pid": 7}})
    seen.look(time.monotonic())
    assert supervise.transport_ended(seen, 0, "", time.monotonic()) is None  # not at once
    assert supervise.transport_ended(seen, 0, "n1", ended_at) is None
    assert supervise.transport_ended(seen, 0, "", ended_at).action == "save"


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    said = []
    monkeypatch.setattr(fcntl, "flock", refused)
    with launcher.locked(tmp_path, None, said.append):
        pass
    assert "this file system has no locks" in said[0]


def test_node_0_excludes_launches_of_other_kinds(tmp_path):
    with (
        launcher.locked(tmp_path, 0, print),
        launcher.locked(tmp_path, 1, print),
        pytest.raises(ConfigError, match="works here"),
        launcher.locked(tmp_path, None, print),
    ):
        pass


# ---------------------------------------------------------------- what was left behind


def test_a_living_launcher_is_told_by_its_beat_alone(attempt, tmp_path):
    heart = supervise.Heart(attempt)
    heart.start()
    with pytest.raises(ConfigError, match="another `engine-fast launch` works here, perhaps on another host"):
        cleanup.left_behind(tmp_path, NEVER)
    heart.end()
    heart.close({"code": 0, "restart": True, "delay": 9.0, "why": "", "clean": True})
    with pytest.raises(ConfigError, match="works here"):  # between two attempts
        cleanup.left_behind(tmp_path, NEVER)
    heart.withdraw(130, "")
    assert cleanup.left_behind(tmp_path, NEVER) is None
    assert attempt.closed() == {"code": 130, "restart": False, "delay": 9.0, "why": "", "clean": True}


def test_left_behind_is_what_has_no_marker(attempt, tmp_path, monkeypatch):
    monkeypatch.setattr(cleanup, "_BEATS_SECONDS", 0.3)
    assert cleanup.left_behind(tmp_path, NEVER) is not None  # guards may be about to start
    attempt.order(9, {"action": "save", "why": "the launcher was asked to stop"})
    assert cleanup.left_behind(tmp_path, NEVER) is None
    attempt.beat(2, {**RUNNING, "record": {"pid": 7}})
    assert cleanup.left_behind(tmp_path, NEVER)[0] == attempt
    closed = {"code": 2, "restart": False, "delay": 0.0, "why": "", "clean": False}
    attempt.order(10, {"action": "quit", "why": ""}, closed)
    assert cleanup.left_behind(tmp_path, NEVER)[0] == attempt  # that host could not be reached
    attempt.write_end(2, End(130, "interrupted", "", 5.0), record={"pid": 7})
    assert cleanup.left_behind(tmp_path, NEVER) is None


def test_attempts_are_in_the_order_of_their_numbers(tmp_path):
    for number in (1000, 2, 999):
        Attempt.begin(tmp_path, number)
    (tmp_path / "attempt-5.old").mkdir()
    assert [attempt.number for attempt in attempts(tmp_path)] == [2, 999, 1000]
    assert next_number(tmp_path) == 1001


# ---------------------------------------------------------------- who is to blame


@pytest.mark.parametrize(
    ("end", "level"),
    [
        (End(134, "signal", "killed by SIGABRT", 1.0), 1),
        (End(1, "exception", "RuntimeError: [gloo] Timed out waiting 600000ms for recv", 1.0), 1),
        (End(137, "signal", "killed by SIGKILL", 1.0), 0),
        (End(130, "ended", "the launcher has given no sign for 20 s; it has saved", 1.0), 2),
        (End(143, "ended", "", 1.0), 4),
    ],
)
def test_levels_of_echo(end, level):
    assert watch.echo(end) == level


def test_a_peer_that_waited_no_longer_is_not_the_one_that_hangs(attempt):
    ranks = Ranks(attempt)
    assert ranks.at(1, 5, 5, 5) is None
    assert ranks.at(2, 6, 5, 6) is None
    for now in range(3, 9):
        assert ranks.at(now, 6, 5, 6) is None
    attempt.write_end(0, End(1, "exception", "RuntimeError: Timed out", 8.5))
    trouble = ranks.at(9, None, 5, 6)
    assert (trouble.rank, trouble.kind, trouble.why[:17]) == (1, "hung", "no progress for 8")


def test_ranks_wait_for_one_another_longer_than_the_launcher_for_them(attempt, monkeypatch):
    spec = make_spec(collective_seconds=90000)
    place = guards.Place(0, 0, 2, "n1")
    assert guards.environment(spec, place, attempt, {})[presence.COLLECTIVE_TIMEOUT] == "90000"
    attempt.forget("n1")
    attempt.forget("n1")
    records.write_private(attempt.environment_path("n1"), {presence.COLLECTIVE_TIMEOUT: "5"})
    assert guards.environment(spec, place, attempt, {})[presence.COLLECTIVE_TIMEOUT] == "5"
    waits = []
    monkeypatch.setattr(joining, "_join", lambda _, seconds: waits.append(seconds))
    monkeypatch.setattr(joining.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(joining.dist, "get_world_size", lambda: 1)
    monkeypatch.delenv("RANK", raising=False)
    for variable, configured in (("", 0), ("90000", 0), ("90000", 7)):
        monkeypatch.setenv(presence.COLLECTIVE_TIMEOUT, variable)
        joining.start(RuntimeConfig(device="cpu", threads=1, collective_timeout_seconds=configured))
    assert waits == [0, 90000, 7]


@pytest.mark.parametrize(
    ("ends", "to_blame"),
    [
        ([(130, "interrupted", ""), (2, "mistake", "No space left on device")], 1),
        ([(143, "ended", "the launcher was asked twice to stop"), (1, "exception", "Connection closed by peer")], None),
        ([(130, "interrupted", ""), (1, "exception", "Connection closed by peer")], None),
        ([(1, "exception", "Connection closed by peer"), (1, "exception", "Broken pipe")], 0),
        ([(143, "signal", "killed by SIGTERM"), (130, "ended", "no launcher")], None),
        ([(0, "done", ""), (137, "signal", "killed by SIGKILL")], 1),
    ],
)
def test_who_failed_to_save(attempt, ends, to_blame):
    for rank, (code, kind, error) in enumerate(ends):
        attempt.write_end(rank, End(code, kind, error, float(rank)))
    seen = Watch(attempt, make_spec(), Limits(10), 0.0)
    seen.look(1.0)
    trouble = supervise._unsaved(seen)
    assert (trouble and trouble.rank) == to_blame


# ---------------------------------------------------------------- guards and signals


def test_a_rank_is_asked_once(attempt, monkeypatch):
    guard, sent = guards.Guard(attempt, make_spec(), guards.Place(0, 0, 2, "n1")), []
    monkeypatch.setattr(guard, "_child", object())
    monkeypatch.setattr(guard, "_send", sent.append)
    guard._pass_on()
    guard._pass_on()
    assert sent == [signal.SIGTERM, signal.SIGCONT]


def test_a_parent_is_the_transport_only_if_it_says_so(attempt):
    guard = guards.Guard(attempt, make_spec(), guards.Place(0, 0, 2, "n1"))
    assert guard._describe(os.getpid())["parent"] is None
    code = (
        "import os, sys; from engine_fast.distributed.launch import rank; from engine_fast.distributed.launch.attempt "
        "import Attempt; a = Attempt.of_token(sys.argv[1]); p = rank.Place(0, 0, 2, 'n1')\n"
        "if os.fork() == 0: os._exit(0 if rank.Guard(a, a.spec(), p)._describe(1)['parent'] else 9)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code, attempt.token], check=False).returncode == 0
    assert processes.command_line(2**22 + 1) == ""


def test_the_host_of_a_rank_is_the_planned_one_also_inside_an_allocation():
    around = {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "SLURMD_NODENAME": "gpu7"}
    assert guards.find_place(make_spec(launcher="torchrun"), around).host == "n2"


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals = Signals()
        with signals.caught():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals() == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals() == 1
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_many_ranks_beat_less_often():
    seconds = [make_spec(hosts=(Host("n1", count),)).beat_seconds for count in (1, 64, 128, 512)]
    assert seconds == [1.0, 1.0, 2.0, 5.0]


# ---------------------------------------------------------------- transports


def test_pdsh_leaves_out_a_common_domain(tmp_path):
    spec = make_spec(hosts=(Host("n1.lan", 2), Host("n2.lan", 1)))
    made = Attempt.begin(tmp_path, 0)
    made.describe(spec, {})
    seen = Watch(made, spec, Limits(10), 0.0)
    assert seen.unreached("pdsh@me: n2: ssh exited with exit code 255\n").rank == 2
    assert seen.unreached("pdsh@me: n2.lan: ssh exited with exit code 255\n").rank == 2
    assert seen.unreached("pdsh@me: n3: ssh exited with exit code 255\n") is None


def test_srun_binds_no_gpus_to_tasks():
    spec = make_spec(launcher="slurm", hosts=(Host("g1", 4),))
    around = {"SLURM_GPUS_PER_TASK": "1", "SLURM_GPU_BIND": "single:1", "SLURM_GPUS_ON_NODE": "4"}
    start = commands.start_command(spec, Attempt(Path("/x/attempt-000")), around)
    ask = commands.remote_command("slurm", "g1", ["true"], around, {})
    for command in (start, ask):
        assert "--gpu-bind=none" in command.argv
        assert command.environment == {"SLURM_GPUS_ON_NODE": "4"}
    assert ask.argv[-1] == "true"


@pytest.mark.parametrize(
    ("gpus", "ranks", "anywhere", "says"),
    [(0, 2, False, ""), (2, 2, True, ""), (4, 2, True, ""), (1, 2, False, "has 1 GPUs for 2"), (0, 2, True, "has 0")],
)
def test_a_rank_needs_a_gpu_where_there_are_any(gpus, ranks, anywhere, says):
    found = preflight.short_of_gpus(gpus, ranks, anywhere=anywhere)
    assert found.startswith(says)
    assert bool(found) == bool(says)
