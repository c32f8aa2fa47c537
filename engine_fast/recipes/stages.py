"""The stages of a run, built from its configuration: prepare, teacher, distill, cmlm, engine, evaluate, report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine_fast.config import ROUNDING_ONLY, DataConfig, RunConfig
from engine_fast.data import report, shards
from engine_fast.data.catalog import resolve_config
from engine_fast.data.corpus import ParallelCorpus
from engine_fast.data.prepare import Prepared, prepare
from engine_fast.data.text import expand_path
from engine_fast.decoding.distill import distill
from engine_fast.distributed import World
from engine_fast.evaluation.files import write_json
from engine_fast.evaluation.measure import evaluate_systems
from engine_fast.evaluation.report import write_report
from engine_fast.evaluation.results import machine, versions
from engine_fast.models import load_model
from engine_fast.recipes.execute import Say
from engine_fast.recipes.graph import Stage, hash_file, read_record
from engine_fast.training import train_cmlm, train_engine, train_teacher
from engine_fast.training.ensemble import member_hashes
from engine_fast.training.pretrained import described, vocabularies_of

_WITHOUT_EFFECT = {"log_every", *ROUNDING_ONLY}
"""Training settings that change no result but for rounding: a stage goes on, or stands, when they change."""
_QUANTIZED = "zero_quantized"
"""How the keys of ZeRO++ begin that send fewer bits."""
_DEEPSPEED_WITHOUT_EFFECT = {"comms_logger", "flops_profiler", "memory_breakdown", "timers", "wall_clock_breakdown"}


def build_stages(config: RunConfig, out: Path, *, world: World, say: Say) -> list[Stage]:
    """The graph of `config` under `out`, in an order in which it can run.

    The distill stage is left out when neither student uses distilled targets.
    """
    seed = {"seed": config.seed}
    pretrained = config.teacher.pretrained
    taken = {} if pretrained is None else {"pretrained": described(pretrained)}
    deepspeed = _numeric(config.deepspeed)
    engine_extra = {"deepspeed": deepspeed} if deepspeed else {}
    distilled = {name for name in ("cmlm", "engine") if getattr(config, name).data == "distilled"}

    def prepared() -> Prepared:
        with world.together():  # a host that cannot read the run directory stops all of them
            return Prepared.open(out / "prepare" / "data")

    def corpus_of(student: str) -> ParallelCorpus:
        if student in distilled:
            with world.together():
                return ParallelCorpus.open(out / "distill" / "corpus")
        return prepared().split("train")

    def run_prepare(directory: Path) -> None:
        given = None if pretrained is None else vocabularies_of(pretrained)
        if given is not None and "vocabulary" in config.data.model_fields_set:
            say("prepare: data.vocabulary has no effect, the vocabularies are those of teacher.pretrained")
        counted = prepare(config.data, directory / "data", seed=config.seed, given=given)
        for split, part in counted.splits.items():
            say(f"prepare: {split}: {part.kept} of {part.read} pairs kept")

    def run_teacher(directory: Path) -> None:
        train_teacher(config, prepared(), directory)

    def run_cmlm(directory: Path) -> None:
        data = prepared()
        teacher_dir = out / "teacher" if config.cmlm.from_teacher else None
        train_cmlm(
            config, data, corpus_of("cmlm"), directory, valid_corpus=data.split("valid"), teacher_dir=teacher_dir
        )

    def run_engine(directory: Path) -> None:
        data = prepared()
        train_engine(
            config, data, corpus_of("engine"), directory, valid_corpus=data.split("valid"),
            teacher_dir=out / "teacher", cmlm_dir=out / "cmlm",
        )  # fmt: skip

    def run_distill(directory: Path) -> None:
        teacher = load_model(out / "teacher" / "model", device=world.device, kind="teacher")
        distill(
            teacher, prepared(), config.distill, directory,
            rank=world.rank, world_size=world.size, device=world.device,
        )  # fmt: skip

    def run_evaluate(directory: Path) -> None:
        measured = evaluate_systems(
            config, prepared(), directory, world=world, say=say,
            teacher_dir=out / "teacher", cmlm_dir=out / "cmlm", engine_dir=out / "engine",
        )  # fmt: skip
        if measured is not None:
            write_json(directory / "results.json", {"name": config.name, **measured, **_provenance(config, out, world)})

    def run_report(directory: Path) -> None:
        write_report(out, directory / "report.html")

    def training(name: str, upstream: list[str], body: Callable[[Path], None]) -> Stage:
        settings: dict[str, Any] = {**seed, **engine_extra, name: _section(getattr(config, name), _WITHOUT_EFFECT)}
        settings |= taken if name == "teacher" else {}
        if name == "engine" and config.engine.ensemble:
            settings["members"] = member_hashes(config.engine)
        # not metrics.jsonl: it holds times, which must not make a later stage run again
        return Stage(name, tuple(upstream), settings, ("model/**/*",), body, every_rank=True)

    cmlm_upstream = ["prepare"] + ["distill"] * ("cmlm" in distilled) + ["teacher"] * config.cmlm.from_teacher
    engine_upstream = ["prepare", "teacher", "cmlm"] + ["distill"] * ("engine" in distilled)
    models = ("teacher", "cmlm", "engine")
    stages = [
        Stage("prepare", (), {**seed, **taken, **_prepare_inputs(config.data)}, ("data/**/*",), run_prepare),
        training("teacher", ["prepare"], run_teacher),
        Stage(
            "distill",
            ("prepare", "teacher"),
            {"distill": _section(config.distill)},
            ("corpus/**/*",),
            run_distill,
            every_rank=True,
        ),
        training("cmlm", cmlm_upstream, run_cmlm),
        training("engine", engine_upstream, run_engine),
        Stage(
            "evaluate",
            ("prepare", *models),
            {"evaluate": _section(config.evaluate)},
            ("results.json", "outputs/*"),
            run_evaluate,
            every_rank=True,
        ),
        Stage("report", ("evaluate", *models), {}, ("report.html",), run_report),
    ]
    return stages if distilled else [stage for stage in stages if stage.name != "distill"]


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


def _provenance(config: RunConfig, out: Path, world: World) -> dict[str, Any]:
    """What results.json says besides the measurements."""
    data = Prepared.open(out / "prepare" / "data")
    records = {stage: read_record(out / stage) for stage in ("prepare", "teacher", "distill", "cmlm", "engine")}
    found = {stage: record for stage, record in records.items() if record is not None}
    return {
        "seed": config.seed,
        "config": config.model_dump(mode="json", exclude_none=True),
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
