"""What GET /metrics tells, in a registry of its own, so that two services in one process do not meet."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SENTENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """Counters of one service. All methods may be called from any thread."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "engine_fast_requests", "Requests answered.", ["path", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "engine_fast_request_seconds", "From request to answer.", ["path"], buckets=_SECONDS, registry=self.registry
        )
        self._queue = Gauge(
            "engine_fast_queue_sentences", "Sentences that wait for a batch.", ["model"], registry=self.registry
        )
        self._batches = Histogram(
            "engine_fast_batch_sentences",
            "Sentences in a batch.",
            ["model"],
            buckets=_SENTENCES,
            registry=self.registry,
        )
        self._batch_seconds = Histogram(
            "engine_fast_batch_seconds", "Time of a batch.", ["model"], buckets=_SECONDS, registry=self.registry
        )
        self._tokens = Counter(
            "engine_fast_tokens", "Tokens read and written.", ["model", "side"], registry=self.registry
        )
        self._dropped = Counter(
            "engine_fast_dropped_requests",
            "Requests given up: the client had gone, or their time was up.",
            ["reason"],
            registry=self.registry,
        )

    def watch_queue(self, model: str, length: Callable[[], int]) -> None:
        """`length` is asked whenever somebody reads the metrics."""
        self._queue.labels(model).set_function(length)

    def answered(self, path: str, status: int, seconds: float) -> None:
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def ran(self, model: str, num_sentences: int, seconds: float) -> None:
        self._batches.labels(model).observe(num_sentences)
        self._batch_seconds.labels(model).observe(seconds)

    def translated(self, model: str, num_source: int, num_target: int) -> None:
        self._tokens.labels(model, "source").inc(num_source)
        self._tokens.labels(model, "target").inc(num_target)

    def dropped(self, reason: str) -> None:
        self._dropped.labels(reason).inc()

    def text(self) -> bytes:
        return bytes(generate_latest(self.registry))
