"""Prometheus metrics under vLLM's names with octad's prefix, so that its boards and pickers work after a rename.

    metrics = Metrics(engine, "mixture"); metrics.began(id, prompt_tokens); metrics.heard(id, delta, names)
    metrics.text()                        # what /metrics answers

Gauges are read when asked, from outside of the engine's thread; everything else is noted as deltas pass by and counted
when asked, since a delta is a token and must cost next to nothing.
"""

from __future__ import annotations

import time
from collections import Counter as CountOf
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from octad.engine.engine import Engine
    from octad.engine.outputs import Delta

KEPT = 1000  # times that are noted before they are counted
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass
class _Timed:
    began: float
    latest: float | None = None


class Metrics:
    """One registry for one server."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._labels, self._model = ["model_name"], model
        self._timed: dict[str, _Timed] = {}
        self._times: list[tuple[Histogram, float]] = []
        self._tokens = 0
        self._speakers: CountOf[str] = CountOf()
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens of answers.")
        self.hits = self._counter(
            "prefix_cache_hits", "Tokens of prompts that were found in the prefix cache."
        )
        self.queries = self._counter("prefix_cache_queries", "Tokens of prompts that were looked for in it.")
        self.first = self._histogram("time_to_first_token_seconds", "From a request to its first token.")
        self.between = self._histogram("inter_token_latency_seconds", "Between two tokens of an answer.")
        self.whole = self._histogram("e2e_request_latency_seconds", "From a request to its end.")
        self.success = Counter(
            "octad:request_success",
            "Answers that ended, by their reason.",
            [*self._labels, "finished_reason"],
            registry=self.registry,
        )
        self.experts = Counter(
            "octad:expert_tokens",
            "Tokens of answers by their speaker.",
            [*self._labels, "expert"],
            registry=self.registry,
        )

    def watch(self, engine: Engine) -> None:
        """Add what is read from the engine when somebody asks."""
        self._gauge("num_requests_running", "Answers in progress.", lambda: engine.stats.running)
        self._gauge("num_requests_waiting", "Answers that wait.", lambda: engine.stats.waiting)
        self._gauge(
            "kv_cache_usage_perc",
            "Share of the key/value cache in use, 0 to 1.",
            lambda: 1 - engine.stats.free_blocks / engine.stats.num_blocks,
        )
        self._gauge(
            "num_preemptions", "Answers that gave way to older ones.", lambda: engine.stats.preemptions
        )

    def began(self, request_id: str, prompt_tokens: int) -> None:
        """A request was queued."""
        self._timed[request_id] = _Timed(time.monotonic())
        self.prompt_tokens.inc(prompt_tokens)
        self.queries.inc(prompt_tokens)

    def heard(self, request_id: str, delta: Delta, names: Sequence[str]) -> None:
        """A request got something."""
        timed = self._timed.get(request_id)
        if timed is None:
            return
        now = time.monotonic()
        if timed.latest is None:
            self._times.append((self.first, now - timed.began))
            self.hits.inc(delta.num_cached_tokens)
        else:
            self._times.append((self.between, now - timed.latest))
            if len(self._times) >= KEPT:
                self._count()
        timed.latest = now
        self._tokens += len(delta.token_ids)
        for speaker in delta.speakers or ():
            self._speakers[names[speaker]] += 1
        if delta.finish_reason is not None:
            self.success.labels(self._model, delta.finish_reason).inc()
            self.whole.observe(now - timed.began)

    def closed(self, request_id: str) -> None:
        """A request is over."""
        self._timed.pop(request_id, None)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        self._count()
        return generate_latest(self.registry)

    def _count(self) -> None:
        """What was noted."""
        times, self._times = self._times, []
        for histogram, seconds in times:
            histogram.observe(seconds)
        tokens, self._tokens = self._tokens, 0
        self.generation_tokens.inc(tokens)
        for name, said in self._speakers.items():
            self.experts.labels(self._model, name).inc(said)
        self._speakers.clear()

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(f"octad:{name}", about, self._labels, registry=self.registry).labels(self._model)

    def _histogram(self, name: str, about: str) -> Histogram:
        made = Histogram(f"octad:{name}", about, self._labels, buckets=SECONDS, registry=self.registry)
        return made.labels(self._model)

    def _gauge(self, name: str, about: str, read: object) -> None:
        gauge = Gauge(f"octad:{name}", about, self._labels, registry=self.registry)
        gauge.labels(self._model).set_function(read)  # type: ignore[arg-type]
