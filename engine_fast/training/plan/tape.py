"""The three objectives' forward passes as blocks: stacks, heads and losses. Letters as in activations.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine_fast.config import Architecture, CMLMConfig, EngineConfig, RunConfig, TrainConfig
from engine_fast.errors import ConfigError
from engine_fast.training.plan.activations import Block, Numerics, Shape, masked_rows, stack, without_graph
from engine_fast.training.plan.sizes import Sizes, sizes_of, transformer

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_TILE_BYTES = {"cpu": 128 << 20, "cuda": 64 << 20}
"""csrc/aten/rows.cpp: scratch of the fused heads."""
_ROW_MULTIPLE = 32
_SOFTMAX_VALUES = 1 << 20
"""csrc/aten/soft_embedding.cpp: values of a softmax that exist at a time."""


def teacher_tape(config: TrainConfig, vocabulary: int, shape: Shape, device: str) -> list[Block]:
    """Label-smoothed cross-entropy of every target position."""
    architecture = transformer(config.architecture, "teacher")
    sizes = sizes_of(architecture, vocabulary, cmlm=False)
    numerics = _numerics(config, device)
    blocks = [*_encoder(architecture, sizes, shape, numerics), *_decoder(architecture, sizes, shape, numerics)]
    return blocks + _cross_entropy(architecture, sizes, vocabulary, shape.sentences * shape.target, numerics)


def cmlm_tape(config: CMLMConfig, vocabulary: int, shape: Shape, device: str) -> list[Block]:
    """The same of the masked positions, and of the length."""
    architecture = transformer(config.architecture, "cmlm")
    sizes = sizes_of(architecture, vocabulary, cmlm=True)
    numerics = _numerics(config, device)
    blocks = _student(architecture, sizes, shape, numerics)
    return blocks + _cross_entropy(architecture, sizes, vocabulary, masked_rows(shape), numerics)


def engine_tape(
    config: EngineConfig, student: Architecture, teacher: Architecture, vocabulary: int, shape: Shape, device: str
) -> list[Block]:
    """Student, its head and O1; the frozen teacher's encoder without and decoder with a graph; its head and O2."""
    if config.ensemble:
        raise ConfigError(
            f"engine.ensemble has {len(config.ensemble)} members, expected none, because the memory plan does not read "
            "their sizes. Plan with --set engine.ensemble=[] and add, for each, its weights, and its decoder's "
            "activations and logits, which are about the teacher's."
        )
    sizes, of_teacher = sizes_of(student, vocabulary, cmlm=True), sizes_of(teacher, vocabulary, cmlm=False)
    frozen = Numerics(
        BYTES[config.teacher_precision or config.precision], device,
        training=config.teacher_dropout, frozen=True, checkpointing=config.teacher_checkpointing,
    )  # fmt: skip
    states = shape.sentences * shape.source * teacher.width * frozen.bytes
    encoding = []
    if config.teacher_placement == "sharded":  # else it has been done before, for all micro-batches of the update
        encoder = stack(teacher, of_teacher, shape, replace(frozen, graph=False, checkpointing=False), decoder=False)
        encoding.append(without_graph(encoder, result=states))
    decoder = stack(teacher, of_teacher, shape, frozen, decoder=True)
    log_probabilities = "STL" in (config.o1, config.o2) and config.stl_logits == "log_probabilities"
    whole_logits = config.cross_entropy_weight or config.repetition_weight or log_probabilities
    keep = config.head_memory == "keep" or bool(whole_logits)
    head, energy = (_kept_heads if keep else _recomputed_heads)(
        config, sizes, teacher, vocabulary, shape, frozen, student
    )
    end = shape.sentences * vocabulary * 4
    whole = []
    if log_probabilities:
        own, table = BYTES[config.precision], end * (shape.target - 1)  # float32, in the place of the logits
        whole.append(Block("log-probabilities", saved=table * (4 - own) // 4, forward=table, backward=table))
    if config.cross_entropy_weight:
        table = end * shape.target
        whole.append(Block("cross-entropy", saved=table, forward=2 * table, backward=2 * table))
    if config.repetition_weight:
        table = end * (shape.target - 1)
        whole.append(Block("repetition", saved=table, forward=table, backward=3 * table))
    return [
        *_student(student, sizes, shape, _numerics(config, device)),
        head,
        *whole,
        *encoding,
        *decoder,
        energy,
        Block("end symbol", saved=end, forward=end, backward=end),
    ]


def validation(run: RunConfig, stage: str, vocabulary: int, shape: Shape) -> int:
    """Bytes of the largest tables of a dev batch's loss, none of them kept for a backward pass.

    Logits in the model's dtype, in float32, and their log-softmax; ENGINE has the student's logits beside them.
    """
    rows = shape.sentences * shape.target
    if stage != "engine":
        own = BYTES[getattr(run, stage).precision]
        return rows * vocabulary * (8 if own == 4 else 8 + own)
    own = BYTES[run.engine.precision]
    return rows * vocabulary * 8 + shape.sentences * (shape.target - 1) * vocabulary * own


def _kept_heads(
    config: EngineConfig, sizes: Sizes, teacher: Architecture, vocabulary: int, shape: Shape, frozen: Numerics,
    student: Architecture,
) -> tuple[Block, Block]:  # fmt: skip
    """head_memory: keep. Both (M, V) logits stay; the teacher's become the student's gradient where they stand."""
    own, theirs = BYTES[config.precision], frozen.bytes
    rows = shape.sentences * (shape.target - 1)
    hidden, logits, table = rows * student.width * own, rows * vocabulary * own, vocabulary * student.width
    tile = _tile(rows, 2 * vocabulary * max(own, theirs), frozen.device) * vocabulary
    softmax = rows * min(vocabulary, max(512, vocabulary // 8, _SOFTMAX_VALUES // max(rows, 1))) * theirs
    head = Block(
        "head", saved=hidden + logits, forward=softmax,
        backward=tile * (theirs if own == theirs else own + theirs) + hidden + _wide_sum(own, table),
        **_of_head(sizes, own),
    )  # fmt: skip
    energy = Block(
        "energy",
        saved=rows * (vocabulary * theirs + 24 + teacher.width * theirs),
        forward=_tile(rows, 2 * vocabulary * theirs, frozen.device) * vocabulary * theirs,
        backward=0 if own == theirs else logits,
        pending=logits,
        until="head",
    )
    return head, energy


def _recomputed_heads(
    config: EngineConfig, sizes: Sizes, teacher: Architecture, vocabulary: int, shape: Shape, frozen: Numerics,
    student: Architecture,
) -> tuple[Block, Block]:  # fmt: skip
    """head_memory: recompute. Logits exist for a tile of rows; the energy's gradients are made in its forward."""
    own, theirs, device = BYTES[config.precision], frozen.bytes, frozen.device
    rows, table = shape.sentences * (shape.target - 1), vocabulary * student.width
    hidden, of_teacher = rows * student.width * own, rows * teacher.width * theirs
    again = _tile(rows, 2 * vocabulary * max(own, theirs), device) * vocabulary
    head = Block(
        "head", saved=hidden, forward=_tile(rows, vocabulary * own, device) * vocabulary * own,
        backward=again * (own + theirs if own == theirs else 2 * own + theirs) + hidden + _wide_sum(own, table),
        **_of_head(sizes, own),
    )  # fmt: skip
    per_row = vocabulary * (own + theirs)
    both = _tile(rows, per_row, device) * per_row
    made = hidden + table * own
    if config.precision == "fp16":  # gradients made before the loss scale is known would leave its range
        return head, Block(
            "energy", saved=of_teacher, forward=both, backward=both + of_teacher, pending=made, until="head"
        )
    saved, wide = made + of_teacher, _wide_sum(own, table)
    return head, Block("energy", saved=saved, forward=both + wide, pending=made, until="head")


def _of_head(sizes: Sizes, own: int) -> dict[str, Any]:
    """What its backward leaves: the gradient of the output table, or, tied to the source's, its first part."""
    if sizes.head or sizes.target_table:
        return {"parameters": sizes.head or sizes.target_table}
    return {"pending": sizes.source_table * own, "until": "encoder embedding"}


def _wide_sum(own: int, table: int) -> int:
    """Half-precision products of several tiles are added up in float32."""
    return 4 * table if own < 4 else 0


def _numerics(config: TrainConfig, device: str) -> Numerics:
    return Numerics(BYTES[config.precision], device, checkpointing=config.activation_checkpointing)


def _encoder(architecture: Architecture, sizes: Sizes, shape: Shape, numerics: Numerics) -> list[Block]:
    blocks = stack(architecture, sizes, shape, numerics, decoder=False, table=sizes.source_table)
    states = shape.sentences * shape.source * architecture.width * numerics.bytes
    return [*blocks, Block("encoder states", saved=states)]


def _decoder(architecture: Architecture, sizes: Sizes, shape: Shape, numerics: Numerics) -> list[Block]:
    table = sizes.target_table if sizes.head else 0  # a tied table is complete, and counted, at the head
    return stack(architecture, sizes, shape, numerics, decoder=True, table=table)


def _student(architecture: Architecture, sizes: Sizes, shape: Shape, numerics: Numerics) -> list[Block]:
    """A CMLM's stacks: a length token in front of the source, lengths scored from its state, the rest copied."""
    blocks = stack(architecture, sizes, shape, numerics, decoder=False, prefix=1, table=sizes.source_table)
    memory = shape.sentences * shape.source * architecture.width * numerics.bytes
    states = memory + shape.sentences * architecture.width * numerics.bytes
    lengths = 4 * shape.sentences * architecture.max_positions
    table = sizes.target_table if sizes.head else 0
    decoder = stack(architecture, sizes, shape, numerics, decoder=True, table=table)
    length = Block(
        "length", saved=states + memory + lengths, parameters=sizes.length_table, forward=lengths, backward=states
    )
    return [*blocks, length, *decoder]


def _cross_entropy(
    architecture: Architecture, sizes: Sizes, vocabulary: int, rows: int, numerics: Numerics
) -> list[Block]:
    """Logits in the model's dtype; their log-softmax in float32 is what stays.

    The loss's backward has the gradients of log-probabilities and of logits beside it, each (rows, V) in float32.
    """
    own, table = numerics.bytes, rows * vocabulary * 4
    logits = rows * vocabulary * own
    hidden = rows * architecture.width * own
    return [
        Block("head", saved=hidden, backward=hidden, **_of_head(sizes, own)),
        Block(
            "loss",
            saved=table,
            forward=table + (logits if own < 4 else 0),
            backward=2 * table,
            pending=logits,
            until="head",
        ),
    ]


def _tile(rows: int, bytes_per_row: int, device: str) -> int:
    """Rows of a tile: csrc/aten/rows.cpp, rows_per_tile."""
    most = max(_ROW_MULTIPLE, _TILE_BYTES[device] // max(1, bytes_per_row))
    tiles = max(1, -(-rows // most))
    even = -(-rows // tiles)
    return max(1, rows) if tiles == 1 else min(most, -(-even // _ROW_MULTIPLE) * _ROW_MULTIPLE)
