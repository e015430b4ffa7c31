"""What /metrics says, under vLLM's names with `distill:` in front, so that a dashboard needs one word changed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from teacher.engine import EngineStats
    from teacher.requests import Update

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "distill:"
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_WHOLE = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)


class Metrics:
    """`stats` is the engine's last word, left here after each step; the histograms are fed as updates come."""

    def __init__(self, model: str) -> None:
        self.stats: EngineStats | None = None
        self._model = model
        self._registry = CollectorRegistry()
        self._registry.register(self)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(_PREFIX + name, text, ["model_name"], buckets=buckets, registry=self._registry)
            return family.labels(model)

        self._first = histogram("time_to_first_token_seconds", "Of streams: from arrival to the first token", _FIRST)
        self._between = histogram("inter_token_latency_seconds", "Of streams: between tokens of one sequence", _BETWEEN)
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the last token", _WHOLE)
        self._finished = Counter(
            _PREFIX + "request_success",
            "Finished sequences, cancelled ones too",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self.seconds = 1.0  # that a request took of late, for telling a client when to come again

    def page(self) -> bytes:
        return generate_latest(self._registry)

    def observe(self, clock: RequestClock, update: Update) -> None:
        """Note an update of the request that `clock` belongs to."""
        now = time.perf_counter()
        if update.token_ids and clock.streams:
            if clock.last is None:
                self._first.observe(now - clock.arrived)
            else:
                self._between.observe((now - clock.last) / len(update.token_ids))
            clock.last = now
        if update.completion is not None:
            reason = update.completion.finish_reason
            self._finished.labels(self._model, "abort" if reason == "cancelled" else reason).inc()
            if reason != "cancelled":
                self._whole.observe(now - clock.arrived)
                self.seconds += (now - clock.arrived - self.seconds) / 16

    def collect(self) -> Iterator[Metric]:
        """The engine's own numbers, as they stand when somebody asks."""
        stats = self.stats
        if stats is None:
            return
        total, used = stats.cache_tokens_total, stats.cache_tokens_used
        yield self._gauge("num_requests_running", "Sequences in the batch", stats.running)
        yield self._gauge("num_requests_waiting", "Sequences waiting for room", stats.waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the cache in use, 1 is full", used / total if total else 0.0)
        yield self._counter("prompt_tokens", "Prompt tokens, cached ones too", stats.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated", stats.generated_tokens)
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up in the cache", stats.prompt_tokens)
        yield self._counter("prefix_cache_hits", "Prompt tokens found in the cache", stats.cached_prompt_tokens)
        yield self._counter("num_preemptions", "Sequences put back for want of cache", stats.preempted)
        yield self._counter("spec_decode_num_draft_tokens", "Tokens drafted by the MTP head", stats.drafted)
        yield self._counter("spec_decode_num_accepted_tokens", "Drafted tokens that were kept", stats.accepted)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(_PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(_PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family


class RequestClock:
    """When a request arrived and when its last token came (time.perf_counter)."""

    __slots__ = ("arrived", "last", "streams")

    def __init__(self, streams: bool) -> None:
        self.streams = streams  # else the engine tells of it when it is done, and nobody waits for the first token
        self.arrived = time.perf_counter()
        self.last: float | None = None
