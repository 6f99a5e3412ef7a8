"""The flows that run on Prefect: what happens, in which order. Everything else is in the tasks."""

from __future__ import annotations

import time
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from twinloop.common.errors import UserError
from twinloop.domains.loader import load_domain
from twinloop.evaluation.gate import GateRules, load_rules
from twinloop.flows.answer import answer_over_http
from twinloop.flows.display import make_display
from twinloop.flows.environment import prepare_environment
from twinloop.flows.gpu import gpu_slot
from twinloop.flows.outcome import Outcome, Stage
from twinloop.flows.summary import show_outcome
from twinloop.registry.artifact import Artifact
from twinloop.registry.promotion import finish_interrupted
from twinloop.registry.versions import CHAMPION, Registry
from twinloop.tasks.audit import audit
from twinloop.tasks.context import Context, find_project
from twinloop.tasks.dpo import dpo
from twinloop.tasks.evaluate import evaluate
from twinloop.tasks.export import export
from twinloop.tasks.gate import gate, read_gate_report, version_to_beat
from twinloop.tasks.lengths import check_lengths
from twinloop.tasks.measure import measure
from twinloop.tasks.prepare import prepare_data, validate_data
from twinloop.tasks.pretrain import pretrain
from twinloop.tasks.recipe import Recipe, load_recipe
from twinloop.tasks.register import promote_if_shipped, register, who
from twinloop.tasks.release import check_release, version_to_judge
from twinloop.tasks.rlvr import rlvr
from twinloop.tasks.runtime import Runtime
from twinloop.tasks.sft import sft
from twinloop.tasks.tokenize import tokenize


class NotShippedError(UserError):
    """The lifecycle went through and ended without a champion that answers. Prefect shows its run as failed."""


@flow(name="lifecycle", validate_parameters=False)
def lifecycle(recipe: str = "recipes/returns.yaml") -> Outcome:
    """Data to a gated champion that answers over HTTP. What is already done is verified and skipped.

    Raises NotShippedError at its end, everything shown, where the gate says BLOCK or no champion answers.
    """
    project = find_project()
    prepare_environment(project)
    settings = load_recipe(project / recipe)
    runtime = Runtime.of(settings)
    outcome = Outcome(settings)
    rules = load_rules(project / settings.gate.rules, load_domain(settings.domain, project).domain)
    with make_display() as display, gpu_slot(project, runtime):
        context = Context.of(project, Path(recipe), settings, display)
        finish_interrupted(Registry(context.mlruns, context.recipe), who())
        context, data = _let_in(context, settings, outcome)
        tokenizer = tokenize(context, settings.tokenizer, data=data)
        outcome.stages.append(_stage(tokenizer))
        check_lengths(settings, tokenizer)

        def measured(checkpoint: Artifact) -> Artifact:
            results = measure(context, checkpoint.stage, settings.evaluate, runtime, data=data, model=checkpoint)
            outcome.stages.append(_stage(checkpoint, results))
            return checkpoint

        base = measured(pretrain(context, settings.pretrain, settings.model, runtime, data=data, tokenizer=tokenizer))
        tuned = measured(sft(context, settings.sft, runtime, data=data, model=base))
        preferred = measured(dpo(context, settings.dpo, runtime, data=data, model=tuned))
        audited = audit(context, data=data)
        outcome.stages.append(_stage(audited))
        final = measured(rlvr(context, settings.rlvr, runtime, data=data, model=preferred, audit=audited))

        precisions = settings.export.on(runtime.device)
        bundles = [
            export(context, precision, settings.model.max_length, runtime, data=data, model=final)
            for precision in precisions
        ]
        bundle, *others = bundles
        outcome.stages += [_stage(each, name=f"export {each.metrics['precision']}") for each in bundles]
        _release(context, settings, runtime, rules, outcome, data=data, bundle=bundle)
        _hand_over(context, outcome, checkpoints=[base, tuned, preferred, final], others=others, bundle=bundle)
        if outcome.promotion:
            _ask_champion(project, outcome)
    show_outcome(outcome, display.console)
    if outcome.shortfall:
        raise NotShippedError(f"{settings.name}: {outcome.shortfall}")
    return outcome


@flow(name="release-check", validate_parameters=False)
def release_check(recipe: str = "recipes/returns.yaml") -> str:
    """Measure the champion again, on this machine and by today's rules. Fails on BLOCK; moves no alias."""
    project = find_project()
    prepare_environment(project)
    settings = load_recipe(project / recipe)
    rules = load_rules(project / settings.gate.rules, load_domain(settings.domain, project).domain)
    runtime = Runtime.of(settings)
    with make_display() as display, gpu_slot(project, runtime):
        context = Context.of(project, Path(recipe), settings, display)
        registry = Registry(context.mlruns, context.recipe)
        finish_interrupted(registry, who())
        version = version_to_judge(registry, CHAMPION)
        context, data = _let_in(context, settings, Outcome(settings))
        report = check_release(context, settings.evaluate, runtime, rules, version=version.version, data=data)
        display.console.print(report.text(), highlight=False, markup=False, soft_wrap=True)
    if report.decision == "BLOCK":
        raise UserError(f"{settings.name}: the champion no longer passes the gate; `twinloop rollback` goes back")
    return report.decision


@flow(name="data-refresh", validate_parameters=False)
def data_refresh(recipe: str = "recipes/returns.yaml") -> None:
    """Rebuild the data sets and let them in, or say what is wrong with them."""
    project = find_project()
    prepare_environment(project)
    settings = load_recipe(project / recipe)
    with make_display() as display:
        _let_in(Context.of(project, Path(recipe), settings, display), settings, Outcome(settings))


def _let_in(context: Context, settings: Recipe, outcome: Outcome) -> tuple[Context, Artifact]:
    """Build and validate the data; the context that comes back names their version."""
    version, seconds = prepare_data(context)
    outcome.stages.append(Stage("data", seconds, note=f"DVC {version.md5[:12]}", reused=seconds is None))
    context = context.on_data(version.md5)
    data = validate_data(context, settings.validate_, data=version)
    outcome.stages.append(_stage(data))
    return context, data


def _release(
    context: Context,
    settings: Recipe,
    runtime: Runtime,
    rules: GateRules,
    outcome: Outcome,
    *,
    data: Artifact,
    bundle: Artifact,
) -> None:
    """Evaluate the bundle, and the version that it is to beat, and judge."""
    found = evaluate(context, settings.evaluate, runtime, data=data, bundle=bundle.path, digest=bundle)
    told = found.metrics
    note = f"{told['cases']} cases, p95 first token {told['p95_ttft_ms']:.0f} ms, {told['memory_gib']:.2f} GiB"
    outcome.stages.append(_stage(found, found, note=note))
    rival = version_to_beat(Registry(context.mlruns, context.recipe), bundle.digest)
    beaten = (
        evaluate(context, settings.evaluate, runtime, data=data, bundle=rival.path, digest=rival.digest)
        if rival
        else None
    )
    judged = gate(
        context,
        rules,
        bundle=bundle,
        evaluation=found,
        champion=beaten,
        champion_version=rival.version if rival else None,
    )
    outcome.gate = read_gate_report(judged)
    # For Prefect's UI, beside the run
    create_markdown_artifact(f"```\n{outcome.gate.text()}\n```", key="gate", description=outcome.gate.decision)
    outcome.stages.append(_stage(judged, note=outcome.gate.decision))


def _hand_over(
    context: Context, outcome: Outcome, *, checkpoints: list[Artifact], others: list[Artifact], bundle: Artifact
) -> None:
    """Register everything; promote the bundle if the gate let it through."""
    assert outcome.gate is not None
    started = time.perf_counter()
    outcome.version = register(context, checkpoints=checkpoints, others=others, bundle=bundle)
    registered = time.perf_counter()
    outcome.stages.append(Stage("register", registered - started, note=str(outcome.version)))
    try:
        outcome.promotion = promote_if_shipped(context, version=outcome.version, report=outcome.gate)
    except UserError as error:
        outcome.refusal = str(error)
    champion = Registry(context.mlruns, context.recipe).snapshot().alias(CHAMPION)
    if outcome.gate.decision == "BLOCK" and champion and champion.version == outcome.version.version:
        outcome.refusal = f"{champion} is the champion and no longer passes the gate; `twinloop rollback` goes back"
    if outcome.promotion:
        note = f"champion: version {outcome.promotion.to_version}"
        outcome.stages.append(Stage("promote", time.perf_counter() - registered, note=note))


def _ask_champion(project: Path, outcome: Outcome) -> None:
    try:
        outcome.answer = answer_over_http(project, outcome.recipe.name)
    except UserError as error:
        outcome.silence = str(error)


def _stage(artifact: Artifact, measured: Artifact | None = None, *, name: str | None = None, note: str = "") -> Stage:
    return Stage(
        name or artifact.stage, artifact.manifest.seconds, artifact, measured, note=note, reused=artifact.reused
    )
