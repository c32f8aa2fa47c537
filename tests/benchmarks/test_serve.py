"""The service's benchmark counts what it says it counts."""

from __future__ import annotations

import argparse
import asyncio
import threading
import time
from types import SimpleNamespace

import pytest
import uvicorn
from fastapi import FastAPI, Response

from benchmarks import bench_serve, harness
from engine_fast.inference.serving.run import bind


def test_every_floor_is_measured_and_errors_are_counted():
    """Against a server that fails every tenth request and closes the connection."""
    app, count = FastAPI(), iter(range(10**6))

    @app.post("/translate")
    async def translate(body: dict[str, list[str]]) -> Response:
        number = next(count)
        if number > 40 and number % 10 == 0:
            return Response("{}", 503, {"Connection": "close"})
        await asyncio.sleep(0.001 * len(body["sentences"]))
        return Response('{"translations": [' + ",".join(['"a"'] * len(body["sentences"])) + "]}")

    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    with bind("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        sizes = iter([200.0, 210.0])
        target = SimpleNamespace(port=listening.getsockname()[1], resident_mib=lambda: next(sizes))
        options = argparse.Namespace(clients=5, load=0.5, paced=100, first=150, requests=300, rounds=4)
        found = asyncio.run(bench_serve.measure(target, bench_serve.random_sentences(50), options))
        server.should_exit = True
        thread.join(30)
    figures = found["figures"]
    assert figures.keys() == harness.floors("serve").keys()
    assert 36 <= figures["errors"] <= 40
    assert figures["memory_growth"] == pytest.approx(1.05)
    assert found["paced"]["requests"] == 100
    assert found["saturated"]["requests"] == 300
    assert found["batch_seconds"] >= 0.032
    assert found["single_seconds"] < found["batch_seconds"]
    assert figures["paced_p95_over_batch"] == found["paced"]["p95"] / found["batch_seconds"]
    assert any("errors" in problem for problem in harness.judge(figures, harness.floors("serve")))


@pytest.mark.slow
def test_it_runs(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench_serve", "--smoke"])
    assert bench_serve.main() == 0
    assert '"errors": 0' in capsys.readouterr().out
