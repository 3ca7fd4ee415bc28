"""What the server counts, for Prometheus. Labels take few values, whatever is asked."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kd_assets.replay.answering import Answer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"
"""The route of requests to addresses that there are none of."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Counters of one server."""

    def __init__(self, *, documents: int, index_bytes: int) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "kd_replay_requests", "Requests by route and HTTP status", ("route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "kd_replay_request_seconds",
            "From a request's head to its answer",
            ("route",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._positions = Counter(
            "kd_replay_positions", "Positions whose log-probabilities were given", registry=self._registry
        )
        self._misses = Counter(
            "kd_replay_misses", "Requests for a sequence or a row that is not in the cache", registry=self._registry
        )
        self.in_flight = Gauge("kd_replay_in_flight", "Requests being read or answered", registry=self._registry)
        of_index = {"kd_replay_documents": documents, "kd_replay_index_bytes": index_bytes}
        for name, value in of_index.items():
            Gauge(name, "Of the index in memory", registry=self._registry).set(value)

    def answered(self, answer: Answer) -> None:
        """Count what an answer tells of."""
        self._positions.inc(answer.n_positions)
        if answer.is_miss:
            self._misses.inc()

    def finished(self, route: str, status: int, seconds: float) -> None:
        """Count a request. `route`: one of the server's own, or `OTHER`."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)
