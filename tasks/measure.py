"""What a checkpoint can do, on held-out text and cases, through the engine that ships.

An artifact of its own: a new metric measures every checkpoint again, and trains none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context, OnProgress, Report
from twinloop.tasks.recipe import EvaluateSettings
from twinloop.tasks.runtime import Runtime

if TYPE_CHECKING:
    from twinloop.serving.engine import Engine

REPORT = "cases.json"


@task(name="measure", cache_policy=NO_CACHE)
def measure(
    context: Context,
    stage: str,
    settings: EvaluateSettings,
    runtime: Runtime,
    *,
    data: Artifact,
    model: Artifact,
) -> Artifact:
    """Bits per byte and verifier pass rates of a model directory, in `metrics`; every failed case in cases.json."""

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        import shutil

        from twinloop.models.directory import load_config
        from twinloop.models.onnx_bundle import export_bundle
        from twinloop.serving.engine import Engine

        bundle = keep / "bundle"
        shutil.rmtree(bundle, ignore_errors=True)
        length = load_config(model.path).max_position_embeddings
        export_bundle(model.path, bundle, precision=runtime.precision, max_length=length)
        engine = Engine.load(bundle, slots=settings.slots, threads=runtime.threads)
        limit, longest = settings.stage_cases, settings.max_new_tokens
        return measure_engine(engine, model.path, data.path, out, report.moved, limit=limit, max_tokens=longest)

    return context.run(
        f"measure-{stage}",
        work,
        settings={**settings.model_dump(), "threads": runtime.threads, "precision": runtime.precision},
        inputs={"data": data, "model": model},
        modules=("twinloop.tasks.measure",),
    )


def measure_engine(
    engine: Engine,
    tokenizer_dir: Path,
    data: Path,
    out: Path,
    on_progress: OnProgress,
    *,
    limit: int | None,
    max_tokens: int,
) -> dict[str, Any]:
    """Run held-out texts and cases (at most about `limit`, the same for everybody) and write cases.json into `out`."""
    from twinloop.domains.returns.verifier import Facts, verify
    from twinloop.evaluation.cases import read_cases, run_cases
    from twinloop.evaluation.texts import score_texts
    from twinloop.models.tokenizer import ChatTokenizer
    from twinloop.records.validated import read_records

    tokenizer = ChatTokenizer.load(tokenizer_dir)
    text = score_texts(engine, tokenizer, (r["text"] for r in read_records(data, "corpus_heldout")))
    cases = read_cases(choose_cases(read_records(data, "cases"), limit), Facts.from_record)
    found = run_cases(
        engine,
        tokenizer,
        cases,
        verify,
        max_tokens=max_tokens,
        on_progress=on_progress,
    )
    (out / REPORT).write_text(found.model_dump_json(indent=1) + "\n")
    predicates = {name: rate.rate for name, rate in found.by_predicate.items()}
    return {
        "bits_per_byte": text.bits_per_byte,
        "perplexity": text.perplexity,
        "pass_rate_interval": list(found.overall.interval),
        "predicates": predicates,
        **found.metrics(),
    }


def choose_cases(records: Iterable[Mapping[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    """At most about `limit` cases in an order that no file's order decides; all golden ones, and flip pairs whole."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record.get("pair_id") or record["case_id"], []).append(dict(record))

    def order(item: tuple[str, list[dict[str, Any]]]) -> tuple[bool, str]:
        name, members = item
        return members[0]["kind"] != "golden", hashlib.sha256(name.encode()).hexdigest()

    chosen: list[dict[str, Any]] = []
    for _, members in sorted(groups.items(), key=order):
        if limit is not None and len(chosen) + len(members) > limit:
            break
        chosen += members
    return chosen
