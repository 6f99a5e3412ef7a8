"""Counters and latency histograms in Prometheus' text form. Ours are few, so no client library is needed."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Thread-safe. A name's kind and meaning stand in METRICS; values appear once something was counted."""

    METRICS: Mapping[str, tuple[str, str]] = {
        "twinloop_requests_total": ("counter", "HTTP requests by route and status"),
        "twinloop_clients_gone_total": (
            "counter",
            "Requests whose client left before its answer was complete, by route",
        ),
        "twinloop_decisions_total": ("counter", "Decisions by outcome: eligible, not_eligible, escalated"),
        "twinloop_escalations_total": ("counter", "Reasons for which decisions were escalated, by predicate"),
        "twinloop_tokens_total": ("counter", "Tokens that the engine read and wrote, by kind: prompt, completion"),
        "twinloop_time_to_first_token_seconds": ("histogram", "From the request's arrival to its first token"),
        "twinloop_request_seconds": ("histogram", "From the request's arrival to its last token"),
        "twinloop_answers_total": ("counter", "Generated answers by end: finished, failed, cancelled"),
        "twinloop_tokens_per_second": ("gauge", "Completion tokens a second, over the last ten seconds"),
        "twinloop_queued_requests": ("gauge", "Requests that wait for a slot"),
        "twinloop_active_requests": ("gauge", "Requests that have a slot"),
        "twinloop_slots": ("gauge", "Answers that can be generated at the same time"),
        "twinloop_champion_refused": ("gauge", "1 while the registry's champion cannot be served and another one is"),
        "twinloop_traces_dropped": ("gauge", "Traces that could not be kept since the server started"),
        "twinloop_policies": ("gauge", "Policies in force"),
    }

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: defaultdict[tuple[str, Labels], float] = defaultdict(float)
        self._buckets: dict[tuple[str, Labels], list[int]] = {}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._values[name, tuple(sorted(labels.items()))] += amount

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge, or a counter that is kept elsewhere."""
        with self._lock:
            self._values[name, tuple(sorted(labels.items()))] = value

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Add one duration to a histogram."""
        key = (name, tuple(sorted(labels.items())))
        with self._lock:
            buckets = self._buckets.setdefault(key, [0] * (len(LATENCY_BUCKETS_S) + 1))
            buckets[bisect_left(LATENCY_BUCKETS_S, seconds)] += 1
            self._values[key] += seconds

    def render(self) -> str:
        """Everything, in version 0.0.4 of the text form."""
        with self._lock:
            values, buckets = dict(self._values), {key: [*counts] for key, counts in self._buckets.items()}
        lines: list[str] = []
        for name, (kind, meaning) in self.METRICS.items():
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            for key in sorted(key for key in values if key[0] == name):
                if kind != "histogram":
                    lines.append(f"{name}{_braces(key[1])} {values[key]:g}")
                    continue
                total = 0
                for bound, count in zip((*LATENCY_BUCKETS_S, "+Inf"), buckets[key], strict=True):
                    total += count
                    lines.append(f"{name}_bucket{_braces((*key[1], ('le', str(bound))))} {total}")
                lines += [f"{name}_sum{_braces(key[1])} {values[key]:.6f}", f"{name}_count{_braces(key[1])} {total}"]
        return "\n".join(lines) + "\n"


def _braces(labels: Labels) -> str:
    escaped = (
        name + '="' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
        for name, value in labels
    )
    return "{" + ",".join(escaped) + "}" if labels else ""
