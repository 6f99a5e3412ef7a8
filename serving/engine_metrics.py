"""Metrics under the names of vLLM's, with the prefix `twinloop:` for `vllm:`, so that its dashboards can be used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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

TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)

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
        self._prefill = histogram(
            "twinloop:request_prefill_time_seconds", "From its slot to its first token", REQUEST_S
        )
        self._decode = histogram("twinloop:request_decode_time_seconds", "From the first token to the last", REQUEST_S)
        self._inference = histogram("twinloop:request_inference_time_seconds", "Both together", REQUEST_S)
        self._read = histogram("twinloop:request_prompt_tokens", "Tokens of a prompt, cached ones included", TOKENS)
        self._written = histogram("twinloop:request_generation_tokens", "Tokens of an answer", TOKENS)
        self._longest = histogram(
            "twinloop:request_max_num_generation_tokens", "Tokens of the longest of a request's answers", TOKENS
        )
        self._limit = histogram("twinloop:request_params_max_tokens", "How many an answer might have had", TOKENS)
        self._choices = histogram("twinloop:request_params_n", "Answers to one request", (1, 2, 5, 10, 20))
        self._ended = Counter(
            "twinloop:request_success", "Ended answers: stop, length, abort, error",
            ["model_name", "finished_reason"], registry=registry,
        )  # fmt: skip
        for each in (
            self._first, self._token, self._whole, self._queue, self._prefill, self._decode, self._inference,
            self._read, self._written, self._longest, self._limit, self._choices,
        ):  # fmt: skip
            each.labels(self._served)
        for end in ("stop", "length", "abort", "error"):
            self._ended.labels(self._served, end)
        registry.register(_Renamed(self._token))
        registry.register(_State(manager))

    def ended(self, texts: Sequence[TextStream]) -> None:
        """Count the texts of a request that nobody waits for any more."""
        for text in texts:
            self._count(text, self._model_of(text))
        for prompt in {text.prompt for text in texts}:  # each is a request to the engine
            tokens = [text.completion_tokens for text in texts if text.prompt is prompt]
            model = self._model_of(texts[0])
            self._choices.labels(model).observe(len(tokens))
            self._longest.labels(model).observe(max(tokens))

    def _model_of(self, text: TextStream) -> str:
        adapter = text.prompt.adapter
        return self._served if adapter is None else adapter.name

    def _count(self, text: TextStream, model: str) -> None:
        timings, tokens = text.timings, text.completion_tokens
        self._ended.labels(model, text.end).inc()
        self._limit.labels(model).observe(text.max_tokens)
        if timings.queue_s is not None:
            self._queue.labels(model).observe(timings.queue_s)
        if text.ttft_s is not None:
            self._first.labels(model).observe(text.ttft_s)
        token = self._token.labels(model)
        gaps = timings.token_s[:tokens]
        for seconds in gaps:
            token.observe(seconds)
        if timings.queue_s is not None and timings.ttft_s is not None:
            prefill, decode = timings.ttft_s - timings.queue_s, sum(gaps)
            self._prefill.labels(model).observe(prefill)
            self._decode.labels(model).observe(decode)
            self._inference.labels(model).observe(prefill + decode)
            self._read.labels(model).observe(len(text.prompt.tokens))
            self._written.labels(model).observe(tokens)
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
            (
                "twinloop:prefix_cache_queries",
                "Tokens of prompts that were looked up in what the slots hold of earlier ones",
                totals.prefix_cache_queries,
            ),
            ("twinloop:prefix_cache_hits", "Those of them that were not computed again", totals.prefix_cache_hits),
            ("twinloop:spec_decode_num_drafts", "Guesses at the next tokens of an answer", totals.drafts),
            ("twinloop:spec_decode_num_draft_tokens", "Tokens in these guesses", totals.draft_tokens),
            ("twinloop:spec_decode_num_accepted_tokens", "Those of them that were right", totals.accepted_tokens),
            ("twinloop:num_preemptions", "Answers that were interrupted: none ever is", 0),
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
