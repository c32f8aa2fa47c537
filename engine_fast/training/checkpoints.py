"""What a stage's checkpoints hold, and how a run goes on from one: on as many ranks as wrote it, or on others.

Neither generators nor the frozen teacher are among it: draws follow from the place in the run (see loop.py), and the
teacher is named by the hash of its file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from engine_fast.config import TrainConfig
from engine_fast.distributed import CheckpointStore, Engine, Snapshot, World
from engine_fast.distributed.checkpoint import PASSING, WEIGHTS, best_name, update_name
from engine_fast.distributed.manifest import verify
from engine_fast.distributed.presence import patient
from engine_fast.errors import CheckpointError
from engine_fast.training.averaging import ExponentialAverage, mean_of
from engine_fast.training.metrics import Sums, shared_out


@dataclass
class Progress:
    """What a checkpoint remembers besides weights and optimiser."""

    update: int = 0
    epoch: int = 0
    consumed: int = 0
    """Micro-batches of the epoch, over all ranks, that updates have used."""
    validated: int = -1
    """Last update that was validated."""
    best_update: int | None = None
    best_score: float | None = None
    metric: str = ""
    """What best_score is a figure of."""
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


class Checkpoints:
    """The snapshots of `engine` and, if there is one, of the average of its weights. Collective, but for `store`'s."""

    def __init__(
        self,
        store: CheckpointStore,
        config: TrainConfig,
        *,
        engine: Engine,
        average: ExponentialAverage | None,
        world: World,
        origin: dict[str, str],
        say: Callable[[str], None],
    ) -> None:
        """`origin`: what a snapshot must come from to be continued, by name: stage and frozen teachers."""
        self.store, self._config, self._engine, self._average = store, config, engine, average
        self._world, self._origin, self._say = world, origin, say
        self._saved = -1

    def weights(self) -> dict[str, Tensor]:
        """The float32 weights that are validated and exported: the average's if there is one."""
        if self._average is None:
            return self._engine.weights()
        with self._average.in_place_of(self._engine.shards()):
            return self._engine.weights()

    def save(self, progress: Progress, sums: Sums, *, passing: bool = False) -> None:
        """Write a snapshot unless there is one of this update. It is sealed in the background: see `store.join`.

        passing: one that only an interruption asked for. It is no part of `average_last`, and goes with the next one.
        """
        if self._saved == progress.update:
            return
        progress.sums = self._world.gather(sums.state())
        name, best, weights = update_name(progress.update), progress.best_update, self.weights()

        def write(directory: Path) -> None:
            self._engine.save(directory)
            self._write_weights(directory, weights)

        state = {**self._state(progress), PASSING: passing}
        self.store.save(
            name, state, write, num_bytes=self._num_bytes(),
            then=lambda: self.store.advance(name, keep_last=self._config.keep_last, best=best),
        )  # fmt: skip
        self._saved = progress.update

    def save_best(self, progress: Progress) -> None:
        """Keep the weights of this update, the best so far."""
        name, weights, num_bytes = best_name(progress.update), self.weights(), 4 * self._engine.num_parameters
        self.store.save(
            name, self._state(progress), lambda path: self._write_weights(path, weights), num_bytes=num_bytes
        )

    def resume(self, sums: Sums) -> Progress | None:
        """Load the newest whole snapshot. None: there is none, and training starts."""
        self.store.prepare()
        snapshot = self.store.newest(self._say)
        if snapshot is None:
            return None
        self._load(snapshot)
        names = Progress.__dataclass_fields__.keys() & snapshot.state.keys()
        progress = Progress(**{name: snapshot.state[name] for name in names})
        sums.load(shared_out(progress.sums, self._world.size)[self._world.rank])
        self._saved = progress.update
        self._check_metric(progress)
        self._check_best(progress)
        return progress

    def result(self, progress: Progress) -> dict[str, Tensor]:
        """The weights to export, from the snapshots: mean of the last ones if asked for, else the best. Local."""
        if self._config.average_last:
            names = [path.name for path in self.store.updates(passing=False)][-self._config.average_last :]
            return mean_of([self.store.weights(name) for name in names])
        assert progress.best_update is not None
        return self.store.weights(best_name(progress.best_update))

    def _load(self, snapshot: Snapshot) -> None:
        directory, written, own = snapshot.directory, snapshot.state["layout"], self._layout()
        asked = [(name, snapshot.state.get(name), value) for name, value in self._origin.items()]
        for what, was, now in (*asked, ("ema", written["ema"], own["ema"])):
            if was != now:
                raise CheckpointError(
                    f"{directory}: was written with {what} = {str(was)[:12]}, this run has {str(now)[:12]}. "
                    "Continue with the same, or train in another directory."
                )
        if self._average is not None:
            self._engine.put_weights(load_file(directory / WEIGHTS))  # those of the average
            self._average.load(self._engine.shards())
        if written == own or written["zero_stage"] == own["zero_stage"] == 0:  # every rank of stage 0 has it all
            self._engine.load(directory)
            return
        self._say(f"{directory.name} was written with {_described(written)}; reading it with {_described(own)}")
        with self.store.scratch(24 * self._engine.num_parameters) as place:
            with patient(f"converting {directory.name}"):
                self._world.on_main(lambda: self._engine.convert(directory, place, stage=written["zero_stage"]))
            self._engine.load_universal(place)

    def _check_metric(self, progress: Progress) -> None:
        """The best by one figure says nothing about another one."""
        metric = self._config.early_stop.metric
        if progress.metric not in ("", metric) and progress.best_update is not None:
            self._say(f"the best by {progress.metric} was update {progress.best_update}; by {metric} it is chosen anew")
            progress.best_update = progress.best_score = None
            progress.bad_validations = 0
        progress.metric = metric

    def _check_best(self, progress: Progress) -> None:
        """A best snapshot that was damaged since is forgotten: the next validation makes a new one."""
        best = progress.best_update
        if best is None:
            return
        try:
            self._world.on_main(lambda: verify(self.store.directory / best_name(best)))
        except CheckpointError as error:
            self._say(f"{error} The best weights are chosen anew from here on.")
            progress.best_update = progress.best_score = None
            progress.validated = min(progress.validated, progress.update - 1)

    def _write_weights(self, directory: Path, weights: dict[str, Tensor]) -> None:
        if self._world.is_main:
            save_file(weights, directory / WEIGHTS)

    def _num_bytes(self) -> int:
        """Float32 weights, and DeepSpeed's: weights once more, master weights and two moments."""
        return (4 + (4 if self._config.precision == "fp32" else 2) + 12) * self._engine.num_parameters

    def _state(self, progress: Progress) -> dict[str, Any]:
        return {**self._origin, **asdict(progress), "layout": self._layout()}

    def _layout(self) -> dict[str, Any]:
        """What a snapshot's files are split by."""
        return {
            "ranks": self._world.size,
            "zero_stage": self._config.effective_zero_stage,
            "precision": self._config.precision,
            "ema": self._average is not None,
        }


def _described(layout: dict[str, Any]) -> str:
    return f"ranks: {layout['ranks']}, ZeRO stage {layout['zero_stage']}, {layout['precision']}"
