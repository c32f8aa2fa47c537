"""The one training loop: update, checkpoint, validate, stop; for all three stages and any number of ranks.

Where a run is follows from its update number alone: batches, dropout, masks and noise are functions of (seed, stage,
update, micro-batch, rank). A resumed run therefore repeats, bit by bit, what an uninterrupted one does.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import Tensor

from engine_fast.config import RunConfig, TrainConfig
from engine_fast.distributed import CheckpointStore, Engine, StepResult, World, require_agreement
from engine_fast.distributed.checkpoint import WEIGHTS, best_name, update_name, verify
from engine_fast.errors import CheckpointError, DivergenceError
from engine_fast.training.averaging import ExponentialAverage, mean_of
from engine_fast.training.feeding import Feed, Feeder
from engine_fast.training.interrupt import Interrupted, Stop
from engine_fast.training.metrics import MetricsLog, Sums
from engine_fast.training.progress import Reporter
from engine_fast.training.schedule import learning_rate
from engine_fast.training.seeding import seed_torch
from engine_fast.training.validation import HIGHER_IS_BETTER, Validator

StageName = Literal["teacher", "cmlm", "engine"]
_SKIPS_IN_A_ROW = 20
"""fp16 updates skipped one after another: by then the loss scale has fallen by a million."""


@dataclass
class Progress:
    """What a checkpoint remembers besides weights and optimiser."""

    update: int = 0
    epoch: int = 0
    offset: int = 0
    """Place of the next update in the epoch."""
    validated: int = -1
    """Last update that was validated."""
    best_update: int | None = None
    best_score: float | None = None
    bad_validations: int = 0
    skipped: int = 0
    """fp16 updates skipped in a row."""
    seconds: float = 0.0
    """Spent in updates."""
    tokens_per_second: float = 0.0
    window_seconds: float = 0.0
    """Of the updates since the last line of metrics.jsonl."""
    sums: list[dict[str, float]] = field(default_factory=list)
    """Each rank's sums of those updates."""


class Trainer:
    """Trains `engine`'s module to the end of its stage."""

    def __init__(
        self,
        stage: StageName,
        config: TrainConfig,
        run: RunConfig,
        directory: Path,
        *,
        engine: Engine,
        feeder: Feeder,
        validator: Validator,
        world: World,
        stop: Stop,
    ) -> None:
        self.stage, self.config, self.run_config, self.directory = stage, config, run, directory
        self._engine, self._feeder, self._validator, self._world, self._stop = engine, feeder, validator, world, stop
        self._store = CheckpointStore(directory / "checkpoints", world=world, min_free_bytes=run.runtime.min_free_bytes)
        self._average = ExponentialAverage(engine.shards(), config.ema_decay) if config.ema_decay else None
        self._sums = Sums(world.device)
        self.progress = Progress()
        self._saved = -1
        self._reporter = Reporter(stage, total=config.max_updates, silent=not world.is_main)
        self._log: MetricsLog | None = None

    def train(self) -> dict[str, Tensor]:
        """Run to the end; the float32 weights to export.

        Raises Interrupted after a signal (state saved), DivergenceError, CheckpointError.
        """
        self._resume()
        try:
            while True:
                if self._validation_due() and not self._validate():
                    self._interrupt()
                if self._ended():
                    break
                if self._world.any(bool(self._stop)):
                    self._interrupt()
                self._update()
                if self.progress.update % self.config.checkpoint_every == 0 or self._out_of_data():
                    self._save()
            return self._result()
        finally:
            self._reporter.close()
            if self._log is not None:
                self._log.close()

    def say(self, text: str) -> None:
        """Tell the person at the terminal."""
        self._reporter.say(text)

    # ------------------------------------------------------------ one update

    def _update(self) -> None:
        started, progress = time.monotonic(), self.progress
        lr = learning_rate(self.config.optim, progress.update, self.config.max_updates)
        feed = self._feeder.take()
        require_agreement(self._world, self._facts(feed, lr), f"{self.stage}, update {progress.update + 1}")
        self._engine.prepare([batch for batch, _ in feed.batches])
        for number, (batch, weight) in enumerate(feed.batches):
            seed_torch(self.run_config.seed, self.stage, progress.update, number, self._world.rank)
            stats = self._engine.backward(batch, num_target_tokens=feed.num_target_tokens, weight=weight)
            self._sums.add(stats if weight else {name: value * weight for name, value in stats.items()})
        if progress.update + 1 < self.config.max_updates:
            self._feeder.prefetch()
        result = self._engine.step(lr)
        self._check(result)
        if self._average is not None and result.applied:
            self._average.update(self._engine.shards())
        progress.update += 1
        progress.epoch, progress.offset = feed.next_epoch, feed.next_offset
        seconds = time.monotonic() - started
        progress.seconds += seconds
        progress.window_seconds += seconds
        self._reporter.advance(progress.update)
        if progress.update % self.config.log_every == 0 or self._out_of_data():
            self._write_line(feed, lr, result)

    def _facts(self, feed: Feed, lr: float) -> dict[str, str | int | float | None]:
        """What every rank must have in common at an update, or the next collective pairs different things."""
        return {
            "update": self.progress.update,
            "seed": self.run_config.seed,
            "epoch": feed.epoch,
            "next micro-batch": feed.next_offset,
            "micro-batches": len(feed.batches),
            "target tokens": feed.num_target_tokens,
            "sentences of the update": feed.digest,
            "learning rate": lr,
        }

    def _check(self, result: StepResult) -> None:
        """Nothing that is not finite goes on; fp16 alone may skip an update while its loss scale settles."""
        if result.applied:
            self.progress.skipped = 0
            return
        self.progress.skipped += 1
        if self.config.precision == "fp16" and self.progress.skipped < _SKIPS_IN_A_ROW:
            return
        self._diverged(f"the gradient is not finite (norm {result.grad_norm}) at update {self.progress.update + 1}")

    def _diverged(self, what: str) -> None:
        kept = self._store.updates()
        good = f"The last good checkpoint is {kept[-1]}" if kept else "There is no checkpoint yet"
        optim = f"{self.stage}.optim"
        advice = f"Lower {optim}.lr (now {self.config.optim.lr:g}), or set {optim}.warmup_updates or {optim}.clip_norm"
        raise DivergenceError(f"{self.stage}: {what}; training stops. {good}. {advice}, then start the command again.")

    def _write_line(self, feed: Feed, lr: float, result: StepResult) -> None:
        progress = self.progress
        averages = self._sums.averages(self._world)
        tokens = averages.pop("tokens")
        averages.pop("sentences")
        # With fp16 a batch that overflowed is skipped, and shows here.
        if self.config.precision != "fp16" and not all(map(math.isfinite, averages.values())):
            first = max(1, progress.update - self.config.log_every + 1)
            self._diverged(f"a loss is not finite between updates {first} and {progress.update}: {averages}")
        progress.tokens_per_second = tokens / max(progress.window_seconds, 1e-9)
        values = {
            "epoch": feed.epoch, **averages, "lr": lr, "grad_norm": result.grad_norm,
            "tokens_per_second": progress.tokens_per_second, "seconds": progress.seconds,
        }  # fmt: skip
        if self._engine.loss_scale != 1.0:
            values["loss_scale"] = self._engine.loss_scale
        self._sums.clear()
        progress.window_seconds = 0.0
        if self._log is not None:
            self._log.write("train", progress.update, values)
        self._reporter.show(progress.update, values)

    # ------------------------------------------------------------ where it ends

    def _out_of_data(self) -> bool:
        """No update is left to do."""
        last_epoch = self.config.max_epochs
        done = last_epoch is not None and self.progress.epoch >= last_epoch
        return done or self.progress.update >= self.config.max_updates

    def _ended(self) -> bool:
        patience = self.config.early_stop.patience
        return self._out_of_data() or 0 < patience <= self.progress.bad_validations

    # ------------------------------------------------------------ validation

    def _validation_due(self) -> bool:
        update = self.progress.update
        if self.progress.validated == update:
            return False
        # ENGINE starts from a trained student: its own figures are the first point of the curves.
        return self._out_of_data() or (
            update % self.config.validate_every == 0 and (update > 0 or self.stage == "engine")
        )

    def _validate(self) -> bool:
        """Measure, log and keep the best. False: a signal came, and the validation is to be done again."""
        progress, metric = self.progress, self.config.early_stop.metric
        weights = self._exported_weights() if self._average is not None else None
        with self._engine.showing(weights) as model:
            figures = self._validator(model)
        if figures is None:
            return False
        score = figures[metric]
        if not math.isfinite(score):
            self._diverged(f"dev {metric} = {score} at update {progress.update}")
        sign = 1 if HIGHER_IS_BETTER[metric] else -1
        better = progress.best_score is None or sign * score > sign * progress.best_score
        progress.validated = progress.update
        if better:
            progress.best_update, progress.best_score, progress.bad_validations = progress.update, score, 0
            self._save_best()
        else:
            progress.bad_validations += 1
        if self._log is not None:
            self._log.write("valid", progress.update, {"epoch": progress.epoch, **figures})
        shown = "  ".join(
            f"{name} {value:.4g}" for name, value in figures.items() if name not in ("tokens", "sentences")
        )
        self._reporter.say(f"valid at {progress.update}: {shown}{'  (best)' if better else ''}")
        return True

    def _exported_weights(self) -> dict[str, Tensor]:
        if self._average is None:
            return self._engine.weights()
        with self._average.in_place_of(self._engine.shards()):
            return self._engine.weights()

    # ------------------------------------------------------------ checkpoints

    def _save(self) -> None:
        progress = self.progress
        if self._saved == progress.update:
            return
        progress.sums = self._world.gather(self._sums.state())
        name = update_name(progress.update)
        self._store.save(name, self._state(), self._write_checkpoint, num_bytes=self._checkpoint_bytes())
        self._store.set_latest(name)
        self._store.prune(progress.update, keep_last=self.config.keep_last, best=progress.best_update)
        self._saved = progress.update
        if self._log is not None:
            self._log.sync()

    def _write_checkpoint(self, directory: Path) -> None:
        self._engine.save(directory)
        weights = self._exported_weights()
        if self._world.is_main:
            save_file(weights, directory / WEIGHTS)
        if self._average is not None:
            save_file(self._average.state(), directory / f"average-{self._world.rank}.safetensors")

    def _save_best(self) -> None:
        weights = self._exported_weights()

        def write(directory: Path) -> None:
            if self._world.is_main:
                save_file(weights, directory / WEIGHTS)

        num_bytes = 4 * self._engine.num_parameters
        self._store.save(best_name(self.progress.update), self._state(), write, num_bytes=num_bytes)

    def _checkpoint_bytes(self) -> int:
        half = self.config.precision != "fp32"
        per_parameter = 4 + 12 + 2 * half + 4 * (self._average is not None)
        return per_parameter * self._engine.num_parameters

    def _state(self) -> dict[str, Any]:
        return {"stage": self.stage, **asdict(self.progress), "layout": self._layout()}

    def _layout(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be read."""
        return {
            "ranks": self._world.size,
            "zero_stage": self.config.effective_zero_stage,
            "precision": self.config.precision,
            "ema": self._average is not None,
        }

    def _resume(self) -> None:
        self._store.prepare()
        snapshot = self._store.newest(self._reporter.say)
        if snapshot is not None:
            for key, value in self._layout().items():
                if snapshot.state["layout"][key] != value:
                    raise CheckpointError(
                        f"{snapshot.directory}: was written with {key} = {snapshot.state['layout'][key]}, this run has "
                        f"{value}. Continue with the same setting, or train in another directory."
                    )
            self._engine.load(snapshot.directory)
            names = Progress.__dataclass_fields__.keys() & snapshot.state.keys()
            self.progress = Progress(**{name: snapshot.state[name] for name in names})
            self._saved = self.progress.update
            self._sums.load(self.progress.sums[self._world.rank])
            if self._average is not None:
                self._average.load(load_file(snapshot.directory / f"average-{self._world.rank}.safetensors"))
            self._feeder.seek(self.progress.epoch, self.progress.offset)
            self._check_best()
            self._reporter.say(f"continuing after update {self.progress.update}")
        self._reporter.start_at(self.progress.update)
        if self._world.is_main:
            update = self.progress.update if snapshot is not None else -1
            board = self.run_config.runtime.tensorboard
            validated = self.progress.validated
            self._log = MetricsLog(self.directory, update=update, validated=validated, tensorboard=board)

    def _check_best(self) -> None:
        """A best snapshot that was damaged since is forgotten: the next validation makes a new one."""
        best = self.progress.best_update
        if best is None:
            return
        try:
            self._world.on_main(lambda: verify(self._store.directory / best_name(best)))
        except CheckpointError as error:
            self._reporter.say(f"{error} The best weights are chosen anew from here on.")
            self.progress.best_update = self.progress.best_score = None
            self.progress.validated = -1

    def _interrupt(self) -> None:
        self._save()
        name = self._stop.signal.name if self._stop.signal is not None else "a signal to another rank"
        raise Interrupted(
            f"{self.stage}: stopped by {name} after update {self.progress.update}, "
            f"state saved in {self._store.directory}. The same command continues."
        )

    # ------------------------------------------------------------ the result

    def _result(self) -> dict[str, Tensor]:
        """Mean of the last checkpoints if asked for, else the best weights."""
        if self.config.average_last:
            # An early stop can come between two checkpoints.
            self._save()
            names = [path.name for path in self._store.updates()][-self.config.average_last :]
            return mean_of([self._store.weights(name) for name in names])
        assert self.progress.best_update is not None
        return self._store.weights(best_name(self.progress.best_update))
