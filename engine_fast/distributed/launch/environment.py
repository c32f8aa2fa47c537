"""Which environment variables the ranks get, and how: as JSON in a file that only the user can read.

DeepSpeed forwards fewer, in ssh mode only, and pastes their values into a shell command. Here no shell sees a value,
but for three that a Python needs before it can start; those are quoted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from engine_fast.errors import ConfigError

NAMES = frozenset({"PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV"})
PREFIXES = ("CUDA_", "NCCL_", "GLOO_", "OMP_", "MKL_", "ENGINE_FAST_", "DS_", "TORCH_", "HF_")
EARLY = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")
"""Needed to start a Python and to find its packages."""
_THEIR_OWN = frozenset({"CUDA_VISIBLE_DEVICES"})
"""Set on each host by what starts the ranks there."""
_PLACE = frozenset(
    {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK",
     "CROSS_SIZE", "GROUP_RANK", "DS_ENV_FILE", "ENGINE_FAST_ATTEMPT", "ENGINE_FAST_ATTEMPT_ID", "ENGINE_FAST_PRESENCE"}
)  # fmt: skip
"""Say which rank a process is, so they are never carried from one to another."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def forwarded(environ: Mapping[str, str], extra: Iterable[str] = (), *, everywhere: bool) -> dict[str, str]:
    """The part of `environ` that ranks get; `everywhere`: also on other hosts, which choose their own GPUs.

    Raises ConfigError: a name in `extra` that is not a name, not set here, or one that tells ranks apart.
    """
    wanted = set()
    for name in extra:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"--forward {name!r} is not the name of a variable. Give NAME, not NAME=value.")
        if name in _PLACE:
            raise ConfigError(f"--forward {name}: each rank has its own {name}. Leave it out.")
        if name not in environ:
            raise ConfigError(f"--forward {name}: it is not set here. Set it, or leave it out.")
        wanted.add(name)
    return {
        name: value
        for name, value in sorted(environ.items())
        if name in wanted or (_allowed(name) and not (everywhere and name in _THEIR_OWN))
    }


def early(environment: Mapping[str, str]) -> dict[str, str]:
    """The few that a Python needs to start."""
    return {name: environment[name] for name in EARLY if name in environment}


def for_rank(own: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """A rank's environment: this host's, with what was forwarded over it, and its place among the ranks kept."""
    # DeepSpeed's runner puts its own directory on PYTHONPATH, and torchrun sets one thread for all that say nothing.
    kept = {name: value for name, value in own.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    return {**kept, **{name: value for name, value in given.items() if name not in _PLACE}}


def _allowed(name: str) -> bool:
    return name not in _PLACE and (name in NAMES or name.startswith(PREFIXES))
