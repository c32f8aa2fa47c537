"""What preflight wants to know of a host; `python -m engine_fast.distributed.launch.probe TOKEN` prints it."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine_fast import __version__, extension
from engine_fast.errors import BuildError

MARK = "ENGINE_FAST_PROBE "
"""Begins the line; what a login shell prints around it is skipped."""
_PORTS = range(20000, 32768)
"""Below those that the kernel hands out by itself, so that a port found free is still free a moment later."""


def pack(question: Mapping[str, Any]) -> str:
    """A question as a word of letters, digits, - and _."""
    return base64.urlsafe_b64encode(json.dumps(question).encode()).decode().rstrip("=")


def unpack(token: str) -> dict[str, Any]:
    return dict(json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))))


def find_answer(output: str) -> dict[str, Any] | None:
    """The answer among whatever else came."""
    for line in output.splitlines():
        if line.startswith(MARK):
            try:
                return dict(json.loads(line.removeprefix(MARK)))
            except ValueError:
                return None
    return None


def examine(question: Mapping[str, Any]) -> dict[str, Any]:
    """{"versions", "time", "free_bytes", "nonce", "writable", "cwd", "port", "port_free", "resolves", "addresses",
    "gpus"}.

    The question: {"root": run directory of the launcher, "nonce": file in it, "cwd", "port": 0 or a wanted one,
    "master": a name to resolve or ""}.
    """
    root = Path(question["root"])
    port = int(question["port"])
    return {
        "versions": versions(),
        "free_bytes": _free_bytes(root),
        "nonce": _read(root / question["nonce"]),
        "writable": _writable(root),
        "cwd": os.path.isdir(question["cwd"]),
        "port": port or free_port(),
        "port_free": not port or is_free(port),
        "resolves": _resolve(question["master"]),
        "addresses": _addresses(),
        "gpus": gpus_here(),
        "time": time.time(),
    }


def versions() -> dict[str, str]:
    """What must be the same on every host."""
    found = {"python": platform.python_version(), "engine_fast": __version__, "kernels": _kernels()}
    for name in ("torch", "deepspeed"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def free_port() -> int:
    """A port that nobody listens on here."""
    candidates = random.SystemRandom().sample(_PORTS, 200)
    return next(port for port in candidates if is_free(port))


def gpus_here() -> int:
    """How many GPUs CUDA_VISIBLE_DEVICES or nvidia-smi names; asking torch would take seconds and touch them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def is_free(port: int) -> bool:
    """Whether a server could be started on it now."""
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as server:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                server.bind((address, port))
                server.listen(1)
        except OSError as error:
            if family == socket.AF_INET or error.errno in (98, 13):  # in use, not allowed; else: no IPv6 here
                return False
    return True


def _kernels() -> str:
    """A short hash of how the extension was built; "none" without one."""
    try:
        record = json.dumps(extension.build_info(), sort_keys=True)
    except BuildError:
        return "none"
    return hashlib.sha256(record.encode()).hexdigest()[:12]


def _free_bytes(root: Path) -> int:
    try:
        return shutil.disk_usage(root).free
    except OSError:
        return -1


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _writable(root: Path) -> bool:
    mine = root / f".probe-{secrets.token_hex(8)}"
    try:
        mine.touch(exist_ok=False)
        mine.unlink()
    except OSError:
        return False
    return True


def _resolve(name: str) -> list[str]:
    if not name:
        return []
    try:
        return sorted({str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
    except OSError:
        return []


def _addresses() -> list[str]:
    """This host's own, without loopback; DeepSpeed asks the same program."""
    try:
        said = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return said.split()


if __name__ == "__main__":
    print(MARK + json.dumps(examine(unpack(sys.argv[1]))), flush=True)
