"""What a server counts, for Prometheus: a registry of its own for each application, without the process's defaults."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from twinloop.serving.decisions import DecisionResponse
from twinloop.serving.engine_metrics import EngineMetrics
from twinloop.serving.generation import TextStream
from twinloop.serving.knowledge.documents import DocumentStoreError
from twinloop.serving.model_manager import DEGRADATIONS, ModelManager
from twinloop.serving.worker_process import WorkerProcess

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

DECISIONS, CHAT, COMPLETIONS = "/v1/decisions", "/v1/chat/completions", "/v1/completions"
CLASSIFY = "/v1/classify"
ASKED = (DECISIONS, CHAT, COMPLETIONS, CLASSIFY)
"""The routes at which the model is asked."""

MOST_NAMES = 100
"""Each value of a label is kept for ever: a domain that names its outcomes by what was asked must not fill memory."""

disable_created_metrics()  # a time beside every counter, which no dashboard of ours reads


@dataclass(frozen=True)
class Counted:
    """Of all processes. Requests to the model since the start, those of them that got an error, and the first tokens:
    how many, and the seconds that they took, summed; tokens read and written; completion tokens a second; answers that
    wait and that have a slot, and how many may at most."""

    requests: int
    refused: int
    first_tokens: int
    first_token_s: float
    prompt_tokens: int
    completion_tokens: int
    tokens_per_s: float
    queued: int
    active: int
    capacity: int
    slots: int


class Metrics:
    """Counters and histograms of requests, and the state of scheduler, traces and documents at each scrape."""

    def __init__(self, manager: ModelManager, process: WorkerProcess | None = None) -> None:
        """process: this one, where it is one of several that serve at one address."""
        self._registry = CollectorRegistry()
        self._process = process
        self.requests = self._counter("twinloop_requests", "HTTP requests by route and status", "route", "status")
        self.clients_gone = self._counter(
            "twinloop_clients_gone", "Requests whose client left before its answer was complete, by route", "route"
        )
        self._decisions = self._counter(
            "twinloop_decisions", "Decisions by outcome: escalated, or what the domain calls it", "outcome"
        )
        self._escalations = self._counter(
            "twinloop_escalations", "Reasons for which decisions were escalated, by predicate", "predicate"
        )
        self._outcomes, self._predicates = _Names(), _Names()
        self._first_token = self._histogram(
            "twinloop_time_to_first_token_seconds", "From the request's arrival to its first token"
        )
        self._seconds = self._histogram("twinloop_request_seconds", "From the request's arrival to its last token")
        self._registry.register(_State(manager))
        self._engine = EngineMetrics(manager, self._registry)
        if process is not None:
            process.report(self._registry.collect)

    def answered(self, route: str, seconds: float, ttft_s: float | None) -> None:
        """A whole answer. seconds: since its request arrived; ttft_s: None where the model was not asked."""
        self._seconds.labels(route).observe(seconds)
        if ttft_s is not None:
            self._first_token.labels(route).observe(ttft_s)

    def ended(self, texts: Sequence[TextStream]) -> None:
        """What the model wrote for a request that nobody waits for any more, complete or not."""
        self._engine.ended(texts)

    def decided(self, response: DecisionResponse, outcome: str) -> None:
        """A response, and the outcome under which it is counted."""
        self._decisions.labels(self._outcomes.known(outcome)).inc()
        for reason in response.reasons:
            self._escalations.labels(self._predicates.known(reason.predicate)).inc()

    def counted(self) -> Counted:
        """The sums over all routes at which the model is asked. Raises SupervisorSilentError."""
        samples = [sample for family in self.collect() for sample in family.samples]

        def total(name: str, **labels: str) -> float:
            found = [each for each in samples if each.name == name]
            return sum(each.value for each in found if labels.items() <= each.labels.items())

        asked = [each for each in samples if each.name == "twinloop_requests_total" and each.labels["route"] in ASKED]
        return Counted(
            requests=int(sum(each.value for each in asked)),
            refused=int(sum(each.value for each in asked if int(each.labels["status"]) >= 400)),
            first_tokens=int(total("twinloop_time_to_first_token_seconds_count")),
            first_token_s=total("twinloop_time_to_first_token_seconds_sum"),
            prompt_tokens=int(total("twinloop_tokens_total", kind="prompt")),
            completion_tokens=int(total("twinloop_tokens_total", kind="completion")),
            tokens_per_s=total("twinloop_tokens_per_second"),
            queued=int(total("twinloop_queued_requests")),
            active=int(total("twinloop_active_requests")),
            capacity=int(total("twinloop_capacity")),
            slots=int(total("twinloop_slots")),
        )

    def collect(self) -> Iterable[Metric]:
        """Everything that all processes count. Raises SupervisorSilentError."""
        return self._registry.collect() if self._process is None else self._process.metrics_of_all()

    def render(self) -> bytes:
        """`collect`, in version 0.0.4 of the text form."""
        return generate_latest(self)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, labels, registry=self._registry)

    def _histogram(self, name: str, meaning: str) -> Histogram:
        return Histogram(name, meaning, ["route"], buckets=LATENCY_BUCKETS_S, registry=self._registry)


class _Names:
    """Values of a label that the domain names: past MOST_NAMES every other one is "other"."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def known(self, name: str) -> str:
        if len(self._names) < MOST_NAMES:
            self._names.add(name)
        return name if name in self._names else "other"


class _State(Collector):
    """What is true now, and the counts that the scheduler keeps itself."""

    def __init__(self, manager: ModelManager) -> None:
        self._manager = manager

    def collect(self) -> Iterable[Metric]:
        manager, service = self._manager, self._manager.service
        now, totals = service.scheduler.metrics(), manager.totals()
        tokens = CounterMetricFamily(
            "twinloop_tokens", "Tokens that the engine read and wrote, by kind: prompt, completion", labels=["kind"]
        )
        tokens.add_metric(["prompt"], totals.prompt_tokens)
        tokens.add_metric(["completion"], totals.completion_tokens)
        yield tokens
        answers = CounterMetricFamily(
            "twinloop_answers", "Generated answers by end: finished, failed, cancelled", labels=["end"]
        )
        for end in ("finished", "failed", "cancelled"):
            answers.add_metric([end], getattr(totals, end))
        yield answers
        gauges = {
            "twinloop_tokens_per_second": ("Completion tokens a second, over the last ten seconds", now.tokens_per_s),
            "twinloop_queued_requests": ("Answers that wait for a slot, or for the prompts before theirs", now.queued),
            "twinloop_active_requests": ("Answers that have a slot", now.active),
            "twinloop_slots": ("Answers that can be generated at the same time", now.slots),
            "twinloop_capacity": ("Answers that are taken at most, waiting or in a slot", service.scheduler.capacity),
            "twinloop_champion_refused": (
                "1 while the registry's champion cannot be served and another one is",
                manager.failure is not None,
            ),
        }
        if (loaded := manager.loaded) is not None:
            gauges["twinloop_adapters_loaded"] = (
                "Versions in memory beside the served model, once for each process that holds them",
                loaded,
            )
        if service.traces is not None:
            lost = "Traces that could not be kept since the server started"
            gauges["twinloop_traces_dropped"] = (lost, service.traces.dropped)
        degraded = GaugeMetricFamily(
            "twinloop_degraded", "1 for what is not as it should be though requests are answered", labels=["reason"]
        )
        with suppress(DocumentStoreError):  # /health reports what is wrong with them
            found = manager.degraded()
            for reason in DEGRADATIONS:
                degraded.add_metric([reason], float(reason in found))
            yield degraded
            gauges["twinloop_documents"] = ("Documents that are found", service.documents.count())
        for name, (meaning, value) in gauges.items():
            yield GaugeMetricFamily(name, meaning, value=float(value))
