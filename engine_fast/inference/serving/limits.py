"""What one service takes on, so that no client and no number of them can make it fall over."""

from __future__ import annotations

from dataclasses import dataclass, fields

from engine_fast.errors import require


@dataclass(frozen=True, slots=True)
class Limits:
    """Counts, bytes and seconds; a request beyond one of them is refused with the status that is named."""

    max_body: int = 1 << 20
    """Bytes of a request's body (413)."""
    max_sentences: int = 256
    """Sentences of one request (422)."""
    max_characters: int = 2000
    """Characters of one sentence (422). Of what then is longer than the model's positions only the start is used."""
    max_queue: int = 4096
    """Sentences that wait for one model; a request that does not fit gets 429 and when to try again."""
    batch_tokens: int = 1024
    """Source tokens of one batch, padding included, times its length candidates or its beam. On a CPU a larger batch is
    hardly faster per sentence, and all of its sentences wait for the last one."""
    gather_seconds: float = 0.002
    """How long the first sentence to reach an idle model waits for others to share its batch."""
    body_seconds: float = 10.0
    """For a request's body to arrive (408)."""
    timeout_seconds: float = 30.0
    """For a request to be answered (504)."""
    drain_seconds: float = 30.0
    """For requests that were accepted before a signal to end."""
    max_connections: int = 2000
    """Open at once; beyond them a connection is told 503."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "gather_seconds" else 1e-3 if field.name.endswith("seconds") else 1
            require(value >= least, field.name, value, f"at least {least}")
        require(self.max_queue >= self.max_sentences, "max_queue", self.max_queue, f"at least {self.max_sentences}")
