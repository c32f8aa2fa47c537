"""A sweep: the trials of a run, from what they share, on one process or several, each done once.

What no two trials do differently is done first, as in any run, in OUT/<stage>. The rest of a trial is in
OUT/trials/<label>/<stage>; where another trial in front of it does the very same, it is that one's; and where a run
without a sweep has left it finished in OUT/<stage>, it is taken from there. Whoever works on a trial holds the lock of
its directory.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from engine_fast.config import RunConfig, parse_config
from engine_fast.config.load import put_all
from engine_fast.config.sweep import Trial, trials_of
from engine_fast.data.atomic import is_held, try_only_one
from engine_fast.distributed import World
from engine_fast.distributed.presence import beat, patient
from engine_fast.errors import EngineFastError, SweepError
from engine_fast.evaluation.files import write_json
from engine_fast.recipes.execute import Say, run_graph
from engine_fast.recipes.graph import Stage, identities, plan_stage, read_json, read_record
from engine_fast.recipes.stages import build_stages
from engine_fast.training import Reuse

FAILURE = "failure.json"
"""In a trial's directory: why it failed, in the sweep that goes on."""
_LAST = "evaluate"
_QUIET_SECONDS = 10.0
_NAMED = 3
"""Trials whose failure is told in full."""


@dataclass(frozen=True, slots=True)
class TrialGraph:
    """A trial as stages."""

    trial: Trial
    directory: Path
    stages: Sequence[Stage]
    """Those that not all trials share, in order; some may stand in the directory of another trial."""
    known: Mapping[str, str]
    """Stage -> hash of its outputs, for those that are done before any trial begins."""
    places: Mapping[str, Path]
    """Directory of each of its stages."""

    def outputs_hash(self) -> str | None:
        """Of its last stage; None while it is not done."""
        hashes = dict(self.known)
        for stage in self.stages:
            if plan_stage(stage, stage.place(self.directory), hashes).state != "done":
                return None
            hashes[stage.name] = _hash_of(stage.place(self.directory))
        return hashes[_LAST]


class Sweep:
    """The trials of a configuration, in the order of their labels' making."""

    def __init__(self, config: RunConfig, out: Path, *, world: World, say: Say) -> None:
        """Raises ConfigError for a trial whose settings cannot be used."""
        assert config.sweep is not None
        self._out, self._world, self._say, self._reuse = out, world, say, Reuse()
        self._trials = [(trial, trial_config(config, trial)) for trial in trials_of(config.sweep)]
        alone = config.model_copy(update={"sweep": None, "table": None})
        self._base = build_stages(alone, out, world=world, say=say, last=_LAST)
        self._names = identities(self._base)
        self._wanted: dict[str, set[str]] = {}
        """Stage -> what it is in each of the trials that need it."""
        for trial, its_own in self._trials:
            for name, identity in identities(self._stages(trial, its_own)).items():
                self._wanted.setdefault(name, set()).add(identity)
        self.common: list[Stage] = []
        """What no two trials do differently, on inputs of which the same is true."""
        for stage in self._base:
            alike = self._wanted.get(stage.name) == {self._names[stage.name]}
            if alike and {above.name for above in self.common} >= set(stage.upstream):
                self.common.append(stage)

    def graphs(self) -> list[TrialGraph]:
        """One for each trial, once what they share is done."""
        done = {self._names[stage.name]: stage for stage in self.common}
        done |= self._done_without_sweep({stage.name: _hash_of(stage.place(self._out)) for stage in self.common})
        known = {name: _hash_of(stage.place(self._out)) for name, stage in done.items()}
        homes, found = dict(done), []
        for trial, config in self._trials:
            stages = self._stages(trial, config, homes)
            names = identities(stages)
            own = [stage for stage in stages if names[stage.name] not in done]
            for stage in own:
                homes.setdefault(names[stage.name], stage)
            before = {stage.name: known[names[stage.name]] for stage in stages if names[stage.name] in done}
            places = {stage.name: stage.place(self._out) for stage in stages}
            found.append(TrialGraph(trial, self._place(trial), own, before, places))
        return found

    def _done_without_sweep(self, hashes: dict[str, str]) -> dict[str, Stage]:
        """Stages that some trial needs and that an earlier run at the same place has finished; `hashes` grows."""
        found = {}
        for stage in self._base:
            name = self._names[stage.name]
            wanted = name in self._wanted.get(stage.name, ())
            if stage.name in hashes or not wanted or not hashes.keys() >= set(stage.upstream):
                continue
            place = stage.place(self._out)
            if plan_stage(stage, place, hashes).state == "done":
                found[name], hashes[stage.name] = stage, _hash_of(place)
        return found

    def _stages(self, trial: Trial, config: RunConfig, shared: Mapping[str, Stage] | None = None) -> list[Stage]:
        def say(line: str) -> None:
            self._say(f"{trial.label}: {line}")

        return build_stages(
            config, self._place(trial), world=self._world, say=say, last=_LAST, shared=shared,
            prepare_stage=self._base[0], reuse=self._reuse,
        )  # fmt: skip

    def _place(self, trial: Trial) -> Path:
        return self._out / "trials" / trial.label


def trial_config(config: RunConfig, trial: Trial) -> RunConfig:
    """The run's configuration with the trial's values. Raises ConfigError that names the trial."""
    # only what was set: a default that is written down would count as asked for
    tree = config.model_dump(mode="json", exclude_unset=True, exclude={"sweep", "table"})
    put_all(tree, [(key, value, f"sweep, trial {trial.label}: {key}") for key, value in trial.values.items()])
    return parse_config(tree, f"sweep, trial {trial.label}")


def work(graphs: Sequence[TrialGraph], *, world: World, say: Say) -> None:
    """Bring every trial to its end that no other process works on, and wait until those are done or have failed.

    `world` is this process alone. What a trial raises is noted, and the others go on; but for KeyboardInterrupt.
    """
    left = list(graphs)
    while left:
        before = len(left)
        for graph in list(left):
            beat(f"trial {graph.trial.label}")
            if (graph.directory / FAILURE).exists():
                left.remove(graph)
                continue
            with try_only_one(graph.directory) as mine:
                # not tried again here, also where its failure could not be written down
                if mine and _attempt(graph, world, say):
                    left.remove(graph)
        if len(left) == before:
            with patient("waiting for the trials of other processes"):
                time.sleep(0.5)


def await_others(graphs: Sequence[TrialGraph]) -> None:
    """Until every trial is done or has failed, or nobody has been seen at work on the rest for a while."""
    seen, left = time.monotonic(), graphs
    with patient("waiting for the trials of other ranks"):
        while left := [graph for graph in left if not _is_over(graph)]:
            if any(is_held(graph.directory) for graph in left):
                seen = time.monotonic()
            elif time.monotonic() - seen > _QUIET_SECONDS:
                return
            time.sleep(1.0)


def forget_failures(graphs: Sequence[TrialGraph]) -> None:
    """So that every trial is tried again."""
    for graph in graphs:
        (graph.directory / FAILURE).unlink(missing_ok=True)


def require_all(graphs: Sequence[TrialGraph], out: Path) -> dict[str, str]:
    """Label -> hash of the trial's evaluation. Raises SweepError that names the trials which are not done."""
    hashes = {graph.trial.label: graph.outputs_hash() for graph in graphs}
    missing = [graph for graph in graphs if hashes[graph.trial.label] is None]
    if missing:
        told = [f"{graph.trial.label} ({_failure(graph)})" for graph in missing[:_NAMED]]
        told += [graph.trial.label for graph in missing[_NAMED:]]
        raise SweepError(
            f"{out / 'trials'}: {len(missing)} of {len(graphs)} trials are not done: {'; '.join(told)}. The others are "
            "kept. Mend the cause or take these out of `sweep`; the same command then goes on with what is missing."
        )
    return {label: found for label, found in hashes.items() if found is not None}


def _is_over(graph: TrialGraph) -> bool:
    return (graph.directory / FAILURE).exists() or graph.outputs_hash() is not None


def _attempt(graph: TrialGraph, world: World, say: Say) -> bool:
    """False: it needs a stage of a trial that another process works on."""
    try:
        return _run(graph, world, say)
    except Exception as error:
        known = isinstance(error, EngineFastError)
        text = str(error) if known else f"{type(error).__name__}: {error}"
        say(f"{graph.trial.label}: failed, the other trials go on. {text if known else traceback.format_exc()}")
        with suppress(OSError):  # a full disk, say, which may be why it failed
            write_json(graph.directory / FAILURE, {"error": text})
        return True


def _run(graph: TrialGraph, world: World, say: Say) -> bool:
    hashes = dict(graph.known)
    for stage in graph.stages:
        place = stage.place(graph.directory)
        if plan_stage(stage, place, hashes).state != "done":
            with ExitStack() as stack:
                if place.parent != graph.directory and not stack.enter_context(try_only_one(place.parent)):
                    return False
                run_graph(
                    [stage], graph.directory, world=world, say=lambda line: say(f"{graph.trial.label}: {line}"),
                    known=hashes,
                )  # fmt: skip
        hashes[stage.name] = _hash_of(place)
    return True


def _failure(graph: TrialGraph) -> str:
    return str((read_json(graph.directory / FAILURE) or {}).get("error", "interrupted or not begun"))


def _hash_of(directory: Path) -> str:
    record = read_record(directory)
    assert record is not None, f"{directory} is not finished"
    return str(record["outputs_hash"])
