"""Run a sweep: what its trials share, then the trials, here or in worker processes, then its table.

Each worker is a process by itself, also under a launcher: a trial is trained by one process, whatever the ranks, and
DeepSpeed's groups are those of its whole process. `python -m engine_fast.recipes.trials OUT` is a worker; it reads the
configuration from standard input, works on trials until none is left, and says what it does on standard output.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from engine_fast.config import RunConfig, parse_config
from engine_fast.distributed import World, start
from engine_fast.distributed.presence import patient
from engine_fast.recipes.execute import Say, run_graph
from engine_fast.recipes.sweep import Sweep, TrialGraph, await_others, forget_failures, require_all, work
from engine_fast.recipes.tables import sweep_stage, upstream_of

_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that would make a worker one rank of the launched ones."""
_PR_SET_PDEATHSIG = 1


def run_sweep(config: RunConfig, out: Path, *, world: World, say: Say) -> None:
    """Bring every trial under `out` to its end, and make the table. Every rank of `world` must call it.

    Raises SweepError when trials failed, KeyboardInterrupt when asked to stop, with the state saved.
    """
    sweep = Sweep(config, out, world=world, say=say)
    run_graph(sweep.common, out, world=world, say=say)
    graphs = sweep.graphs()
    left = world.on_main(partial(_begin, graphs, say))
    if left:
        processes = _processes(config, left, world)
        if processes == 1 and world.size == 1:
            work(graphs, world=world, say=say)
        else:
            with world.together():
                run_workers(config, out, processes, world=world, say=say)
                if world.size > 1:  # on the file system: a collective would time out, should a worker have ended early
                    await_others(graphs)
    done = world.on_main(partial(require_all, graphs, out))
    table = sweep_stage(config, out, [(graph.trial, graph.places) for graph in graphs])
    run_graph([table], out, world=world, say=say, known={upstream_of(label): found for label, found in done.items()})


def run_workers(config: RunConfig, out: Path, count: int, *, world: World, say: Say) -> None:
    """Start `count` workers of this rank and wait until they have ended. Raises KeyboardInterrupt, when they have saved
    their state."""
    tree = json.dumps(config.model_dump(mode="json", exclude_unset=True))
    logs = out / "trials"
    logs.mkdir(parents=True, exist_ok=True)
    workers, listeners = [], []
    for number in range(count):
        name = f"worker-{world.rank * count + number}"
        with (logs / f"{name}.log").open("ab") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "engine_fast.recipes.trials", str(out)], env=_environment(config, count, world),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for this process, which passes it on
            )  # fmt: skip
        assert worker.stdin is not None
        worker.stdin.write(tree)
        worker.stdin.close()
        workers.append(worker)
        listeners.append(threading.Thread(target=_listen, args=(worker, say), daemon=True))
        listeners[-1].start()
    with patient("trials in worker processes"):
        _wait(workers)
    for listener in listeners:
        listener.join()
    for number, worker in enumerate(workers):
        if code := worker.returncode:  # the others may have done its part: what is missing is told afterwards
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            say(f"sweep: worker {world.rank * count + number} {how}; its log is in {logs}")


def _begin(graphs: Sequence[TrialGraph], say: Say) -> int:
    """Number of trials that are not done."""
    left = sum(graph.outputs_hash() is None for graph in graphs)
    forget_failures(graphs)
    say(f"sweep: {len(graphs)} trials" + (f", {len(graphs) - left} of them done before" if left < len(graphs) else ""))
    return left


def _processes(config: RunConfig, left: int, world: World) -> int:
    """Workers of this rank."""
    assert config.sweep is not None
    if world.size > 1:
        return 1
    by_default = 1 if world.device.type == "cuda" else len(os.sched_getaffinity(0))
    return min(config.sweep.processes or by_default, left)


def _environment(config: RunConfig, count: int, world: World) -> Mapping[str, str]:
    variables = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
    if world.device.type == "cuda" and world.size > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        local = world.device.index or 0
        variables["CUDA_VISIBLE_DEVICES"] = visible[local] if visible != [""] else str(local)
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if not config.runtime.threads:
        threads = max(1, len(os.sched_getaffinity(0)) // (count * local_ranks))
        variables.setdefault("OMP_NUM_THREADS", str(threads))
    return variables


def _wait(workers: Sequence[subprocess.Popen[str]]) -> None:
    interrupted: KeyboardInterrupt | None = None
    while any(worker.poll() is None for worker in workers):
        try:
            for worker in workers:
                worker.wait()
        except KeyboardInterrupt as error:
            if interrupted is not None:  # asked twice
                for worker in workers:
                    worker.kill()
            interrupted = error
            for worker in workers:
                worker.send_signal(signal.SIGTERM)
    if interrupted is not None:
        raise KeyboardInterrupt("interrupted. What is finished is kept; the same command continues.") from interrupted


def _listen(worker: subprocess.Popen[str], say: Say) -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        say(line.rstrip("\n"))


def main() -> None:
    """A worker: python -m engine_fast.recipes.trials OUT < configuration as JSON."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)  # none goes on without who waits for it
    out = Path(sys.argv[1])
    config = parse_config(json.loads(sys.stdin.read()))

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        world = start(config.runtime)
        work(Sweep(config, out, world=world, say=say).graphs(), world=world, say=say)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
