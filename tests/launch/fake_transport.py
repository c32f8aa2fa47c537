"""Starts guards as a transport does, on this host: `fake_transport.py TOKEN RANK...`; its exit code says nothing."""

from __future__ import annotations

import os
import subprocess
import sys


def main() -> None:
    token, world_size, *ranks = sys.argv[1:]
    guards = []
    for rank in ranks:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
        command = [sys.executable, "-m", "engine_fast.distributed.launch.rank", token]
        guards.append(subprocess.Popen(command, env={**os.environ, **place}, start_new_session=True))
    for guard in guards:
        guard.wait()


if __name__ == "__main__":
    main()
