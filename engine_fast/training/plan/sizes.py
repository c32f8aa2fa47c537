"""How many parameters a model has and where they stand, from its architecture alone."""

from __future__ import annotations

from dataclasses import dataclass

from engine_fast.config import AnyArchitecture, Architecture
from engine_fast.errors import ConfigError


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters; a tied table is counted once, where the first of its users stands."""

    source_table: int
    target_table: int
    """0 where it is the source's (tie: all)."""
    head: int
    """0 where it is the target table (tie: decoder, all)."""
    length_table: int
    """Of a CMLM; else 0."""
    positions: int
    """Learned, both stacks."""
    encoder_layer: int
    decoder_layer: int
    num_encoder_layers: int
    num_decoder_layers: int
    final_norms: int
    buffers: int
    """Values of sinusoidal tables, which are no parameters."""
    tensors: tuple[int, ...]
    """The size of every parameter tensor."""

    @property
    def total(self) -> int:
        return sum(self.tensors)

    @property
    def largest(self) -> int:
        return max(self.tensors)


def transformer(architecture: AnyArchitecture, stage: str) -> Architecture:
    """The architecture, whose memory can be planned. Raises ConfigError for any other."""
    if not isinstance(architecture, Architecture):
        raise ConfigError(
            f"{stage}.architecture.kind = {architecture.kind!r}: expected 'transformer', because the memory plan knows "
            f"no other networks. Plan the other stages (--stage), or train {stage} for a few updates and look."
        )
    return architecture


def sizes_of(architecture: Architecture, vocabulary: int, *, cmlm: bool) -> Sizes:
    """Of a Transformer (cmlm false) or a CMLM over `vocabulary` words on both sides.

    D = width, F = ffn_width, V = vocabulary, L = max_positions.
    encoder layer: 4 D^2 + 4 D (attention) + 2 D F + F + D (feed-forward) + 4 D (two norms);
    decoder layer: that, and 4 D^2 + 4 D + 2 D for the second attention. Tables: V D each.
    """
    width, ffn, length = architecture.width, architecture.ffn_width, architecture.max_positions
    attention = [3 * width**2, 3 * width, width**2, width]
    cross = [width**2, width, 2 * width**2, 2 * width, width**2, width]
    norm = [width, width]
    encoder_layer = [*attention, *norm, ffn * width, ffn, width * ffn, width, *norm]
    decoder_layer = [*encoder_layer, *cross, *norm]
    table = vocabulary * width
    learned = architecture.positions == "learned"
    target_table = 0 if architecture.tie == "all" else table
    head = table if architecture.tie == "none" else 0
    length_table = length * width if cmlm else 0
    final_norms = norm * 2 if architecture.norm == "pre" else []
    tensors = [
        table, target_table, head, length_table, *[length * width] * (2 * learned),
        *encoder_layer * architecture.encoder_layers, *decoder_layer * architecture.decoder_layers, *final_norms,
    ]  # fmt: skip
    return Sizes(
        source_table=table,
        target_table=target_table,
        head=head,
        length_table=length_table,
        positions=2 * length * width * learned,
        encoder_layer=sum(encoder_layer),
        decoder_layer=sum(decoder_layer),
        num_encoder_layers=architecture.encoder_layers,
        num_decoder_layers=architecture.decoder_layers,
        final_norms=sum(final_norms),
        buffers=0 if learned else 2 * length * width,
        tensors=tuple(size for size in tensors if size),
    )
