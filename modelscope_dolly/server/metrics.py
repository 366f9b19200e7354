"""Counts and times for Prometheus, all under `dolly_`. Used by the thread of the event loop alone."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

#: Seconds over which tokens per second are counted.
WINDOW = 10.0
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """What has happened since the start of one server."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._recent = clock, deque[tuple[float, int]]()
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "dolly_requests", "Requests by endpoint and outcome.", ["endpoint", "outcome"], registry=registry
        )
        self.prompt_tokens = Counter("dolly_prompt_tokens", "Tokens of answered prompts.", registry=registry)
        self.generated_tokens = Counter("dolly_generated_tokens", "Tokens drawn.", registry=registry)
        self.first_token = Histogram(
            "dolly_time_to_first_token_seconds", "From accepting a request to its first token.",
            buckets=_FIRST, registry=registry,
        )  # fmt: skip
        self.between_tokens = Histogram(
            "dolly_time_between_tokens_seconds", "Between two tokens of an answer.",
            buckets=_BETWEEN, registry=registry,
        )  # fmt: skip
        self.running = Gauge("dolly_slots_in_use", "Answers in work.", registry=registry)
        self.waiting = Gauge("dolly_queue", "Answers waiting for a slot.", registry=registry)
        self.slots = Gauge("dolly_slots", "Answers that are worked on at the same time.", registry=registry)
        self.queue_limit = Gauge("dolly_queue_limit", "Answers that may wait.", registry=registry)
        self.speed = Gauge(
            "dolly_tokens_per_second", f"Tokens drawn per second, over the last {WINDOW:g} s.", registry=registry
        )
        self.speed.set_function(self._tokens_per_second)

    def tokens(self, count: int) -> None:
        """So many tokens have been drawn."""
        self.generated_tokens.inc(count)
        self._recent.append((self._clock(), count))
        self._forget()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def _forget(self) -> None:
        oldest = self._clock() - WINDOW
        while self._recent and self._recent[0][0] < oldest:
            self._recent.popleft()

    def _tokens_per_second(self) -> float:
        self._forget()
        return sum(count for _, count in self._recent) / WINDOW
