"""What the table at the end of a run says of each stage."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from twinloop.domains.chat import domain as chat
from twinloop.domains.returns import domain as returns
from twinloop.flows.summary import change, compared, metrics_table, quality_table
from twinloop.registry.artifact import Artifact, Manifest
from twinloop.report.rows import StageRow

TITLES = {"parsed": "JSON", "days": "days"}


def rates(parsed: float, days: float, bits: float | None = None) -> dict[str, object]:
    found: dict[str, object] = {"predicates": {"parsed": parsed, "days": days}}
    return found if bits is None else found | {"bits_per_byte": bits}


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (rates(0.0, 0.5), rates(1.0, 0.75), "JSON 0% → 100%, days 50% → 75%"),
        (rates(1.0, 0.5), rates(0.0, 0.75), "JSON 100% → 0%, days 50% → 75%"),
        (rates(1.0, 0.985), rates(1.0, 0.975), "days 98.5% → 97.5%"),
        (rates(1.0, 0.5), rates(1.0, 0.502), "no change"),
        (rates(1.0, 0.5, 0.54), rates(1.0, 0.5, 0.51), "bits/byte 0.54 → 0.51"),
    ],
    ids=["rises", "a fall beside a rise", "a fall alone", "noise", "bits"],
)
def test_a_stage_is_told_by_what_it_changed_most_for_better_or_worse(before, after, words) -> None:
    assert change(before, after, TITLES) == words


def test_every_form_that_was_compared_is_named_also_without_a_gap() -> None:
    metrics = {
        "compared_forms": 4, "network/tokens": 1.0, "network/logit_gap": 0.0, "merged/tokens": 1.0,
        "merged/logit_gap": 0.0, "int8/tokens": 0.985, "int8/logit_gap": 0.5, "llama.cpp/tokens": 0.9,
    }  # fmt: skip
    words = "merged 100% within 0.0e+00, int8 98.5% within 5.0e-01, llama.cpp 90%"
    assert compared(metrics) == f"tokens alike: {words}"
    assert compared({"compared_forms": 1, "network/tokens": 1.0}) == "no form was compared"


def measured(stage: str, **metrics: float) -> StageRow:
    manifest = Manifest.model_construct(stage=stage, metrics=metrics)
    return StageRow(stage, 1.0, measured=Artifact(Path(stage), manifest))


def cells(table: Table) -> list[list[str]]:
    """Of each line that is shown, those that are not empty."""
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    lines = [line.split("  ") for line in console.file.getvalue().splitlines()]
    return [[word.strip() for word in line if word] for line in lines]


def test_metrics_are_shown_by_model_with_their_intervals() -> None:
    rows = [
        measured("sft", chrf=61.234, chrf_low=58.1, chrf_high=64.0),
        StageRow("export", 1.0),
        measured("dpo", chrf=70.0, chrf_low=66.66666, chrf_high=73.0, answer_perplexity=1.5),
    ]
    assert cells(metrics_table(rows, chat)) == [
        ["metric (95% CI)", "sft", "dpo"],
        ["chrF", "61.23 (58.1-64)", "70 (66.67-73)"],
        ["perplexity of reference answers", "1.5"],
    ]
    assert metrics_table(rows, returns).row_count == 0


def test_bits_per_byte_of_held_out_text_are_shown_with_their_interval_where_there_is_one() -> None:
    rows = [
        measured("pretrain", bits_per_byte=1.5, bits_per_byte_low=1.4567, bits_per_byte_high=1.55),
        measured("sft", bits_per_byte=1.25),
    ]
    shown = cells(quality_table(rows, chat))
    assert shown[0][:2] == ["after", "bits/byte (95% CI)"]
    assert [line[:2] for line in shown[1:]] == [["pretrain", "1.500 (1.457-1.550)"], ["sft", "1.250"]]
    assert metrics_table(rows, chat).row_count == 0
