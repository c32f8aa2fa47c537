"""A rank that trains nothing: `fake_rank.py DIRECTORY WHAT`. Rank 1 misbehaves as told, the others work on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from engine_fast.distributed import presence

DIRECTORY, WHAT = Path(sys.argv[1]), sys.argv[2]
RANK = int(os.environ["RANK"])


def work(seconds: float) -> None:
    limit = time.monotonic() + seconds
    count = 0
    while time.monotonic() < limit:
        count += 1
        presence.beat(f"update {count}")
        time.sleep(0.02)


def misbehave() -> None:
    if WHAT == "exit7":
        os._exit(7)
    if WHAT == "exception":
        raise ValueError("a shape is wrong")
    if WHAT == "mistake":
        presence.explain("mistake", "engine.o2 = 'STX', expected one of SX, STL")
        sys.exit(2)
    if WHAT == "kill":
        subprocess.Popen(["sleep", "300"])  # a child, which must not outlive it
        os.kill(os.getpid(), signal.SIGKILL)
    if WHAT == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if WHAT == "silent":
        os._exit(0)
    if WHAT == "hang":
        presence.beat("the step that hangs")
        time.sleep(300)
    if WHAT == "lost":
        os.kill(os.getppid(), signal.SIGSTOP)
        time.sleep(300)
    if WHAT == "signalled":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def body() -> None:
    work(0.3)
    once = DIRECTORY / "failed-once"
    if (
        WHAT == "done"
        or (WHAT == "deserted" and (DIRECTORY / "deserted").exists())
        or (WHAT == "once" and once.exists())
    ):
        return
    if WHAT == "once" and RANK == 1:
        once.touch()
        os._exit(7)
    if WHAT == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if RANK == 1:
        misbehave()
    if WHAT == "hang":
        work(0.5)  # as far as it comes without rank 1
        time.sleep(300)
    work(300)


def main() -> None:
    print(f"rank {RANK} of {os.environ['WORLD_SIZE']} begins", flush=True)
    presence.attach()
    try:
        body()
        code = 0
    except KeyboardInterrupt:
        if WHAT == "deserted":
            (DIRECTORY / "deserted").touch()
        code = 130
        if WHAT == "unsaved" and RANK == 1:
            presence.explain("mistake", "runs/x: No space left on device")
            code = 2
        presence.explain("interrupted", "stopped, state saved")
    except SystemExit as ended:
        code = int(ended.code or 0)
    except Exception as error:
        traceback.print_exc()
        presence.explain("exception", f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        code = 1
    presence.finished(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
