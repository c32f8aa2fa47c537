"""The pieces by themselves: records, the shared memory, who is reaped and who is not, when a rank counts as hung."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine_fast.distributed import presence
from engine_fast.distributed.launch import attempt as records
from engine_fast.distributed.launch import preflight, probe, processes
from engine_fast.distributed.launch.attempt import ASKED, Attempt, End, Spec, next_number
from engine_fast.distributed.launch.hostfile import Host
from engine_fast.distributed.launch.rank import find_place, mark_of
from engine_fast.distributed.launch.reap import reap
from engine_fast.distributed.launch.watch import Limits, Watch, first_failure
from engine_fast.errors import ConfigError


def make_spec(**changes):
    given = {
        "id": "0123", "number": 0, "mode": "hosts", "launcher": "pdsh", "hosts": (Host("n1", 2), Host("n2", 1)),
        "python": sys.executable, "cwd": "/", "program": ("true",), "arguments": ("a b",), "master_addr": "n1",
        "master_port": 29500, "grace_seconds": 60.0, "lost_seconds": 20.0, "launcher_pid": 1, "launcher_host": "me",
        "started": 0.0,
    }  # fmt: skip
    return Spec(**{**given, **changes})


@pytest.fixture
def attempt(tmp_path):
    made = Attempt.begin(tmp_path, next_number(tmp_path))
    made.describe(make_spec(), {"n1": {"A": "1"}})
    return made


# ---------------------------------------------------------------- records


def test_an_attempt_reads_back_what_it_holds(attempt, tmp_path):
    assert attempt.spec() == make_spec()
    assert attempt.environment("n1") == {"A": "1"}
    assert attempt.hostfile.read_text() == "n1 slots=2\nn2 slots=1\n"
    assert Attempt.of_token(attempt.token) == attempt
    assert [make_spec().place(rank) for rank in range(3)] == [
        (Host("n1", 2), 0), (Host("n1", 2), 1), (Host("n2", 1), 0)
    ]  # fmt: skip
    assert make_spec().ranks_of("n1") == [0, 1]
    assert next_number(tmp_path) == 1
    end = End(1, "exception", "ValueError: \u00e4", 5.0, "Traceback", "update 3")
    attempt.write_end(2, end)
    assert attempt.read_end(2) == end
    assert attempt.read_end(0) is None


def test_a_full_disk_still_takes_beats_and_ends(attempt, monkeypatch):
    size = attempt.rank_path(0, "beat").stat().st_size
    attempt.beat(0, {"count": 1, "what": "\u4f60" * 300, "alive": 1, "patient": False, "state": "running"})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "write_json", full)
    attempt.write_end(0, End(2, "mistake", "x" * 5000, 5.0, "y" * 50000, "z" * 900))
    assert attempt.rank_path(0, "beat").stat().st_size == size
    end = attempt.read_end(0)
    assert (end.code, end.kind, len(end.error)) == (2, "mistake", 400)
    watch = Watch(attempt, make_spec(), Limits(10), 0.0)
    watch.look(1.0)
    assert watch.ranks[0].end == end


# ---------------------------------------------------------------- presence


def test_presence_is_nothing_without_a_guard(monkeypatch):
    monkeypatch.setattr(presence, "_board", None)
    monkeypatch.setenv(presence.VARIABLE, "0:1:2")  # another file than the one that is meant
    presence.attach()
    assert not presence.is_watched()
    presence.beat("x")
    with presence.patient("y"):
        presence.explain("mistake", "z")
    presence.finished(0)


def test_presence_through_shared_memory(monkeypatch):
    board, descriptor = presence.Board.create()
    monkeypatch.setattr(presence, "_board", presence.Board(descriptor))
    assert board.progress() == (0, False, "", 0.0)
    presence.beat("update 1 \u00e4")
    assert board.progress()[:3] == (1, False, "update 1 \u00e4")
    assert time.time() - board.progress()[3] < 60
    with presence.patient("waiting"):
        with presence.patient("longer " * 100):
            assert board.progress()[1]
        assert board.progress()[1]
    assert board.progress()[:3] == (5, False, "waiting: over")
    assert board.end() == {}
    presence.explain("exception", "first \x00" * 9000, traceback="t" * 90000)
    presence.explain("mistake", "second")
    presence.finished(1)
    end = board.end()
    assert (end["kind"], end["code"]) == ("exception", 1)
    assert len(end["traceback"]) == 6000
    os.close(descriptor)


# ---------------------------------------------------------------- place and reaping


def test_place_from_each_transport():
    spec = make_spec()
    ours = {"RANK": "2", "LOCAL_RANK": "5", "WORLD_SIZE": "3"}
    assert find_place(spec, ours).local_rank == 0  # DeepSpeed's own number is not believed
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"}
    place = find_place(make_spec(launcher="openmpi"), {**mpi, "RANK": "0"})
    assert (place.rank, place.local_rank, place.local_size, place.host) == (1, 1, 2, "n1")
    slurm = {"SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NTASKS": "3", "SLURMD_NODENAME": "n2"}
    assert find_place(make_spec(launcher="slurm"), slurm).host == "n2"
    with pytest.raises(ConfigError, match="started rank 1 of 2, expected 3 ranks"):
        find_place(spec, {**ours, "RANK": "1", "WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="set no usable RANK"):
        find_place(spec, {})


def sleeper(code="import time; time.sleep(300)", **environment):
    child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **environment}, stdout=subprocess.PIPE)
    limit = time.monotonic() + 20
    while b"sleep" not in Path(f"/proc/{child.pid}/cmdline").read_bytes():
        assert time.monotonic() < limit
    return child


def record(attempt, rank, child, **changes):
    found = processes.process(child.pid)
    tree = {"rank": rank, "pid": found.pid, "start_ticks": found.start_ticks, **changes}
    records.write_json(attempt.rank_path(rank, "json"), tree)


def test_reap_ends_this_hosts_ranks_and_no_others(attempt):
    deaf = "import signal; signal.signal(15, signal.SIG_IGN); print(1, flush=True); import time; time.sleep(300)"
    parent = "import subprocess as s, time; print(s.Popen(['sleep', '301']).pid, flush=True); time.sleep(300)"
    ours = sleeper(parent)
    below = int(ours.stdout.readline())
    stopped = sleeper(deaf)
    stopped.stdout.readline()
    os.kill(stopped.pid, signal.SIGSTOP)
    name, value = mark_of(make_spec(), "n1")
    orphan = sleeper(**{name: value})
    foreign = [
        sleeper(),  # has the number of a rank, but started at another time
        sleeper(**{name: mark_of(make_spec(), "n2")[1]}),
        sleeper(**{name: f"{value}x"}),
        sleeper(),  # a rank on another host
    ]
    try:
        record(attempt, 0, ours, guard={"pid": foreign[0].pid, "start_ticks": 1})
        record(attempt, 1, stopped)
        record(attempt, 2, foreign[3])
        found = reap(attempt, "n1")
        assert found["left"] == []
        assert found["found"] == 4
        assert found["killed"] == [stopped.pid]
        for child, number in ((ours, signal.SIGTERM), (stopped, signal.SIGKILL), (orphan, signal.SIGTERM)):
            assert child.wait(10) == -number
        assert processes.process(below) is None or not processes.process(below).is_alive()
        assert [child.poll() for child in foreign] == [None] * 4
        assert reap(attempt, "n1") == {"found": 0, "killed": [], "left": []}
    finally:
        for child in (ours, stopped, orphan, *foreign):
            child.kill()
            child.wait()


def test_a_process_is_a_number_and_a_start(tmp_path):
    program = tmp_path / "odd ) R (name"
    program.symlink_to(Path("/bin/sleep").resolve())
    child = subprocess.Popen([str(program), "300"], start_new_session=True)
    try:
        found = processes.process(child.pid)
        assert found.is_alive()
        assert processes.of_session(child.pid) == [found]
        assert found in processes.descendants([os.getpid()])
        assert not processes.Process(child.pid, found.start_ticks + 1).is_alive()
        child.kill()
        while found.is_alive():  # a zombie by now, not waited for
            time.sleep(0.01)
        assert processes.process(child.pid) == found
    finally:
        child.kill()
        child.wait()
    assert processes.process(child.pid) is None


def test_a_helper_that_hangs_is_given_up_with_its_children():
    import threading

    line = "sleep 300 & echo $!; wait"
    started = time.monotonic()
    code, said, _ = processes.run(
        ["sh", "-c", line], environment=os.environ, cwd="/", timeout=1.0, given_up=threading.Event()
    )
    assert code == -1
    assert time.monotonic() - started < 60
    left = processes.process(int(said))
    assert left is None or not left.is_alive()


# ---------------------------------------------------------------- watching


class Ranks:
    """Writes what guards would."""

    def __init__(self, attempt):
        self.attempt, self.alive, self.since = attempt, 0, {}
        self.watch = Watch(attempt, make_spec(), Limits(hang=10, start=50, contact=5, stopped=2, alone=100), 0.0)
        for rank in range(3):
            records.write_json(attempt.rank_path(rank, "json"), {"rank": rank})

    def at(self, now, *counts, patient=(), states=None):
        self.alive += 1
        for rank, count in enumerate(counts):
            if self.since.get(rank, (None, 0))[0] != count:
                self.since[rank] = count, now
            if count is not None:
                self.attempt.beat(
                    rank,
                    {
                        "count": count, "what": f"step {count}", "alive": self.alive, "patient": rank in patient,
                        "state": (states or {}).get(rank, "running"), "since": self.since[rank][1],
                    },
                )  # fmt: skip
        self.watch.look(now)
        return self.watch.trouble(now)


def test_the_first_to_stand_still_is_the_one_that_hangs(attempt):
    ranks = Ranks(attempt)
    assert ranks.at(1, 5, 5, 5) is None
    assert ranks.at(2, 7, 5, 6) is None
    assert ranks.at(4, 8, 5, 6) is None
    for now in range(5, 14):
        assert ranks.at(now, 8, 5, 6) is None, now
    trouble = ranks.at(14.5, 8, 5, 6)
    assert (trouble.rank, trouble.kind, trouble.dump) == (1, "hung", True)
    assert trouble.why == "no progress for 14 s at: step 5"


def test_patient_ranks_and_those_that_start_do_not_hang(attempt):
    ranks = Ranks(attempt)
    for now in range(0, 49, 4):
        assert ranks.at(now, 5, 5, 0, patient=(0, 1)) is None
    trouble = ranks.at(51, 5, 5, 0, patient=(0, 1))
    assert (trouble.rank, trouble.kind) == (2, "hung")
    assert "while it was starting" in trouble.why


def test_one_that_stands_alone_hangs_later(attempt):
    ranks = Ranks(attempt)
    for now in range(0, 101, 4):
        assert ranks.at(now, 5, now + 1, now + 1) is None
    assert ranks.at(102, 5, 200, 200).rank == 0


def test_silent_and_stopped_ranks(attempt):
    ranks = Ranks(attempt)
    assert ranks.at(1, 1, 1, 1) is None
    assert ranks.at(3, 2, None, 2, states={2: "stopped"}) is None
    assert ranks.at(4, 3, None, 3, states={2: "stopped"}) is None
    trouble = ranks.at(5.5, 4, None, 3, states={2: "stopped"})
    assert (trouble.rank, trouble.kind) == (2, "stopped")
    trouble = ranks.at(7, 5, None, 3)
    assert (trouble.rank, trouble.kind) == (1, "lost")


def test_nobody_is_blamed_for_a_pause_of_the_launcher(attempt):
    ranks = Ranks(attempt)
    assert ranks.at(1, 1, 1, 1) is None
    ranks.watch.look(200)
    assert ranks.watch.trouble(200) is None
    ranks.watch.look(204)
    assert ranks.watch.trouble(204) is None
    for now in (205, 206):
        ranks.watch.look(now)
    assert ranks.watch.trouble(206).kind == "lost"


def test_pdsh_tells_of_a_host_that_it_cannot_reach(attempt):
    watch = Watch(attempt, make_spec(), Limits(10), 0.0)
    watch.look(0.0)
    log = "n2: ssh: connect to host n2 port 22: No route to host\npdsh@me: n2: ssh exited with exit code 255\n"
    trouble = watch.unreached(log)
    assert (trouble.rank, trouble.kind) == (2, "never started")
    assert watch.unreached("pdsh@me: n3: ssh exited with exit code 255\n") is None


@pytest.mark.parametrize(
    ("ends", "first"),
    [
        ({0: ("exception", "RuntimeError: Connection closed by peer", 1), 1: ("signal", "killed by SIGKILL", 2)}, 1),
        ({0: ("signal", "killed by SIGTERM", 1), 1: ("exit", "it exited with 7", 2)}, 1),
        ({0: ("ended", "", 1), 1: ("interrupted", "", 2)}, 1),
        ({0: ("interrupted", f"{ASKED}rank 1 was asked to stop", 1), 1: ("interrupted", "by SIGTERM", 2)}, 1),
        ({0: ("interrupted", "stopped by a signal to another rank", 1), 1: ("interrupted", "by SIGTERM", 2)}, 1),
        ({0: ("mistake", "a", 3), 1: ("mistake", "b", 2)}, 1),
        ({0: ("exception", "gloo: timed out", 1), 1: ("stopped", "", 5)}, 1),
    ],
)
def test_the_cause_is_told_from_its_echo(ends, first):
    assert first_failure({rank: End(1, kind, error, when) for rank, (kind, error, when) in ends.items()}) == first


# ---------------------------------------------------------------- preflight


def answering(tmp_path, changes):
    """Hosts that answer as this one does, with changes; a string is what ssh says instead."""

    def ask(host, argv):
        given = changes.get(host, {})
        if isinstance(given, str):
            return 255, "", given
        answer = {**probe.examine(probe.unpack(argv[-1])), "gpus": 0}
        versions = {**answer["versions"], **given.pop("versions", {})}
        return 0, f"motd\n{probe.MARK}{json.dumps({**answer, 'versions': versions, **given})}\n", ""

    hosts = [Host("n1", 2), *(Host(name, 1) for name in changes if name != "n1")]
    return preflight.check_hosts(
        hosts, tmp_path, ask=ask, python=sys.executable, cwd=str(tmp_path), master="", port=0
    )  # fmt: skip


def test_preflight_names_each_host_and_what_to_do(tmp_path):
    report = answering(
        tmp_path,
        {
            "nonce": {"nonce": ""}, "ro": {"writable": False}, "full": {"free_bytes": 10}, "cwd": {"cwd": False},
            "torch": {"versions": {"torch": "1.0"}}, "kernels": {"versions": {"kernels": "none?"}},
            "clock": {"time": time.time() + 100}, "key": "root@key: Permission denied (publickey).",
            "down": "ssh: connect to host down port 22: Connection refused",
            "name": "ssh: Could not resolve hostname x",
            "python": "pdsh@me: python: ssh exited with exit code 127\nsh: 1: /py: not found", "good": {},
        },
    )  # fmt: skip
    assert [host.name for host in report.hosts] == ["n1", "good"]
    says = {
        "nonce": "does not see the files in", "ro": "cannot write into", "full": "MB free", "cwd": "has no directory",
        "torch": "differs: torch 1.0 (here", "kernels": "kernels none?", "clock": "its clock is 100 s off",
        "key": "copy your public key", "down": "Start sshd there", "name": "Correct the name",
        "python": "sh: 1: /py: not found. Python must stand at the same path",
    }  # fmt: skip
    assert report.failures.keys() == says.keys()
    for host, text in says.items():
        assert text in report.failures[host], report.failures[host]
    assert preflight.describe(report.failures, 13).count("\n") == len(says)
    assert not list(tmp_path.iterdir())


def test_preflight_finds_an_address_that_all_others_know(tmp_path):
    known = answering(tmp_path, {"n1": {"resolves": ["127.0.1.1"]}, "n2": {"resolves": ["10.0.0.1"]}})
    assert (known.master_addr, known.failures) == ("n1", {})
    assert known.port > 0
    unknown = answering(
        tmp_path, {"n1": {"resolves": ["127.0.1.1"], "addresses": ["10.0.0.1"]}, "n2": {"resolves": []}}
    )
    assert unknown.master_addr == "10.0.0.1"
    none = answering(tmp_path, {"n1": {"addresses": []}, "n2": {"resolves": []}})
    assert "Give --master" in none.failures["n1"]
    mixed = answering(tmp_path, {"n1": {"gpus": 2}, "n2": {}})
    assert mixed.failures.keys() == {"n2"}
    assert "has 0 GPUs for 1 ranks" in mixed.failures["n2"]
    busy = answering(tmp_path, {"n1": {"port_free": False}, "n2": {}})
    assert "is in use" in busy.failures["n1"]
    assert [host.name for host in busy.hosts] == ["n2"]
