"""The stages of a run, built from its configuration: prepare, teacher, distill, cmlm, engine, evaluate, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine_fast.config import ROUNDING_ONLY, DataConfig, RunConfig, config_tree
from engine_fast.data import report, shards
from engine_fast.data.catalog import resolve_config
from engine_fast.data.corpus import ParallelCorpus
from engine_fast.data.prepare import Prepared, prepare
from engine_fast.data.text import expand_path
from engine_fast.decoding.distill import distill
from engine_fast.distributed import World
from engine_fast.errors import require
from engine_fast.evaluation.files import write_json
from engine_fast.evaluation.measure import evaluate_systems
from engine_fast.evaluation.report import write_report
from engine_fast.evaluation.results import machine, versions
from engine_fast.evaluation.systems import roles_of
from engine_fast.models import load_model
from engine_fast.recipes.execute import Say
from engine_fast.recipes.graph import Stage, ancestors, hash_file, identities, read_record
from engine_fast.training import Reuse, train_cmlm, train_engine, train_teacher
from engine_fast.training.ensemble import member_hashes
from engine_fast.training.networks import require_common_weights, student_architecture
from engine_fast.training.pretrained import described, vocabularies_of

_WITHOUT_EFFECT = {"log_every", *ROUNDING_ONLY}
"""Training settings that change no result but for rounding: a stage goes on, or stands, when they change."""
_QUANTIZED = "zero_quantized"
"""How the keys of ZeRO++ begin that send fewer bits."""
_DEEPSPEED_WITHOUT_EFFECT = {"comms_logger", "flops_profiler", "memory_breakdown", "timers", "wall_clock_breakdown"}


def build_stages(
    config: RunConfig,
    out: Path,
    *,
    world: World,
    say: Say,
    last: str = "report",
    shared: Mapping[str, Stage] | None = None,
    prepare_stage: Stage | None = None,
    reuse: Reuse | None = None,
    trains: bool = True,
) -> list[Stage]:
    """The graph of `config`, in an order in which it can run: what `last` needs, and no stage besides.

    So distill is left out where no student uses distilled targets, and a student that no system of the evaluation is.

    Args: out: where each stage has a directory of its name. shared: stages of other graphs by what identities() gives;
        one that does the same work as a stage of this graph stands in its place, with its directory.
        prepare_stage: of a run with the same seed and data, whose text then need not be hashed again. reuse: what the
        stages of several graphs load and compute once. trains: False where trained stages have to be done already.
    Raises ConfigError for networks that do not fit each other, if they may be trained.
    """
    bodies = _Bodies(config, world, say, reuse)
    stages = _drafts(config, bodies, prepare_stage)
    wanted = ancestors(stages, last)
    if trains:
        _check_networks(config, wanted)
    stages = [stage for stage in stages if stage.name in wanted]
    names = identities(stages)
    stages = [(shared or {}).get(names[stage.name]) or replace(stage, directory=out / stage.name) for stage in stages]
    bodies.directories.update({stage.name: stage.place(out) for stage in stages})
    return stages


def _check_networks(config: RunConfig, stages: set[str]) -> None:
    """What a stage would refuse only when those before it have been trained. Raises ConfigError."""
    if config.teacher.pretrained is None:
        for name in ("teacher", "cmlm"):
            tie = getattr(getattr(config, name).architecture, "tie", None)
            require(
                config.data.vocabulary.joint or tie != "all" or name not in stages,
                f"{name}.architecture.tie", tie, "decoder or none with data.vocabulary.joint: false",
                "The two sides have tables of their own.",
            )  # fmt: skip
        if "cmlm" in stages and config.cmlm.from_teacher:
            require_common_weights(config.teacher.architecture.kind, config.cmlm.architecture.kind)
    if "engine" in stages:
        student_architecture(config.cmlm.architecture, config)


class _Bodies:
    """What each stage does in its directory."""

    def __init__(self, config: RunConfig, world: World, say: Say, reuse: Reuse | None) -> None:
        self._config, self._world, self._say, self._reuse = config, world, say, reuse
        self.directories: dict[str, Path] = {}
        """Of the graph's stages, by name; known before the first of them runs."""

    def prepare(self, directory: Path) -> None:
        config = self._config
        given = None if config.teacher.pretrained is None else vocabularies_of(config.teacher.pretrained)
        if given is not None and "vocabulary" in config.data.model_fields_set:
            self._say("prepare: data.vocabulary has no effect, the vocabularies are those of teacher.pretrained")
        counted = prepare(config.data, directory / "data", seed=config.seed, given=given)
        for split, part in counted.splits.items():
            self._say(f"prepare: {split}: {part.kept} of {part.read} pairs kept")

    def teacher(self, directory: Path) -> None:
        train_teacher(self._config, self._prepared(), directory)

    def distill(self, directory: Path) -> None:
        world = self._world
        teacher = load_model(self._teacher() / "model", device=world.device, kind="teacher")
        distill(
            teacher, self._prepared(), self._config.distill, directory,
            rank=world.rank, world_size=world.size, device=world.device,
        )  # fmt: skip

    def cmlm(self, directory: Path) -> None:
        data = self._prepared()
        train_cmlm(
            self._config, data, self._corpus_of("cmlm", data), directory, valid_corpus=data.split("valid"),
            teacher_dir=self._teacher() if self._config.cmlm.from_teacher else None,
        )  # fmt: skip

    def engine(self, directory: Path) -> None:
        data = self._prepared()
        train_engine(
            self._config, data, self._corpus_of("engine", data), directory, valid_corpus=data.split("valid"),
            teacher_dir=self._teacher(), cmlm_dir=self.directories["cmlm"], reuse=self._reuse,
        )  # fmt: skip

    def evaluate(self, directory: Path) -> None:
        measured = evaluate_systems(
            self._config, self._prepared(), directory, world=self._world, say=self._say, teacher_dir=self._teacher(),
            cmlm_dir=self.directories.get("cmlm"), engine_dir=self.directories.get("engine"),
            known=None if self._reuse is None else self._reuse.reference_energies,
        )  # fmt: skip
        if measured is not None:
            provenance = _provenance(self._config, self.directories, self._world)
            write_json(directory / "results.json", {"name": self._config.name, **measured, **provenance})

    def report(self, directory: Path) -> None:
        write_report(self.directories["evaluate"].parent, directory / "report.html")

    def _prepared(self) -> Prepared:
        with self._world.together():  # a host that cannot read the run directory stops all of them
            return Prepared.open(self.directories["prepare"] / "data")

    def _teacher(self) -> Path:
        return self.directories["teacher"]

    def _corpus_of(self, student: str, data: Prepared) -> ParallelCorpus:
        if getattr(self._config, student).data == "distilled":
            with self._world.together():
                return ParallelCorpus.open(self.directories["distill"] / "corpus")
        return data.split("train")


def _drafts(config: RunConfig, bodies: _Bodies, prepare_stage: Stage | None) -> list[Stage]:
    """Every stage that a run may have, each after what it reads."""
    seed = {"seed": config.seed}
    pretrained = config.teacher.pretrained
    taken = {} if pretrained is None else {"pretrained": described(pretrained)}
    deepspeed = _numeric(config.deepspeed)
    engine_extra = {"deepspeed": deepspeed} if deepspeed else {}

    def training(name: str, upstream: Sequence[str], body: Callable[[Path], None]) -> Stage:
        settings: dict[str, Any] = {**seed, **engine_extra, name: _section(getattr(config, name), _WITHOUT_EFFECT)}
        settings |= taken if name == "teacher" else {}
        if name == "engine" and config.engine.ensemble:
            settings["members"] = member_hashes(config.engine)
        # not metrics.jsonl: it holds times, which must not make a later stage run again
        return Stage(name, tuple(upstream), settings, ("model/**/*",), body, every_rank=True)

    prepared = (
        Stage("prepare", (), {**seed, **taken, **_prepare_inputs(config.data)}, ("data/**/*",), bodies.prepare)
        if prepare_stage is None
        else prepare_stage
    )
    distill_of = {name: ["distill"] * (getattr(config, name).data == "distilled") for name in ("cmlm", "engine")}
    roles = roles_of(config.evaluate)
    return [
        prepared,
        training("teacher", ["prepare"], bodies.teacher),
        Stage(
            "distill", ("prepare", "teacher"), {"distill": _section(config.distill)}, ("corpus/**/*",), bodies.distill,
            every_rank=True,
        ),
        training("cmlm", ["prepare", *distill_of["cmlm"], *["teacher"] * config.cmlm.from_teacher], bodies.cmlm),
        training("engine", ["prepare", "teacher", "cmlm", *distill_of["engine"]], bodies.engine),
        Stage(
            "evaluate", ("prepare", *roles), {"evaluate": _section(config.evaluate)}, ("results.json", "outputs/*"),
            bodies.evaluate, every_rank=True,
        ),
        Stage("report", ("evaluate", *roles), {}, ("report.html",), bodies.report),
    ]  # fmt: skip


def _prepare_inputs(data: DataConfig) -> dict[str, Any]:
    """Settings, bytes of the text and format versions that decide what prepare writes."""
    return {
        "data": _section(data, {"workers", "root", "allow_unverified"}),
        "files": _text_files(data),
        "formats": [report.VERSION, shards.VERSION],
    }


def _numeric(deepspeed: dict[str, Any]) -> dict[str, Any]:
    """What of the deepspeed: section may change numbers: not how ZeRO divides memory, not what is written down."""
    kept = {key: value for key, value in deepspeed.items() if key not in _DEEPSPEED_WITHOUT_EFFECT}
    zero = {key: value for key, value in kept.pop("zero_optimization", {}).items() if key.startswith(_QUANTIZED)}
    return kept | ({"zero_optimization": zero} if zero else {})


def _section(section: Any, without: set[str] | None = None) -> dict[str, Any]:
    """Without what is None, so that a setting which a later version adds, and nobody has set, changes no key."""
    return dict(section.model_dump(mode="json", exclude=without, exclude_none=True))


def _text_files(config: DataConfig) -> dict[str, str]:
    """Hashes of the text that prepare reads, so that an edited file is noticed; none for a generated corpus."""
    if config.synthetic is not None:
        return {}
    return {
        f"{split}.{side}": hash_file(expand_path(getattr(pair, side)))
        for split, pair in resolve_config(config).items()
        for side in ("source", "target")
    }


def _provenance(config: RunConfig, directories: Mapping[str, Path], world: World) -> dict[str, Any]:
    """What results.json says besides the measurements."""
    data = Prepared.open(directories["prepare"] / "data")
    before = (stage for stage in directories if stage not in ("evaluate", "report"))
    records = {stage: read_record(directories[stage]) for stage in before}
    found = {stage: record for stage, record in records.items() if record is not None}
    return {
        "seed": config.seed,
        "config": config_tree(config),
        "versions": versions(),
        "machine": machine(world.device),
        "corpus": data.report,
        "seconds": {stage: record["seconds"] for stage, record in found.items()},
        "hashes": {
            "source vocabulary": data.source_vocabulary.fingerprint,
            "target vocabulary": data.target_vocabulary.fingerprint,
            **{f"{stage} outputs": record["outputs_hash"] for stage, record in found.items()},
        },
    }
