"""The one training loop: update, checkpoint, validate, stop; for all three stages and any number of ranks.

There is no generator to save: batches are a function of (seed, stage, epoch), and dropout, masks and noise of (seed,
stage, update, number of the micro-batch over all ranks). A resumed run therefore repeats, bit by bit, what an
uninterrupted one does, and one on other ranks makes the same draws.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from engine_fast.config import RunConfig, TrainConfig
from engine_fast.distributed import CheckpointStore, Engine, StepResult, World, require_agreement
from engine_fast.distributed.presence import beat
from engine_fast.errors import CheckpointError, DivergenceError
from engine_fast.training.averaging import ExponentialAverage
from engine_fast.training.checkpoints import Checkpoints, Progress
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
        teachers: Mapping[str, str],
    ) -> None:
        """`teachers`: hashes of the frozen ones, which no checkpoint holds: each names them and asks for them again."""
        self.stage, self.config, self.run_config, self.directory = stage, config, run, directory
        self._engine, self._feeder, self._validator, self._world, self._stop = engine, feeder, validator, world, stop
        self._store = CheckpointStore(directory / "checkpoints", world=world, min_free_bytes=run.runtime.min_free_bytes)
        self._average = ExponentialAverage(engine.shards(), config.ema_decay) if config.ema_decay else None
        self._sums = Sums(world.device)
        self._reporter = Reporter(stage, total=config.max_updates, silent=not world.is_main)
        self._checkpoints = Checkpoints(
            self._store, config, engine=engine, average=self._average, world=world, say=self.say,
            origin={"stage": stage, **teachers},
        )  # fmt: skip
        self.progress = Progress()
        self._log: MetricsLog | None = None

    def train(self) -> Callable[[], dict[str, Tensor]]:
        """Run to the end. Returns what reads the float32 weights to export, for the rank that exports them.

        Raises Interrupted after a signal (state saved), DivergenceError, CheckpointError.
        """
        try:
            self._resume()
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
            if self.config.average_last:
                self._save()  # an early stop can come between two checkpoints
            self._store.join()
            return lambda: self._checkpoints.result(self.progress)
        finally:
            self._store.close()
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
        done = progress.update / max(1, self.config.max_updates - 1)
        self._engine.prepare([batch for batch, _ in feed.batches], done=done)
        for turn, (batch, weight) in enumerate(feed.batches):
            number = turn * self._world.size + self._world.rank
            beat(f"{self.stage}: update {progress.update + 1}, micro-batch {number + 1}")
            # The last part once was the rank; as a constant it keeps what one process draws.
            seed_torch(self.run_config.seed, self.stage, progress.update, number, 0)
            stats = self._engine.backward(batch, num_target_tokens=feed.num_target_tokens, weight=weight)
            self._sums.add(stats if weight else {name: value * weight for name, value in stats.items()})
        if progress.update + 1 < self.config.max_updates:
            self._feeder.prefetch()
        beat(f"{self.stage}: update {progress.update + 1}, step")
        result = self._engine.step(lr)
        self._check(result)
        if self._average is not None and result.applied:
            self._average.update(self._engine.shards())
        progress.update += 1
        progress.epoch, progress.consumed = feed.next_epoch, feed.next_consumed
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
            "next micro-batch": feed.next_consumed,
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
        with contextlib.suppress(CheckpointError):  # the smaller misfortune
            self._store.join()
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
        weights = self._checkpoints.weights() if self._average is not None else None
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
            self._checkpoints.save_best(progress)
        else:
            progress.bad_validations += 1
        if self._log is not None:
            self._log.write("valid", progress.update, {"epoch": progress.epoch, **figures})
        shown = "  ".join(
            f"{name} {value:.4g}" for name, value in figures.items() if name not in ("tokens", "sentences")
        )
        self._reporter.say(f"valid at {progress.update}: {shown}{'  (best)' if better else ''}")
        return True

    # ------------------------------------------------------------ checkpoints

    def _save(self, *, passing: bool = False) -> None:
        beat(f"{self.stage}: saving update {self.progress.update}")
        self._checkpoints.save(self.progress, self._sums, passing=passing)
        if self._log is not None:
            self._log.sync()

    def _resume(self) -> None:
        beat(f"{self.stage}: looking for a checkpoint")
        self.progress.metric = self.config.early_stop.metric
        progress = self._checkpoints.resume(self._sums)
        if progress is not None:
            self.progress = progress
            self._feeder.seek(progress.epoch, progress.consumed)
            self._reporter.say(f"continuing after update {progress.update}")
        self._reporter.start_at(self.progress.update)
        if self._world.is_main:
            update = -1 if progress is None else progress.update
            board = self.run_config.runtime.tensorboard
            validated = self.progress.validated
            self._log = MetricsLog(self.directory, update=update, validated=validated, tensorboard=board)

    def _interrupt(self) -> None:
        self._save(passing=self.progress.update % self.config.checkpoint_every != 0)
        self._store.join()
        name = self._stop.signal.name if self._stop.signal is not None else "a signal to another rank"
        raise Interrupted(
            f"{self.stage}: stopped by {name} after update {self.progress.update}, "
            f"state saved in {self._store.directory}. The same command continues."
        )
