"""What clients send and get, as FastAPI checks it and writes it into /openapi.json."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from engine_fast.inference.serving.systems import Wish

Name = Literal["engine", "cmlm", "teacher"]
MAX_COUNT = 20
"""Passes, length candidates or hypotheses that a request may ask for."""


def _whole(value: Any) -> Any:
    """In JSON 2.0 is an integer too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, Field(ge=1, le=MAX_COUNT), BeforeValidator(_whole)]


class Decoding(BaseModel):
    """What both kinds of requests may ask for; left out, the model's own settings are used."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    model: Name | None = None
    """Which of the served models; the first one that was given to `engine-fast serve`, if left out."""
    iterations: Count | None = None
    """Mask-predict passes of a student."""
    length_beam: Count | None = None
    """Length candidates of a student."""
    beam: Count | None = None
    """Hypotheses of the teacher's beam search; 1 is greedy."""
    rerank: bool = False
    """Let the teacher choose among a student's length candidates."""

    def wish(self, *, explain: bool = False) -> Wish:
        return Wish(self.iterations, self.length_beam, self.beam, self.rerank, explain)


class TranslateRequest(Decoding):
    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["sentences"]}, {"required": ["text"]}]},
    )

    sentences: list[str] = []
    """Sentences, each translated by itself; either these or `text`."""
    text: str = ""
    """Lines, each translated by itself."""
    details: bool = False
    """Whether to tell the tokens and scores of each translation."""

    @model_validator(mode="after")
    def _one_of_both(self) -> TranslateRequest:
        if ("sentences" in self.model_fields_set) == ("text" in self.model_fields_set):
            raise ValueError("give either `sentences` or `text`")
        return self

    @property
    def lines(self) -> list[str]:
        return self.sentences if "sentences" in self.model_fields_set else self.text.split("\n")


class ExplainRequest(Decoding):
    text: str
    """One sentence."""


class Detail(BaseModel):
    """Of one translation."""

    tokens: list[str]
    """Pieces of the target vocabulary, the end symbol last."""
    score: float
    """What it was ranked by; higher is better."""
    log_probability: float
    """Sum over its tokens, in nats."""
    num_source_tokens: int
    """The end symbol included."""
    num_unknown: int
    """Source pieces that the vocabulary lacks."""
    truncated: bool
    """Whether the source was cut to the model's positions."""


class TranslateResponse(BaseModel):
    model: Name
    translations: list[str]
    """One for each sentence, in order; an empty sentence stays empty."""
    seconds: float
    """From the request's arrival to its translations, waiting included."""
    warnings: list[str]
    """What was asked for without effect, sentences that were cut, pieces that the vocabulary lacks."""
    details: list[Detail] | None = None


class Served(BaseModel):
    """One model of the service."""

    name: Name
    kind: str
    student: bool
    refines: bool
    """Whether further mask-predict passes change anything."""
    iterations: int
    length_beam: int
    beam: int
    max_tokens: int
    """Longest source in pieces, the end symbol included; longer ones are cut."""


class Health(BaseModel):
    status: Literal["starting", "ready", "failed", "stopping"]
    models: list[Served]
    """The one that answers by default first."""
    reranks: bool
    """Whether a teacher is there to choose among length candidates, and to give energies."""
    max_characters: int
    max_sentences: int
    versions: dict[str, str]


class Problem(BaseModel):
    detail: str


PROBLEMS: dict[int, str] = {
    400: "The body is not text in UTF-8, or cannot be read.",
    404: "This model is not served here.",
    408: "The body took too long to arrive.",
    413: "The body is too large.",
    415: "The body is not said to be JSON.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "A sentence could not be translated: a bug, or out of memory.",
    503: "The service is starting or ending.",
    504: "The translation took too long and was given up.",
}
