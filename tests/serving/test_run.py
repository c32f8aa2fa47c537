"""`engine-fast serve` as a process: its address, how it ends, what it says when it cannot start."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine_fast.cli.main import app
from engine_fast.errors import ConfigError
from engine_fast.inference.serving.run import address, bind
from tests.decoding.tiny import make_student, make_teacher, save_tiny

SENTENCES = ["mon tue wed", "", "sun"]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "student", make_student())


@contextmanager
def serving(*arguments: str | Path, before: str = "") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process and its address; `before` is run in it first."""
    code = f"{before}\nfrom engine_fast.cli.main import main; main()"
    command = [sys.executable, "-c", code, "serve", *map(str, arguments), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("serving at http://127.0.0.1:"), process.stderr.read()
            yield process, line.split()[-1]
        finally:
            process.kill()


def metrics(url: str) -> str:
    return urllib.request.urlopen(f"{url}/metrics", timeout=60).read().decode()


def ask(url: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"{url}/translate", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_it_answers_what_it_accepted_and_ends_without_a_complaint(student: Path, number: signal.Signals) -> None:
    # A batch takes a while, so that the signal comes while requests wait and run.
    slow = (
        "import time\nfrom engine_fast.inference.serving.systems import System\nrun = System.run\n"
        "System.run = lambda *args: (time.sleep(0.2), run(*args))[1]"
    )
    with serving("--model", student, "--batch-tokens", "3", before=slow) as (process, url):
        health = json.load(urllib.request.urlopen(f"{url}/health", timeout=60))
        assert health["status"] == "ready"
        expected = ask(url, sentences=SENTENCES)["translations"]
        answers: list[Any] = []
        asking = [threading.Thread(target=lambda: answers.append(ask(url, sentences=SENTENCES))) for _ in range(2)]
        for thread in asking:
            thread.start()
        while 'engine_fast_queue_sentences{model="engine"} 5.0' not in metrics(url):  # one runs, five wait
            pass
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as impatient:
            body = json.dumps({"sentences": SENTENCES}).encode()
            head = (
                f"POST /translate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            )
            impatient.sendall(head.encode() + b"\r\n\r\n" + body)
        while 'engine_fast_dropped_requests_total{reason="disconnected"} 1.0' not in metrics(url):
            pass
        process.send_signal(number)
        for thread in asking:
            thread.join(60)
        assert [answer["translations"] for answer in answers] == [expected] * 2
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
        assert process.stdout.read() == ""


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_missing_package_names_the_extra(student: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("engine_fast.inference.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    result = CliRunner().invoke(app, ["serve", "--model", str(student)])
    assert result.exit_code == 2
    assert f"serve needs {package}, which is not installed. Run: pip install engine-fast[serve]" in result.stderr


def test_a_port_in_use_and_a_host_that_is_not_ours_are_told(student: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["serve", "--model", str(student), "--port", str(port)])
    assert result.exit_code == 2
    assert f"--host 127.0.0.1 --port {port}: this address cannot be used" in result.stderr
    for host in ("192.0.2.1", "no such host"):
        with pytest.raises(ConfigError, match="this address cannot be used"):
            bind(host, 0)


def test_addresses_are_links_and_answers_do_not_wait_to_be_acknowledged() -> None:
    with bind("127.0.0.1", 0) as listening:
        assert address(listening) == f"http://127.0.0.1:{listening.getsockname()[1]}"
        with socket.create_connection(listening.getsockname()), listening.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)  # else an answer takes 40 ms longer
    if socket.has_ipv6 and Path("/proc/net/if_inet6").exists():
        with bind("::1", 0) as listening:
            assert address(listening) == f"http://[::1]:{listening.getsockname()[1]}"


def test_models_that_do_not_fit_are_told(student: Path, tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "teacher", make_teacher())
    result = CliRunner().invoke(app, ["serve", "--model", str(teacher), "--teacher", str(teacher)])
    assert (result.exit_code, "is a teacher already" in result.stderr) == (2, True)
    result = CliRunner().invoke(app, ["serve", "--model", str(tmp_path)])
    assert (result.exit_code, "not a model directory" in result.stderr) == (2, True)
    (teacher / "model.safetensors").unlink()
    result = CliRunner().invoke(app, ["serve", "--model", str(student), "--teacher", str(teacher)])
    assert (result.exit_code, "missing or damaged" in result.stderr) == (2, True)
