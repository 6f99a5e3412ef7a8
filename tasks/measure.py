"""What a checkpoint can do, on held-out text and cases, through the engine that ships.

An artifact of its own: a new metric measures every checkpoint again, and trains none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task

from twinloop.domains.domain import Domain
from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context, OnProgress, Report
from twinloop.tasks.recipe import EvaluateSettings
from twinloop.training.runtime import Runtime

if TYPE_CHECKING:
    from twinloop.evaluation.case_report import CaseReport
    from twinloop.evaluation.cases import Case
    from twinloop.evaluation.metrics import Estimate
    from twinloop.models.tokenizer import ChatTokenizer
    from twinloop.serving.engine import Engine

REPORT = "cases.json"


@dataclass(frozen=True)
class Workload:
    """What a model is measured on: validated data, of which at most about `limit` cases, the same for every model."""

    domain: Domain
    settings: EvaluateSettings
    data: Path
    limit: int | None = None


def measure_stage(
    context: Context,
    stage: str,
    settings: EvaluateSettings,
    runtime: Runtime,
    *,
    data: Artifact,
    model: Artifact,
) -> Artifact:
    """Losses and verifier pass rates of a model directory, in `metrics`; every failed case in cases.json."""

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        from twinloop.models.label_tokenizer import load_answering
        from twinloop.serving.engine import Engine

        exported = export_in(keep, model.path, runtime)
        engine = Engine.load(exported, slots=settings.slots, threads=runtime.threads)
        workload = Workload(context.domain, settings, data.path, limit=settings.stage_cases)
        cases, metrics = measure_engine(engine, load_answering(model.path), workload, report.moved)
        write_cases(out, cases)
        return metrics

    return context.run(
        f"measure-{stage}",
        work,
        settings={**settings.model_dump(), "threads": runtime.threads, "precision": runtime.precision},
        inputs={"data": data, "model": model},
        modules=("twinloop.tasks.measure",),
        uses_domain=True,
    )


measure = task(name="measure", persist_result=False)(measure_stage)


def export_in(keep: Path, model: Path, runtime: Runtime) -> Path:
    """A model directory as a graph, in `keep`, where a process that was killed may have left half of one."""
    import shutil

    from twinloop.models.directory import load_config
    from twinloop.models.exported import export_model

    exported = keep / "exported"
    shutil.rmtree(exported, ignore_errors=True)
    export_model(model, exported, precision=runtime.precision, max_length=load_config(model).max_position_embeddings)
    return exported


def measure_engine(
    engine: Engine, tokenizer: ChatTokenizer, workload: Workload, on_progress: OnProgress
) -> tuple[CaseReport, dict[str, Any]]:
    """Run held-out texts, reference answers and cases: what the cases showed, and all numbers. A network with a head
    writes no texts: of labels cases are run, and of rewards the held-out pairs."""
    from twinloop.evaluation.cases import Answering, read_cases, run_cases
    from twinloop.evaluation.rewards import judge_reward_model
    from twinloop.records.validated import read_records

    domain, settings, kind = workload.domain, workload.settings, engine.config.kind
    cases = read_cases(choose_cases(read_records(workload.data, "cases"), domain, workload.limit), domain)
    losses: dict[str, Estimate] = {}
    judged: dict[str, float] = {}
    if kind == "text":
        losses = _losses_of_answers(engine, tokenizer, domain, cases)
        losses |= losses_of_texts(engine, tokenizer, workload.data)
    if kind == "reward":
        pairs = held_out_pairs(workload.data, workload.limit)
        report, judged = judge_reward_model(engine, tokenizer, pairs, cases, domain, on_progress=on_progress)
    else:
        samples = settings.samples if kind == "text" else 1
        answering = Answering(settings.max_new_tokens, samples, settings.temperature)
        report = run_cases(engine, tokenizer, cases, domain, answering, on_progress=on_progress)
    report = report.model_copy(update={"measured": report.measured | losses})
    shown = {"predicates": {name: rate.rate for name, rate in report.by_predicate.items()}} if report.results else {}
    interval = {"pass_rate_interval": list(_interval(report))} if report.results else {}
    return report, {**judged, **interval, **shown, **report.metrics()}


def _interval(report: CaseReport) -> tuple[float, float]:
    from twinloop.evaluation.rewards import ACCURACY

    accuracy = report.measured.get(ACCURACY)
    return accuracy.interval if accuracy and accuracy.interval else report.overall.interval


def held_out_pairs(data: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The preferences that `method: reward` left out, at most about `limit` of them: prompts with all their pairs,
    in an order that no file's order decides."""
    from twinloop.records.validated import read_records
    from twinloop.training.forms import is_held_out, prompt_digest

    groups: dict[bytes, list[dict[str, Any]]] = {}
    for record in read_records(data, "preferences"):
        if is_held_out(record):
            groups.setdefault(prompt_digest(record), []).append(record)
    chosen: list[dict[str, Any]] = []
    for _, members in sorted(groups.items()):
        if chosen and limit is not None and len(chosen) + len(members) > limit:
            break
        chosen += members
    return chosen


def losses_of_texts(engine: Engine, tokenizer: ChatTokenizer, data: Path) -> dict[str, Estimate]:
    """Nothing where the data have no held-out texts."""
    from twinloop.evaluation.texts import losses, score_texts
    from twinloop.records.validated import has_records, read_records

    if not has_records(data, "corpus_heldout"):
        return {}
    return losses(score_texts(engine, tokenizer, (row["text"] for row in read_records(data, "corpus_heldout"))))


def _losses_of_answers(
    engine: Engine, tokenizer: ChatTokenizer, domain: Domain, cases: Sequence[Case]
) -> dict[str, Estimate]:
    """Nothing where no case has a reference answer."""
    from twinloop.evaluation.cases import reference_answers
    from twinloop.evaluation.texts import losses, score_answers

    answers = reference_answers(domain, cases)
    return losses(score_answers(engine, tokenizer, answers), "answer_") if answers else {}


def choose_cases(records: Iterable[Mapping[str, Any]], domain: Domain, limit: int | None) -> list[dict[str, Any]]:
    """At most about `limit` cases in an order that no file's order decides: regression kinds first, pairs whole."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record.get("pair_id") or record["case_id"], []).append(dict(record))

    def order(item: tuple[str, list[dict[str, Any]]]) -> tuple[bool, str]:
        name, members = item
        return not domain.case_kinds[members[0]["kind"]].regression, hashlib.sha256(name.encode()).hexdigest()

    chosen: list[dict[str, Any]] = []
    for _, members in sorted(groups.items(), key=order):
        if limit is not None and len(chosen) + len(members) > limit:
            break
        chosen += members
    return chosen


def write_cases(out: Path, report: CaseReport) -> None:
    (out / REPORT).write_text(report.model_dump_json(indent=1) + "\n")


def read_case_report(artifact: Artifact) -> CaseReport:
    from twinloop.evaluation.case_report import CaseReport

    return CaseReport.model_validate_json((artifact.path / REPORT).read_bytes())
