"""PID 1 of a node: mounts what it is told to, reaps what is orphaned, and ends when its standard input closes.

    python init.py HOSTNAME [SOURCE=TARGET]...          bind mounts of SOURCE over TARGET

The kernel kills every process of a PID namespace with its first one, and removes a network namespace with its last
process. So a node is gone with the test run that holds the other end of the pipe, however that run ends.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time


def _end_with_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


def main() -> None:
    hostname, *binds = sys.argv[1:]
    socket.sethostname(hostname)
    commands = [["mount", "-t", "proc", "proc", "/proc"], ["mount", "-t", "tmpfs", "tmpfs", "/run"]]
    commands += [["mount", "--bind", *bind.split("=")] for bind in binds]
    commands += [["ip", "link", "set", "lo", "up"]]
    for command in commands:
        subprocess.run(command, check=True)
    os.mkdir("/run/sshd")
    print("ready", flush=True)
    threading.Thread(target=_end_with_input, daemon=True).start()
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            time.sleep(0.05)


if __name__ == "__main__":
    main()
