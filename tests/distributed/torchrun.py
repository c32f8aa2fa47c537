"""Real ranks: modules started by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def torchrun(size: int, module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments` as `size` ranks on this host, to the end; the repository is importable there."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", module, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
