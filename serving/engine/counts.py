"""What a scheduler counts, and what it says of itself at a moment."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Totals:
    """Counts since the start: tokens read and written, how answers ended, tokens of prompts that were looked up in the
    slots, and those of them that were not computed again; guesses at tokens of answers, the tokens in them, and those
    that were right."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})


@dataclass(frozen=True)
class SchedulerMetrics:
    """Answers waiting and in a slot; completion tokens a second over the last ten; the share of the key-value cache
    that the sequences in the slots fill."""

    queued: int
    active: int
    slots: int
    tokens_per_s: float
    totals: Totals
    cache_used: float
