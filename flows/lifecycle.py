"""The flows that run on Prefect: what happens, in which order. Everything else is in the tasks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from prefect import flow
from rich.console import Console

from twinloop.common.errors import UserError
from twinloop.domains.loader import load_domain
from twinloop.evaluation.gate import GateRules, load_rules
from twinloop.flows.answer import Answer, answer_over_http
from twinloop.flows.display import make_display
from twinloop.flows.environment import prepare_environment
from twinloop.flows.gpu import gpu_slot
from twinloop.flows.outcome import Outcome, Publication
from twinloop.flows.progress import ReportedDisplay
from twinloop.flows.story import Tracked, tracked_lifecycle, write_story
from twinloop.flows.summary import show_outcome
from twinloop.registry.artifact import Artifact
from twinloop.registry.ledger import who
from twinloop.registry.promotion import finish_interrupted
from twinloop.registry.snapshot import Version
from twinloop.registry.versions import CHAMPION, PREVIOUS, Registry
from twinloop.report.rows import StageRow
from twinloop.tasks.audit import audit, check_auditable
from twinloop.tasks.base import new_base
from twinloop.tasks.base_settings import NewBase
from twinloop.tasks.base_source import Base, resolve_models
from twinloop.tasks.baseline import check_champion_kind, find_baseline
from twinloop.tasks.check import check_records
from twinloop.tasks.context import Context, find_project
from twinloop.tasks.evaluate import evaluate
from twinloop.tasks.evaluation_set import publish_cases
from twinloop.tasks.export import export
from twinloop.tasks.gate import gate, read_gate_report
from twinloop.tasks.imported_base import import_base, import_models
from twinloop.tasks.measure import measure
from twinloop.tasks.outlook import foresee_forms, foresee_gate
from twinloop.tasks.parity import Release, parity
from twinloop.tasks.prepare import prepare_data, validate_data
from twinloop.tasks.recipe import Recipe, default_recipe, load_recipe
from twinloop.tasks.register import Made, import_data_documents, promote_if_shipped, register
from twinloop.tasks.release import check_release, version_to_judge
from twinloop.tasks.reward_limits import check_imported_reward_models, check_reward_models
from twinloop.tasks.tokenize import tokenize
from twinloop.tasks.train import train
from twinloop.training.runtime import Runtime


class NotShippedError(UserError):
    """The lifecycle went through and ended without a champion that answers. Prefect shows its run as failed."""


@flow(name="lifecycle", validate_parameters=False)
def lifecycle(recipe: str | None = None) -> Outcome:
    """Data to a gated champion that answers over HTTP. What is already done is verified and skipped.

    Raises NotShippedError at its end, everything shown, where the gate says BLOCK or no champion answers.

    Args:
        recipe: a recipe file, relative to the project, such as recipes/returns.yaml. Empty: the one that `recipe` in
            params.yaml names.
    """
    project, path, settings = _open(recipe)
    rules = load_rules(project / settings.gate.rules, load_domain(settings.domain, project).domain)
    job = _Job(settings, *resolve_models(settings, project), settings.runtime(), rules)
    with ReportedDisplay(make_display()) as display, gpu_slot(project, job.runtime):
        context = Context.of(project, path, settings, display)
        if any(stage.needs_verifier for stage in settings.train):
            check_auditable(context.loaded_domain)
        registry = Registry(context.mlruns, context.recipe)
        finish_interrupted(registry, who())
        check_champion_kind(registry, settings.kind, f"what {path} makes")
        with tracked_lifecycle(context, settings) as tracked:
            outcome = _release(tracked, job, display.console)
    show_outcome(outcome, display.console)
    if outcome.failure:
        raise NotShippedError(f"{settings.name}: {outcome.failure}")
    return outcome


@flow(name="release-check", validate_parameters=False)
def release_check(recipe: str | None = None) -> str:
    """Measure the champion again, on this machine and by today's rules. Fails on BLOCK; moves no alias.

    Args:
        recipe: a recipe file, relative to the project, such as recipes/returns.yaml. Empty: the one that `recipe` in
            params.yaml names.
    """
    project, path, settings = _open(recipe)
    rules = load_rules(project / settings.gate.rules, load_domain(settings.domain, project).domain)
    runtime = settings.runtime()
    with ReportedDisplay(make_display()) as display, gpu_slot(project, runtime):
        context = Context.of(project, path, settings, display)
        registry = Registry(context.mlruns, context.recipe)
        finish_interrupted(registry, who())
        version = version_to_judge(registry, CHAMPION)
        context, data, _ = _prepare(context, settings)
        report = check_release(context, settings.evaluate, runtime, rules, version=version.version, data=data)
        display.console.print(report.text(), highlight=False, markup=False, soft_wrap=True)
    if report.decision == "BLOCK":
        raise UserError(_failing_champion(registry, version))
    return report.decision


@flow(name="data-refresh", validate_parameters=False)
def data_refresh(recipe: str | None = None) -> None:
    """Rebuild and validate the data sets. Raises UserError for what is wrong with them.

    Args:
        recipe: a recipe file, relative to the project, such as recipes/returns.yaml. Empty: the one that `recipe` in
            params.yaml names.
    """
    project, path, settings = _open(recipe)
    with ReportedDisplay(make_display()) as display:
        _prepare(Context.of(project, path, settings, display), settings)


@dataclass(frozen=True)
class _Job:
    """What a lifecycle goes by, read and checked before anything runs.

    base: what training starts from. named: the other models that stages read, by stage and setting."""

    recipe: Recipe
    base: Base
    named: Mapping[str, Mapping[str, Base]]
    runtime: Runtime
    rules: GateRules


def _release(tracked: Tracked, job: _Job, console: Console) -> Outcome:
    """Every stage from the data to the champion's answer, and the story of it."""
    settings, base, runtime, rules = job.recipe, job.base, job.runtime, job.rules
    foresee_forms(settings, runtime, rules)
    context, data, data_rows = _prepare(tracked.context, settings)
    assert context.dataset_digest is not None
    tracked.tracker.dataset(context.dataset_digest)
    outlook = foresee_gate(context, settings, rules, data=data)
    if asked := outlook.text():
        console.print(asked, highlight=False, markup=False, soft_wrap=True)
    trained = _train(context, job, data=data)
    exported = [
        export(context, precision, base.max_length, model=trained.checkpoints[-1], adapters=settings.export.adapters)
        for precision in settings.export.on(runtime.device)
    ]
    export_rows = [StageRow.of(each, name=f"export {each.metrics['precision']}") for each in exported]
    candidate, *others = exported
    release = Release(trained.checkpoints[-1], {each.metrics["precision"]: each for each in exported})
    compared = parity(context, settings.evaluate, runtime, data=data, release=release, forms=release.forms(rules.forms))
    judged, release_rows = _judge(context, job, data=data, exported=candidate, compared=compared)
    made = Made(trained.checkpoints, others, candidate, base.tags(trained.start), base.parent)
    published = _publish(context, judged, made, data=data)
    answer, serve_error = _ask_champion(context.project, settings.name) if published.promotion else (None, None)
    rows = (*data_rows, *trained.rows, *export_rows, StageRow.of(compared), *release_rows, *published.rows)
    outcome = Outcome(context.domain, rows, read_gate_report(judged), published, answer, serve_error)
    return replace(outcome, report=write_story(tracked, context, settings, outcome))


def _open(recipe: str | None) -> tuple[Path, Path, Recipe]:
    """The project, and its recipe of this path, relative to it; None: the one that commands take by default."""
    project = find_project()
    prepare_environment(project)
    path = project / recipe if recipe else default_recipe(project)
    return project, path.relative_to(project), load_recipe(path, project)


def _prepare(context: Context, settings: Recipe) -> tuple[Context, Artifact, list[StageRow]]:
    """Build and validate the data; the context that comes back names their version."""
    version, seconds = prepare_data(context)
    built = StageRow("data", seconds, note=f"DVC {version.md5[:12]}", reused=seconds is None)
    context = context.on_data(version.md5)
    data = validate_data(context, settings.validate_, needed=settings.record_types, data=version)
    return context, data, [built, StageRow.of(data)]


@dataclass(frozen=True)
class _Trained:
    """start: the base. checkpoints: one a stage of training, in order."""

    start: Artifact
    checkpoints: list[Artifact]
    rows: list[StageRow]


def _train(context: Context, job: _Job, *, data: Artifact) -> _Trained:
    """The base, and every stage of the recipe; each is measured.

    A stage goes on from the last one that made a network that writes text. One with a head, such as a reward model, is
    a branch: what it makes is used by name, or released where it is the last.
    """
    settings, runtime = job.recipe, job.runtime
    start, rows = _start(context, settings, job.base, data=data)
    policy = start
    named = import_models(context, job.named, start=start)
    checked = check_records(context, settings, data=data, model=start)
    rows.append(StageRow.of(checked))
    check_imported_reward_models(context, settings, runtime, data=data, imported=named)
    made: dict[str, Artifact] = {}
    worth: dict[str, Artifact] = {}
    audited: Artifact | None = None
    for stage in settings.train:
        if stage.needs_verifier and audited is None:
            audited = audit(context, data=data)
            rows.append(StageRow.of(audited))
        others = named.get(stage.name, {}) | {name: made[maker] for name, maker in stage.earlier.items()}
        check_reward_models(stage, worth)
        model = train(context, stage, runtime, data=data, model=policy, audit=audited, named=others)
        measured = measure(context, stage.name, settings.evaluate, runtime, data=data, model=model)
        rows.append(StageRow.of(model, measured=measured))
        made[stage.name], worth[stage.name] = model, measured
        if not stage.method.has_head:
            policy = model
    return _Trained(start, list(made.values()), rows)


def _start(context: Context, settings: Recipe, base: Base, *, data: Artifact) -> tuple[Artifact, list[StageRow]]:
    """What the first stage of training starts from. A new network has a tokenizer of its own."""
    if not isinstance(settings.base, NewBase):
        model = import_base(context, base)
        return model, [StageRow.of(model, note=base.text(model.metrics["parameters"]))]
    records = [stage.method.records for stage in settings.train]
    tokenizer = tokenize(context, settings.base.vocab_size, records=records, data=data)
    model = new_base(context, settings.base, seed=settings.seed, tokenizer=tokenizer)
    return model, [StageRow.of(tokenizer), StageRow.of(model)]


def _judge(
    context: Context, job: _Job, *, data: Artifact, exported: Artifact, compared: Artifact
) -> tuple[Artifact, list[StageRow]]:
    """Evaluate the exported model, and the version that it is to beat, and judge: the gate's artifact, and the rows."""
    settings, runtime = job.recipe.evaluate, job.runtime
    found = evaluate(context, settings, runtime, data=data, exported=exported.path, digest=exported)
    publish_cases(context, data=data, evaluation=found)
    numbers = found.metrics
    note = f"{numbers['cases']} cases, p95 first token {numbers['p95_ttft_ms']:.0f} ms, {numbers['memory_gib']:.2f} GiB"
    registry, what = Registry(context.mlruns, context.recipe), f"what {context.recipe_path} makes"
    baseline = find_baseline(registry, exported.digest, job.recipe.kind, what)
    baseline_evaluation = (
        evaluate(context, settings, runtime, data=data, exported=beaten.path, digest=beaten.digest)
        if (beaten := baseline.version)
        else None
    )
    judged = gate(
        context,
        job.rules,
        exported=exported,
        evaluation=found,
        parity=compared,
        baseline=baseline,
        champion=baseline_evaluation,
    )
    decision = read_gate_report(judged).decision
    return judged, [StageRow.of(found, measured=found, note=note), StageRow.of(judged, note=decision)]


def _publish(context: Context, judged: Artifact, made: Made, *, data: Artifact) -> Publication:
    """Register everything; promote the exported model if the gate says SHIP."""
    report = read_gate_report(judged)
    registry = Registry(context.mlruns, context.recipe)
    before = registry.snapshot().alias(CHAMPION)
    started = time.perf_counter()
    version = register(context, made, data=data)
    registered = time.perf_counter()
    promotion, error = None, None
    try:
        promotion = promote_if_shipped(context, version=version, report=report, judged_now=not judged.reused)
    except UserError as refused:
        error = str(refused)
    if report.decision == "BLOCK" and before and before.version == version.version:
        error = _failing_champion(registry, before)
    rows = [StageRow("register", registered - started, note=str(version))]
    if promotion:
        note = f"champion: version {promotion.to_version}"
        rows.append(StageRow("promote", time.perf_counter() - registered, note=note))
        rows += _import_documents(context)
    moved = promotion is not None and (before is None or before.version != version.version)
    return Publication(version, promotion, error, moved, tuple(rows))


def _import_documents(context: Context) -> list[StageRow]:
    """The documents of the data, put beside the champion that was judged with them: the row, if there are any."""
    started = time.perf_counter()
    imported = import_data_documents(context)
    return [StageRow("documents", time.perf_counter() - started, note=str(imported))] if imported else []


def _failing_champion(registry: Registry, champion: Version) -> str:
    way_back = "`twinloop rollback` goes back" if registry.snapshot().alias(PREVIOUS) else "no champion was before it"
    return f"{champion} is the champion and no longer passes the gate; {way_back}"


def _ask_champion(project: Path, model: str) -> tuple[Answer | None, str | None]:
    """What it answers over HTTP, or why it does not."""
    try:
        return answer_over_http(project, model), None
    except UserError as error:
        return None, str(error)
