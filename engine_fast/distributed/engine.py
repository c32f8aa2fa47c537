"""One optimiser update at a time on the DeepSpeed engine, whatever the stage, precision and number of ranks."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from engine_fast.config import OptimConfig, TrainConfig
from engine_fast.distributed import universal
from engine_fast.distributed.master import MasterState
from engine_fast.distributed.quiet import quiet
from engine_fast.distributed.runtime import World
from engine_fast.distributed.settings import deepspeed_config
from engine_fast.errors import CheckpointError, ConfigError

TAG = "deepspeed"
"""Name of DeepSpeed's directory in a snapshot."""
_UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, AssertionError, EOFError, IndexError)
_SETTINGS = ("betas", "eps", "weight_decay")


class Costed(Protocol):
    """What an objective returns: the sum to minimise, and detached float32 sums to report."""

    @property
    def total(self) -> Tensor: ...
    @property
    def stats(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """What became of an update."""

    grad_norm: float
    """Global norm before clipping; not finite if the gradient is not."""
    applied: bool
    """False: a gradient was not finite and the weights are as before. With fp16 the loss scale has been lowered."""


class _Plain(nn.Module):
    """DeepSpeed finds the outputs it must watch in tuples and dictionaries, not in our Loss."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.objective.forward(batch)  # past stage 3's hooks, which cannot look into a Loss either
        return loss.total, loss.stats


class Engine:
    """Gradients are sums over micro-batches and ranks, divided by the global number of target tokens.

    A gradient that is not finite is never applied. `trained` is the part of `objective` that has parameters.
    """

    def __init__(
        self, objective: nn.Module, trained: nn.Module, config: TrainConfig, *, extra: dict[str, Any], world: World
    ) -> None:
        if config.precision == "fp16" and world.device.type == "cpu":
            raise ConfigError("precision = 'fp16', expected bf16 or fp32 on a CPU. Set precision to bf16.")
        self.world, self.trained, self.stage = world, trained, config.effective_zero_stage
        self._objective = objective
        self.num_parameters = sum(parameter.numel() for parameter in trained.parameters())
        # A copy that stays whole: the live weights are sharded (stage 3) or not the ones to be judged (EMA).
        self._shadow = copy.deepcopy(trained) if self.stage == 3 or config.ema_decay else None
        settings = deepspeed_config(config, extra, device=world.device.type)
        parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        import deepspeed

        with quiet():
            try:
                self._engine, *_ = deepspeed.initialize(
                    model=_Plain(objective),
                    model_parameters=parameters,
                    optimizer=_optimizer(parameters, config.optim),
                    config=settings,
                    dist_init_required=False,
                )
            except (AssertionError, ValueError) as error:
                raise ConfigError(f"DeepSpeed refuses the settings: {error} See the deepspeed: section.") from error
        self._dtype = next(trained.parameters()).dtype
        self._norm, self._clip_norm = math.nan, config.optim.clip_norm
        if self.stage == 0:
            if world.size == 1:
                self._engine.enable_backward_allreduce = False  # it would only copy every gradient twice
            self._engine.optimizer.register_step_pre_hook(self._clip)

    def train(self) -> None:
        self._engine.train()

    def eval(self) -> None:
        self._engine.eval()

    def prepare(self, batches: Sequence[Any], *, done: float) -> None:
        """Let the objective do once what it can for all micro-batches of an update; `done`, 0 to 1, of the stage."""
        prepare = getattr(self._objective, "prepare", None)
        if prepare is not None:
            prepare(batches, done=done)

    def backward(self, batch: Any, *, num_target_tokens: int, weight: float = 1.0) -> dict[str, Tensor]:
        """Add the gradients of weight * total / num_target_tokens; returns the objective's sums.

        `num_target_tokens` counts the whole update: every micro-batch of every rank.
        """
        total, stats = self._engine(batch)
        # DeepSpeed averages over ranks, hence the factor.
        self._engine.backward(total * (weight * self.world.size / num_target_tokens), scale_wrt_gas=False)
        return cast(dict[str, Tensor], stats)

    def step(self, lr: float) -> StepResult:
        """Reduce, clip and apply the gradients added since the last step."""
        optimizer = self._engine.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        if self.stage:
            self._norm = float(self._engine.get_global_grad_norm())
        return StepResult(self._norm, math.isfinite(self._norm) and not getattr(optimizer, "overflow", False))

    @property
    def loss_scale(self) -> float:
        """1 but for fp16."""
        return float(getattr(self._engine.optimizer, "cur_scale", 1.0) or 1.0)

    def shards(self) -> list[Tensor]:
        """This rank's float32 master weights. What is written to them shows in the model after its next step."""
        return [tensor.data for tensor in self._master.flat()]

    def weights(self) -> dict[str, Tensor]:
        """Every trained tensor once, whole, float32, on the CPU. Collective: all ranks call it."""
        from deepspeed.utils import safe_get_full_fp32_param

        result = {}
        for name, parameter in self.trained.named_parameters():
            whole = parameter.data if self.stage == 0 else safe_get_full_fp32_param(parameter)
            result[name] = whole.detach().to("cpu", torch.float32, copy=True)
        return result

    @contextmanager
    def showing(self, weights: dict[str, Tensor] | None) -> Iterator[nn.Module]:
        """The trained module in eval mode, whole on every rank, with its own weights or (EMA only) these."""
        if self._shadow is None:
            self.eval()
            try:
                yield self.trained
            finally:
                self.train()
            return
        model = self._shadow.to(self.world.device, self._dtype).eval()
        weights = self.weights() if weights is None else weights
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        yield model

    # ------------------------------------------------------------ checkpoints

    def save(self, directory: Path) -> None:
        """Write DeepSpeed's own files: optimiser state and weights of every rank, for `load`.

        Collective, also where it fails: a rank that could not write raises OSError or RuntimeError after the last of
        DeepSpeed's barriers, in which the others would have waited for it.
        """
        self._master.begin()
        with quiet(), _failing_late(self._engine):
            self._engine.save_checkpoint(str(directory), tag=TAG, client_state=universal.note(), save_latest=False)

    def load(self, directory: Path) -> None:
        """Continue from `save` at this number of ranks, stage and precision. Bit by bit."""
        with self._loading(directory), self._own_settings():
            path, _ = self._engine.load_checkpoint(str(directory), tag=TAG)
            if path is None:
                raise OSError("it holds no DeepSpeed state")

    def convert(self, directory: Path, target: Path, *, stage: int) -> None:
        """Write the universal form of what `save` wrote at `stage`, at any number of ranks. Rank 0 alone calls it."""
        names = [name for name, _ in self._master.parameters()]
        try:
            universal.convert(directory / TAG, target, stage=stage, names=names)
        except _UNREADABLE as error:
            raise CheckpointError(
                f"{directory}: could not be converted for another number of ranks, ZeRO stage or precision "
                f"({_line(error)}). Continue with those that it was written with."
            ) from error

    def load_universal(self, directory: Path) -> None:
        """Continue from `convert`: the master weights and Adam's state are those that were saved, bit by bit."""
        with self._loading(directory):
            universal.load(directory, self._master)

    def put_weights(self, weights: dict[str, Tensor]) -> None:
        """The opposite of `weights`, into the master weights alone: `load` or `load_universal` must follow."""
        for name, parameter in self.trained.named_parameters():
            self._master.put(parameter, "fp32", weights[name])

    @property
    def _master(self) -> MasterState:
        return MasterState(self._engine, self.stage)

    @contextmanager
    def _loading(self, directory: Path) -> Iterator[None]:
        """Every rank raises the same CheckpointError if one cannot read what is there."""
        failure = ""
        try:
            with quiet():
                yield
        except _UNREADABLE as error:
            failure = _line(error)
        if failures := [text for text in self.world.gather(failure) if text]:
            raise CheckpointError(f"{directory}: cannot be loaded ({failures[0]}). Remove it to use the one before.")

    @contextmanager
    def _own_settings(self) -> Iterator[None]:
        """A checkpoint brings its run's betas, eps, weight decay and clipping along; ours hold."""
        optimizer = self._engine.optimizer
        ours = [{name: group[name] for name in _SETTINGS if name in group} for group in optimizer.param_groups]
        clip_grad = getattr(optimizer, "clip_grad", None)
        yield
        for group, settings in zip(optimizer.param_groups, ours, strict=True):
            group.update(settings)
        if clip_grad is not None:
            optimizer.clip_grad = clip_grad

    def _clip(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Stage 0 only, between reduction and update: norm, clipping, and no update at all if it is not finite."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        self._norm = norm.item()
        if not math.isfinite(self._norm):
            for parameter in parameters:
                parameter.grad = None  # Adam leaves a parameter without a gradient alone
        elif self._clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)


@contextmanager
def _failing_late(engine: Any) -> Iterator[None]:
    """Let engine.save_checkpoint come to its end on a rank that cannot write, and raise then."""
    failures: list[Exception] = []
    write = engine.checkpoint_engine.save

    def save(state_dict: Any, path: str) -> None:
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as error:
            failures.append(error)

    engine.checkpoint_engine.save = save
    engine._copy_recovery_script = lambda path: None  # could fail too, and `engine-fast export` is ours
    try:
        yield
    finally:
        del engine.checkpoint_engine.save, engine._copy_recovery_script
    if failures:
        raise failures[0]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _optimizer(parameters: list[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(
        parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )
