"""Start the process group, also for one process without a launcher, and the few collectives the trainer needs."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from engine_fast.config import RuntimeConfig
from engine_fast.distributed.presence import COLLECTIVE_TIMEOUT, beat
from engine_fast.errors import ConfigError, EngineFastError, PeerError

T = TypeVar("T")
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class World:
    """This process among its peers. With one process every collective returns at once."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """Maximum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one."""
        if self.size == 1:
            return flag
        return bool(self.all_reduce_sum(torch.tensor(float(flag), device=self.device)).item())

    def broadcast(self, value: T) -> T:
        """Rank 0's picklable value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def on_main(self, action: Callable[[], T]) -> T:
        """Rank 0's result on every rank. If it raises, so do they all: the same EngineFastError, or a PeerError
        with the text of another exception."""
        outcome: tuple[T | None, EngineFastError | None] = (None, None)
        own: Exception | None = None
        if self.is_main:
            try:
                outcome = action(), None
            except Exception as error:
                if self.size == 1:
                    raise
                own = error
                outcome = None, error if isinstance(error, EngineFastError) else _elsewhere(0, _describe(error))
        value, failure = self.broadcast(outcome)
        if own is not None:
            raise own
        if failure is not None:
            raise failure
        return cast(T, value)

    def gather(self, value: T) -> list[T]:
        """Every rank's picklable value, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that every rank runs, with no collective inside: what one raises, all raise when it ends.

        A rank that failed raises its own exception, the others a PeerError with the first failure's text.
        """
        try:
            yield
        except Exception as error:
            self.gather(_describe(error))
            raise
        for rank, failure in enumerate(self.gather("")):
            if failure:
                raise _elsewhere(rank, failure)


def start(config: RuntimeConfig) -> World:
    """Join the process group that the launcher describes, or make one of a single process.

    Understands the environment of `deepspeed`, torchrun and of nothing at all. Safe to call again.
    Raises ConfigError: cuda asked for but absent, or an incomplete launcher environment.
    """
    device = _device(config)
    missing = ", ".join(name for name in _LAUNCHER if name not in os.environ)
    if missing and "RANK" in os.environ:
        raise ConfigError(
            f"the launcher set RANK but not {missing}. Start with `deepspeed` or torchrun, or with neither."
        )
    _set_threads(config)
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read once, when deepspeed is imported
    else:
        torch.cuda.set_device(device)
    beat("meeting the other ranks")
    given = os.environ.get(COLLECTIVE_TIMEOUT, "")
    _join(device, config.collective_timeout_seconds or (int(given) if given.isdecimal() else 0))
    beat("met the other ranks")
    return World(dist.get_rank(), dist.get_world_size(), device)


def leave(code: int) -> None:
    """End a process that a launcher started, now, with this exit code; return in one that nobody launched.

    Gloo's threads can outlive the interpreter, and then a rank whose work is done aborts on its way out: seen about
    once in thirty starts of two ranks ("terminate called without an active exception").
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _describe(error: Exception) -> str:
    """One line for the other ranks; never empty."""
    return str(error) if isinstance(error, EngineFastError) else f"{type(error).__name__}: {error}"


def _elsewhere(rank: int, failure: str) -> PeerError:
    return PeerError(f"rank {rank} failed, and the others stop with it: {failure}")


def _device(config: RuntimeConfig) -> torch.device:
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "runtime.device = 'cuda', but this torch sees no GPU. Use auto or cpu, or see `engine-fast doctor`."
        )
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise ConfigError(
            f"LOCAL_RANK = {local}, but this process sees {count} GPUs. Start one process a GPU, and let each see all "
            "GPUs of its host (SLURM: --gpus-per-node, not --gpus-per-task)."
        )
    return torch.device("cuda", local)


def _set_threads(config: RuntimeConfig) -> None:
    if config.threads:
        torch.set_num_threads(config.threads)
    elif "OMP_NUM_THREADS" not in os.environ and not dist.is_initialized():  # once: it divides what there is
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        if local > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // local))


def _join(device: torch.device, timeout_seconds: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed

    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed"
    )  # at each of its collectives
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # The shared-memory all-reduce would be compiled now, for two minutes, without a word.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        # No port to agree on, and no RANK in the environment for child processes to find.
        os.environ["LOCAL_RANK"] = "0"
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        atexit.register(dist.destroy_process_group)
    limits = {"timeout": timedelta(seconds=timeout_seconds)} if timeout_seconds else {}
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, **limits)
