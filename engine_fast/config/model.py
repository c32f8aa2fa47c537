"""The shape of a transformer, teacher or CMLM."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from engine_fast.config.base import Section


class Architecture(Section):
    """Switches of an encoder-decoder transformer (paper section 4.2; PAPER facts name each default's origin)."""

    width: PositiveInt = 512
    """Model width D."""
    ffn_width: PositiveInt = 2048
    """Hidden width of the feed-forward blocks."""
    heads: PositiveInt = 8
    """Attention heads; divides width."""
    encoder_layers: PositiveInt = 6
    """Encoder blocks."""
    decoder_layers: PositiveInt = 6
    """Decoder blocks."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """On embeddings and block outputs."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """On attention weights."""
    activation_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Inside the feed-forward blocks."""
    norm: Literal["post", "pre"] = "post"
    """Where layer norm stands relative to the residual sum; pre adds a final norm to each stack."""
    norm_epsilon: PositiveFloat = 1e-5
    """Epsilon of every layer norm."""
    positions: Literal["sinusoidal", "learned"] = "sinusoidal"
    """Position table."""
    max_positions: PositiveInt = 256
    """Longest side, end symbol included; also the number of length classes of a CMLM."""
    activation: Literal["relu", "gelu"] = "relu"
    """Feed-forward activation; gelu is the erf form."""
    tie: Literal["none", "decoder", "all"] = "decoder"
    """Which tables are one: decoder = decoder input and output, all = encoder too (joint vocabulary)."""
    scale_embedding: bool = True
    """Multiply embeddings by sqrt(width)."""
    init: Literal["xavier", "normal"] = "xavier"
    """Weights ~ Xavier uniform, or N(0, init_std) as the CMLM does."""
    init_std: NonNegativeFloat = 0.02
    """Standard deviation of the normal init."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Architecture:
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide width = {self.width}")
        return self
