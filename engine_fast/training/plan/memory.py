"""The memory of one rank at the largest moment of a training update, and of what settings it consists."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from engine_fast.config import AnyArchitecture, Architecture, RunConfig, TrainConfig
from engine_fast.errors import require
from engine_fast.training.plan.activations import Block, Shape
from engine_fast.training.plan.sizes import sizes_of, transformer
from engine_fast.training.plan.tape import BYTES, cmlm_tape, engine_tape, teacher_tape, validation
from engine_fast.training.plan.zero import DEFAULTS, Bytes, Zero

Stage = Literal["teacher", "cmlm", "engine"]
Device = Literal["cpu", "cuda"]
STAGES: tuple[Stage, ...] = ("teacher", "cmlm", "engine")
TERMS = ("weights", "gradients", "optimizer", "copies", "teacher", "activations", "workspace")
MEANING = {
    "weights": "the trained model; stage 3: its shard, and what is gathered",
    "gradients": "this rank's, at that moment",
    "optimizer": "float32 master weights and Adam's moments",
    "copies": "the model that is validated (stage 3, ema), moving averages; host: the weights while they are saved",
    "teacher": "the frozen teacher",
    "activations": "kept by the forward for the backward pass",
    "workspace": "communication buckets, and what one operation needs besides",
}


@dataclass(frozen=True)
class MemoryPlan:
    """One stage on one rank."""

    stage: Stage
    ranks: int
    device: dict[str, int]
    """Bytes of each term at the largest moment."""
    host: dict[str, int]
    """Bytes in the host's memory: what offload keeps there, and the whole weights while they are saved."""
    moment: str
    """When the device holds most."""
    moments: dict[str, int]
    """The device's total at the largest point of forward, backward, step, validation and checkpoint."""
    shape: Shape
    parameters: int

    @property
    def total(self) -> int:
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        return sum(self.host.values())

    @property
    def dominant(self) -> str:
        return max(self.device, key=lambda term: self.device[term])


def plan_memory(
    run: RunConfig,
    stage: Stage,
    *,
    ranks: int,
    device: Device = "cuda",
    shape: Shape | None = None,
    vocabulary: int | None = None,
) -> MemoryPlan:
    """Bytes of each term on every rank, when the largest micro-batch is trained.

    shape: default, the largest that `largest_shapes` allows. vocabulary: default, data.vocabulary.size.
    Counted is what torch's allocator hands out; a GPU also holds the CUDA context and NCCL's buffers (about 1 GB).
    """
    require(ranks > 0, "ranks", ranks, "at least 1")
    settings: TrainConfig = getattr(run, stage)
    words = vocabulary or run.data.vocabulary.size
    shapes = [shape] if shape is not None else largest_shapes(run, stage)
    plans = [_plan(run, stage, settings, words, each, ranks, device) for each in shapes]
    return max(plans, key=lambda plan: plan.total)


def architecture_of(run: RunConfig, stage: Stage) -> AnyArchitecture:
    """Of the trained model; the engine stage's student has the CMLM's but for its dropout."""
    if stage == "teacher":
        return run.teacher.architecture
    if stage == "cmlm" or "architecture" not in run.engine.model_fields_set:
        return run.cmlm.architecture
    asked = run.engine.architecture
    given = asked.model_fields_set & {"dropout", "attention_dropout", "activation_dropout"}
    return run.cmlm.architecture.model_copy(update={name: getattr(asked, name) for name in given})


def largest_shapes(run: RunConfig, stage: Stage) -> list[Shape]:
    """The micro-batches among which the largest is: the longest sentences that filters, positions and budget allow, and
    short ones, B max(S, T) <= max_tokens."""
    batch = getattr(run, stage).batch
    longest = min(
        run.data.filters.max_tokens, architecture_of(run, stage).max_positions - (stage != "teacher"), batch.max_tokens
    )
    shapes = []
    for length in sorted({longest, *(part for part in (8, 16, 32, 64) if part < longest)}):
        sentences = min(batch.max_tokens // length, batch.max_sentences or batch.max_tokens)
        shapes.append(Shape(sentences, length, length))
    return shapes


def _plan(
    run: RunConfig, stage: Stage, settings: TrainConfig, words: int, shape: Shape, ranks: int, device: Device
) -> MemoryPlan:
    architecture = transformer(architecture_of(run, stage), stage)
    sizes = sizes_of(architecture, words, cmlm=stage != "teacher")
    if stage == "teacher":
        tape = teacher_tape(run.teacher, words, shape, device)
    elif stage == "cmlm":
        tape = cmlm_tape(run.cmlm, words, shape, device)
    else:
        tape = engine_tape(run.engine, architecture, _teacher_architecture(run), words, shape, device)
    zero = Zero(sizes, settings, ranks, run.deepspeed, device)
    held, host = zero.held()
    per_rank = settings.batch.per_rank(ranks)
    if stage == "engine":
        held["teacher"] = _teacher(run, words, ranks)
        if run.engine.teacher_placement == "replicated":  # encoded once an update, for all its micro-batches
            held["activations"] = per_rank * _states(run, shape)
    peaks = _walk(tape, zero, held, per_rank > 1)
    peaks["step"] = held + zero.stepping()
    # Both collect the whole model in float32 in the host's memory: validation if it judges a copy.
    whole = 4 * sizes.total if device == "cpu" else 0
    tables = validation(run, stage, words, shape)
    copied = whole if zero.validates_a_copy else 0
    # The average takes the weights' place by an exchange.
    exchanged = 4 * zero.shard if settings.ema_decay and not settings.offload.optimizer else 0
    small = zero.persistent()
    peaks["validation"] = held + Counter(weights=small, activations=tables, copies=copied + exchanged)
    peaks["checkpoint"] = held + Counter(weights=small, copies=whole + exchanged)
    host["copies"] += 0 if whole else 4 * sizes.total
    moment = max(peaks, key=lambda name: peaks[name].total())
    terms = {term: peaks[moment][term] for term in TERMS if term != "teacher" or stage == "engine"}
    return MemoryPlan(
        stage, ranks, terms, {term: host[term] for term in terms}, moment,
        {name: bytes_.total() for name, bytes_ in peaks.items()}, shape, sizes.total,
    )  # fmt: skip


def _walk(tape: list[Block], zero: Zero, held: Bytes, accumulated: bool) -> dict[str, Bytes]:
    """The largest point of the forward and of the backward pass over the blocks."""
    peaks: dict[str, Bytes] = {}

    def note(name: str, *parts: Bytes) -> None:
        now: Bytes = Counter(held)
        now["weights"] += zero.gathered()
        for part in parts:
            now.update(part)
        if name not in peaks or now.total() > peaks[name].total():
            peaks[name] = now

    before = zero.gradients(0, accumulated=accumulated)
    note("forward", before, Counter(workspace=zero.gathering()))
    saved = 0
    for block in tape:
        saved += block.saved
        note("forward", before, Counter(activations=saved, workspace=block.forward))
    done, pending = 0, [block for block in tape if block.pending]
    waiting: list[Block] = []
    for block in reversed(tape):
        done += block.parameters
        extra = sum(other.pending for other in waiting)
        gradients = zero.gradients(done, accumulated=accumulated)
        note("backward", gradients, Counter(activations=saved, workspace=block.backward + extra))
        saved -= block.saved
        waiting = [other for other in waiting if other.until != block.name] + ([block] if block in pending else [])
    return peaks


def _teacher(run: RunConfig, words: int, ranks: int) -> int:
    """Whole on every rank; sharded over them, its weights are gathered to be used."""
    size = sizes_of(_teacher_architecture(run), words, cmlm=False)
    width = _teacher_bytes(run)
    whole = width * (size.total + size.buffers)
    if run.engine.teacher_placement == "replicated" or ranks == 1:
        return whole
    zero = run.deepspeed.get("zero_optimization", {})
    live = int(zero.get("stage3_max_live_parameters", DEFAULTS["stage3_max_live_parameters"]))
    return min(whole, width * live) + -(-whole // ranks)


def _states(run: RunConfig, shape: Shape) -> int:
    """Of the teacher's encoder, for a micro-batch."""
    return shape.sentences * shape.source * _teacher_architecture(run).width * _teacher_bytes(run)


def _teacher_architecture(run: RunConfig) -> Architecture:
    return transformer(run.teacher.architecture, "teacher")


def _teacher_bytes(run: RunConfig) -> int:
    return BYTES[run.engine.teacher_precision or run.engine.precision]
