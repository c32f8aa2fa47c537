"""A launcher over the fake transport, as a process of its own: `fake_launch.py OUT WHAT [name=value...]`.

With node=I it is the launcher of one of two nodes, which has one rank.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from engine_fast.distributed.launch.attempt import Attempt, Spec
from engine_fast.distributed.launch.commands import Command
from engine_fast.distributed.launch.follow import Follower
from engine_fast.distributed.launch.launcher import Launch
from engine_fast.distributed.launch.plan import Flags, make_plan
from engine_fast.distributed.launch.watch import Limits

HERE = Path(__file__).parent


def main() -> int:
    out, what, *rest = sys.argv[1:]
    given = dict(item.split("=", 1) for item in rest)
    node = int(given["node"]) if "node" in given else None
    where = {"ranks": 2} if node is None else {"ranks": 1, "nodes": 2, "node_rank": node, "master": given["master"]}
    flags = Flags(
        out=Path(out), arguments=(out, what), **where, grace_seconds=float(given.get("grace", 4)),
        backoff=float(given.get("backoff", 0.2)), max_restarts=int(given.get("restarts", 0)),
    )  # fmt: skip

    def start(spec: Spec, attempt: Attempt) -> Command:
        ranks = ["0"] if what == "absent" else ["0", "1"] if node is None else [str(node)]
        argv = (sys.executable, str(HERE / "fake_transport.py"), attempt.token, "2", *ranks)
        return Command(argv, dict(os.environ), spec.cwd)

    launch = Launch(
        make_plan(flags), lambda text: print(f"launch: {text}", file=sys.stderr, flush=True), dict(os.environ),
        program=(sys.executable, str(HERE / "fake_rank.py")), start=start,
        limits=Limits(**{name: float(given.get(name, 60)) for name in ("hang", "start", "contact", "stopped")}),
        lost_seconds=float(given.get("lost", 4)),
    )  # fmt: skip
    Path(out).mkdir(parents=True, exist_ok=True)
    return Follower(launch).run() if node else launch.run()


if __name__ == "__main__":
    sys.exit(main())
