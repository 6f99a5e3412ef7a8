"""Metrics under the names of vLLM's, with the prefix `twinloop:` for `vllm:`, so that its dashboards can be used."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from twinloop.serving.engine.counts import SchedulerMetrics
from twinloop.serving.generation import TextStream
from twinloop.serving.model_manager import ModelManager

FIRST_TOKEN_S = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
)  # fmt: skip
TOKEN_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
REQUEST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)

_TOKEN = "twinloop:inter_token_latency_seconds"
_TOKEN_BEFORE = "twinloop:time_per_output_token_seconds"
"""The name of `_TOKEN` in vLLM before 0.11, which many dashboards still read."""


class EngineMetrics:
    """Of every text that was asked for, whichever route it was for. A label names the model that wrote it: the served
    one, or a version on its base by the name that requests have for it."""

    def __init__(self, manager: ModelManager, registry: CollectorRegistry):
        self._served = manager.service.model.name

        def histogram(metric: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(metric, meaning, ["model_name"], buckets=buckets, registry=registry)

        self._first = histogram(
            "twinloop:time_to_first_token_seconds", "From a request's arrival to a token", FIRST_TOKEN_S
        )
        self._token = histogram(_TOKEN, "Between the tokens of an answer", TOKEN_S)
        self._whole = histogram(
            "twinloop:e2e_request_latency_seconds", "From a request's arrival to its end", REQUEST_S
        )
        self._queue = histogram("twinloop:request_queue_time_seconds", "Waiting for a slot", REQUEST_S)
        self._ended = Counter(
            "twinloop:request_success", "Ended answers: stop, length, abort, error",
            ["model_name", "finished_reason"], registry=registry,
        )  # fmt: skip
        for each in (self._first, self._token, self._whole, self._queue):
            each.labels(self._served)
        for end in ("stop", "length", "abort", "error"):
            self._ended.labels(self._served, end)
        registry.register(_Renamed(self._token))
        registry.register(_State(manager))

    def ended(self, text: TextStream) -> None:
        """Count a text that nobody waits for any more."""
        adapter = text.prompt.adapter
        model = self._served if adapter is None else adapter.name
        self._ended.labels(model, text.end).inc()
        if text.queue_s is not None:
            self._queue.labels(model).observe(text.queue_s)
        if text.ttft_s is not None:
            self._first.labels(model).observe(text.ttft_s)
        token = self._token.labels(model)
        for seconds in text.timings.token_s[: text.completion_tokens]:
            token.observe(seconds)
        if text.total_s is not None:
            self._whole.labels(model).observe(text.total_s)


class _Renamed(Collector):
    """A histogram under its former name too."""

    def __init__(self, metric: Collector):
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        for family in self._metric.collect():
            renamed = HistogramMetricFamily(_TOKEN_BEFORE, family.documentation)
            renamed.samples = [
                Sample(sample.name.replace(_TOKEN, _TOKEN_BEFORE), sample.labels, sample.value)
                for sample in family.samples
            ]
            yield renamed


class _State(Collector):
    """What is so now, and the scheduler's own counts: of the served model and all versions on its base together."""

    def __init__(self, manager: ModelManager):
        self._manager = manager

    def collect(self) -> Iterable[Metric]:
        name, now, totals = self._manager.service.model.name, self._now(), self._manager.totals()
        for metric, meaning, count in (
            ("twinloop:prompt_tokens", "Tokens that the engine read", totals.prompt_tokens),
            ("twinloop:generation_tokens", "Tokens that the engine wrote", totals.completion_tokens),
        ):
            counter = CounterMetricFamily(metric, meaning, labels=["model_name"])
            counter.add_metric([name], count)
            yield counter
        for metric, meaning, value in (
            ("twinloop:num_requests_running", "Answers that have a slot", now.active),
            ("twinloop:num_requests_waiting", "Answers that wait for a slot", now.queued),
            ("twinloop:kv_cache_usage_perc", "Share of the key-value cache that is filled, 1 for all", now.cache_used),
        ):
            gauge = GaugeMetricFamily(metric, meaning, labels=["model_name"])
            gauge.add_metric([name], value)
            yield gauge

    def _now(self) -> SchedulerMetrics:
        return self._manager.service.scheduler.metrics()
