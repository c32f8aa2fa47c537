"""The shapes of the networks: transformer (teacher or CMLM), LSTM teacher, BiLSTM tagger."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, Tag, model_validator

from engine_fast.config.base import Section


class Architecture(Section):
    """Switches of an encoder-decoder transformer (paper section 4.2; PAPER facts name each default's origin)."""

    kind: Literal["transformer"] = "transformer"
    """Which of the architectures this is."""
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


class LSTMArchitecture(Section):
    """The seq2seq teacher: BiLSTM encoder, LSTM decoder, Luong's attention (paper section 4.2; its sizes)."""

    kind: Literal["lstm"] = "lstm"
    """Which of the architectures this is."""
    embedding_width: PositiveInt = 512
    """Of the source and the target table."""
    encoder_width: PositiveInt = 512
    """Units of the encoder in each direction."""
    encoder_layers: PositiveInt = 2
    """Encoder layers."""
    decoder_width: PositiveInt = 768
    """Units of the decoder, and width of what meets the vocabulary."""
    decoder_layers: PositiveInt = 2
    """Decoder layers."""
    input_feeding: bool = False
    """Feed each step's attentional vector to the next one; off, all positions are computed in parallel."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """On embeddings, between layers and on the attentional vectors."""
    max_positions: PositiveInt = 256
    """Longest side, end symbol included."""


class TaggerArchitecture(Section):
    """The BiLSTM tagger as inference network: a BiLSTM over the source, stretched to the target's length, and a linear
    layer (paper section 4.2)."""

    kind: Literal["bilstm"] = "bilstm"
    """Which of the architectures this is."""
    embedding_width: PositiveInt = 512
    """Of the source table."""
    width: PositiveInt = 512
    """Units in each direction."""
    layers: PositiveInt = 2
    """BiLSTM layers."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """On embeddings, between layers and on their outputs."""
    max_positions: PositiveInt = 256
    """Longest side, end symbol included; also the number of length classes."""


def _kind(value: Any) -> Any:
    """A section without `kind` is a transformer."""
    return value.get("kind", "transformer") if isinstance(value, dict) else getattr(value, "kind", None)


TeacherArchitecture = Annotated[
    Annotated[Architecture, Tag("transformer")] | Annotated[LSTMArchitecture, Tag("lstm")], Discriminator(_kind)
]
StudentArchitecture = Annotated[
    Annotated[Architecture, Tag("transformer")] | Annotated[TaggerArchitecture, Tag("bilstm")], Discriminator(_kind)
]
AnyArchitecture = Architecture | LSTMArchitecture | TaggerArchitecture
