"""What /metrics shows, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def seconds(name: str, what: str) -> Histogram:
            return Histogram(name, what, buckets=_SECONDS, registry=registry)

        self.responses = Counter("lococo_responses", "Answers by status", ["path", "status"], registry=registry)
        self.prompt_tokens = Counter("lococo_prompt_tokens", "Tokens of prompts", registry=registry)
        self.cached_tokens = Counter("lococo_cached_tokens", "Of those, found in a snapshot", registry=registry)
        self.generated_tokens = Counter("lococo_generated_tokens", "Tokens generated", registry=registry)
        self.cancelled = Counter("lococo_cancelled", "Requests whose client went away", registry=registry)
        self.snapshot_errors = Counter(
            "lococo_snapshot_errors", "Snapshots not kept or not readable", registry=registry
        )
        self.running = Gauge("lococo_running_requests", "Requests that have a session", registry=registry)
        self.waiting = Gauge("lococo_waiting_requests", "Requests in the queue", registry=registry)
        self.snapshots = Gauge("lococo_snapshots", "Conversations kept", registry=registry)
        self.state_bytes = Gauge("lococo_state_bytes", "Bytes of a session's state", registry=registry)
        self.queue_seconds = seconds("lococo_queue_seconds", "Waiting for a session")
        self.first_token_seconds = seconds("lococo_first_token_seconds", "From the request to its first token")
        self.step_sessions = Histogram(
            "lococo_step_sessions", "Sessions that one forward stepped", buckets=(1, 2, 4, 8, 16, 32), registry=registry
        )
        self.token_seconds = seconds("lococo_token_seconds", "Between two tokens of an answer")
