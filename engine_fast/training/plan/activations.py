"""What a forward pass keeps for the backward pass, block by block, by formula.

B sentences, S source and T target positions, N = tokens of a stack (B S or B T), D width, F feed-forward width,
H heads, V vocabulary, M = B (T - 1) rows that ENGINE's student fills. `a` is the bytes of a value of the model.

tests/training/test_plan_activations.py compares the sums with what torch.autograd really keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from engine_fast.config import Architecture
from engine_fast.training.plan.sizes import Sizes


@dataclass(frozen=True)
class Shape:
    """A micro-batch, padding included."""

    sentences: int
    source: int
    target: int
    masked: int | None = None
    """Rows that the CMLM predicts; None: as many as it does nearly always, see `masked_rows`."""


@dataclass(frozen=True)
class Block:
    """One step of the forward pass, bytes."""

    name: str
    saved: int = 0
    """Kept from its forward to its backward."""
    parameters: int = 0
    """Values of weights whose gradient its backward completes."""
    forward: int = 0
    """Needed besides while it runs forward."""
    backward: int = 0
    """Needed besides while it runs backward; gradients of weights apart."""
    pending: int = 0
    """Made by its backward for that of an earlier block..."""
    until: str = ""
    """... of this name, after which it is freed."""


@dataclass(frozen=True)
class Numerics:
    """Where and how a stack computes."""

    bytes: int
    """Of a value: 4, or 2 in half precision."""
    device: str
    training: bool = True
    """Dropout on."""
    frozen: bool = False
    """No weight gets a gradient: inputs of linear maps need not be kept."""
    checkpointing: bool = False
    graph: bool = True
    """False under no_grad."""


def masked_rows(shape: Shape) -> int:
    """Rows the CMLM predicts: 1..T of each sentence, uniformly. Mean B (T + 1) / 2; here three deviations more."""
    if shape.masked is not None:
        return shape.masked
    mean, deviation = (shape.target + 1) / 2, math.sqrt((shape.target**2 - 1) / 12)
    likely = shape.sentences * mean + 3 * deviation * math.sqrt(shape.sentences)
    return min(shape.sentences * shape.target, round(likely))


def stack(
    architecture: Architecture,
    sizes: Sizes,
    shape: Shape,
    numerics: Numerics,
    *,
    decoder: bool,
    prefix: int = 0,
    table: int = 0,
) -> list[Block]:
    """Embedding, layers and final norm of an encoder or decoder.

    prefix: positions in front of every source (1 for a CMLM). table: parameters of the embedding that this stack's
    backward completes.
    """
    a, width = numerics.bytes, architecture.width
    length = shape.target if decoder else shape.source + prefix
    tokens = shape.sentences * length
    row = tokens * width * a
    dropped = tokens * width * _dropout(architecture.dropout, numerics)
    name = "decoder" if decoder else "encoder"
    embedded = 0 if numerics.frozen else 8 * tokens
    positions = 0 if numerics.frozen else sizes.positions // 2
    dense = 0 if numerics.frozen or table else sizes.source_table * a  # added to the gradient that the head has made
    blocks = [
        Block(
            f"{name} embedding", saved=embedded + dropped, parameters=table + positions,
            forward=3 * row, backward=2 * row + dense,
        )
    ]  # fmt: skip
    parts = [_attention(architecture, shape, numerics, tokens, length, length)]
    if decoder:
        parts.append(_attention(architecture, shape, numerics, tokens, length, shape.source, cross=True))
    parts.append(_feed_forward(architecture, numerics, tokens))
    parameters = 0 if numerics.frozen else sizes.decoder_layer if decoder else sizes.encoder_layer
    layers = architecture.decoder_layers if decoder else architecture.encoder_layers
    for index in range(layers):
        named = [replace(part, name=f"{name} {index} {part.name}") for part in parts]
        named[0] = replace(named[0], parameters=parameters)
        blocks += [_checkpointed(named, row)] if numerics.checkpointing else named
    if architecture.norm == "pre":
        norm = row + _statistics(tokens, numerics)
        blocks.append(
            Block(f"{name} norm", saved=norm, parameters=0 if numerics.frozen else 2 * width, backward=2 * row)
        )
    return blocks


def without_graph(blocks: Iterable[Block], *, result: int) -> Block:
    """The same blocks under no_grad: one at a time, and their result."""
    return Block("encoder of the teacher", saved=result, forward=max(block.forward + block.saved for block in blocks))


def _attention(
    architecture: Architecture,
    shape: Shape,
    numerics: Numerics,
    tokens: int,
    queries: int,
    keys: int,
    *,
    cross: bool = False,
) -> Block:
    """Self-attention, or (cross) attention to the encoder.

    Kept: the input of the projections and of the output map; q, k and v; the fused kernels' row statistics, or, where
    the plain products run (a CPU in half precision, or with dropout on the weights), q, k, v in float32 and the
    (B, H, T, S) table of weights, three times with dropout; the residual sum and its norm's statistics; a dropout mask.
    """
    a, width, heads = numerics.bytes, architecture.width, architecture.heads
    row, memory = tokens * width, shape.sentences * keys * width
    weights = shape.sentences * heads * queries * keys
    dropped = numerics.training and architecture.attention_dropout > 0
    saved = row * a + _statistics(tokens, numerics) + row * _dropout(architecture.dropout, numerics)  # sum, norm
    if not numerics.frozen:
        saved += row * a  # what the norm (or the layer before) gives to the projections
    if numerics.device == "cpu" and (dropped or (a == 2 and numerics.graph)):
        key_value = 2 * memory if cross else 2 * row
        query = 0 if cross and numerics.frozen else row
        saved += 4 * (query + key_value) + 4 * weights * (3 if dropped else 1)
        saved += 0 if numerics.frozen else row * a  # input of the output map
        backward = 4 * (2 * weights + query + key_value) + 4 * row * a
        forward = 4 * 2 * weights + 3 * row * a
    else:
        saved += (row + 2 * memory if cross else 3 * row) * a + row * a
        saved += 4 * shape.sentences * heads * queries + a * shape.sentences * keys
        backward = (7 * row if not cross else 3 * row + 4 * memory) * a
        forward = 3 * row * a
    return Block(
        "attention to the source" if cross else "self-attention", saved=saved, forward=forward, backward=backward
    )


def _feed_forward(architecture: Architecture, numerics: Numerics, tokens: int) -> Block:
    """Kept: its input; for relu the activation, for gelu also what it was applied to; masks; residual sum and norm."""
    a, row, wide = numerics.bytes, tokens * architecture.width, tokens * architecture.ffn_width
    mask = _dropout(architecture.activation_dropout, numerics)
    saved = row * a + _statistics(tokens, numerics) + row * _dropout(architecture.dropout, numerics)
    saved += wide * a + wide * mask  # relu's result, gelu's argument
    if not numerics.frozen:
        saved += row * a
        saved += wide * a * ((architecture.activation == "gelu") or bool(mask))
    return Block("feed-forward", saved=saved, forward=wide * a + 2 * row * a, backward=(2 * wide + 2 * row) * a)


def _checkpointed(parts: list[Block], row: int) -> Block:
    """A layer that keeps its input only, and is computed again before its backward."""
    return Block(
        parts[0].name.rsplit(" ", 1)[0],
        saved=row,
        parameters=sum(part.parameters for part in parts),
        forward=max(part.saved + part.forward for part in parts),
        backward=sum(part.saved for part in parts) - row + max(part.backward for part in parts),
    )


def _dropout(probability: float, numerics: Numerics) -> int:
    """Bytes of the mask, a value."""
    return 1 if numerics.training and probability > 0 else 0


def _statistics(tokens: int, numerics: Numerics) -> int:
    """Mean and deviation of every row of a layer norm; the CPU keeps them in the dtype of the rows."""
    return 2 * tokens * (numerics.bytes if numerics.device == "cpu" else 4)
