"""Registration: each checkpoint, and the exported model that may be served, becomes a version with its lineage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prefect import task

from twinloop.evaluation.gate import GateReport
from twinloop.registry.artifact import Artifact
from twinloop.registry.cards import describe
from twinloop.registry.documents import data_digest, import_documents
from twinloop.registry.fingerprint import module_fingerprint
from twinloop.registry.gates import record_gate
from twinloop.registry.ledger import who
from twinloop.registry.promotion import Promotion, open_ledger, promote
from twinloop.registry.snapshot import Version, VersionName
from twinloop.registry.tracking import code_of_run
from twinloop.registry.versions import Lineage, Registry
from twinloop.serving.knowledge.imports import Imported
from twinloop.tasks.context import Context
from twinloop.tasks.train import ADAPTER_BASE


@dataclass(frozen=True)
class Made:
    """What a lifecycle made. checkpoints: in the order in which they came to be. others: exported models of the last
    one in precisions that are not served. base: tags that name what it started from; parent: where that is registered.
    """

    checkpoints: Sequence[Artifact]
    others: Sequence[Artifact]
    exported: Artifact
    base: Mapping[str, str] = field(default_factory=dict)
    parent: VersionName | None = None


def register_stage(context: Context, made: Made, *, data: Artifact) -> Version:
    """The version of the exported model, which is the candidate now. Checkpoints and other precisions become versions
    of a registered model of their own, the first made from the base where that is registered. data: what was validated.
    """
    registry = Registry(context.mlruns, context.recipe)
    about, exported, parent = _about(context, made, data), made.exported, made.parent
    registered: dict[str | None, VersionName] = {}
    for checkpoint in made.checkpoints:
        base = checkpoint.metrics.get(ADAPTER_BASE)
        adapted = about | ({"adapter_base": base} if base else {})
        came_from = registered.get(checkpoint.manifest.inputs["model"].key, made.parent)
        version = _register(context, registry.checkpoints, checkpoint, came_from, about=adapted, alias=checkpoint.stage)
        parent = registered[checkpoint.key] = VersionName(version.name, version.version)
    for other in made.others:
        precision = other.metrics["precision"]
        alias = f"export-{precision}"
        _register(context, registry.checkpoints, other, parent, about=about | {"precision": precision}, alias=alias)
    precision = exported.metrics.get("precision", "")
    documents = data_digest(context.project / context.dataset, context.domain)
    about |= {"precision": precision}
    return _register(context, registry, exported, parent, about=about, documents=documents, servable=True)


register = task(name="register", persist_result=False)(register_stage)


def _register(
    context: Context,
    registry: Registry,
    artifact: Artifact,
    parent: VersionName | None,
    *,
    about: Mapping[str, str],
    alias: str | None = None,
    documents: str | None = None,
    servable: bool = False,
) -> Version:
    run_id = artifact.metrics["mlflow_run_id"]
    # The code that made it: what was skipped today was made at another commit.
    made_by = code_of_run(context.mlruns, run_id)
    lineage = Lineage(
        recipe=str(context.recipe_path or context.recipe),
        domain=context.loaded_domain.name,
        dataset=context.dataset,
        dataset_digest=context.dataset_digest,
        code=made_by or context.code,
        parent=parent,
        domain_fingerprint=module_fingerprint(context.loaded_domain.found),
        about=about,
        documents_digest=documents,
    )
    version = registry.register(
        artifact.path, lineage, run_id=run_id if made_by else None, servable=servable, domain=context.domain
    )
    if alias:
        registry.name_newest(alias, version)
    describe(registry, open_ledger(context.mlruns).read(), version.version)
    return version


def _about(context: Context, made: Made, data: Artifact) -> dict[str, str]:
    """What people want to read of all versions of this execution, short."""
    return {
        "about": context.domain.description or context.domain.name,
        **made.base,
        "rows": f"{data.metrics['rows']:,.0f} rows",
    }


@task(name="promote", persist_result=False)
def promote_if_shipped(context: Context, *, version: Version, report: GateReport, judged_now: bool) -> Promotion | None:
    """Keep the gate's report with the version, and make it the champion where that is SHIP.

    judged_now: whether the report was made by this run. One that was found in the store does not replace a later one
    about the champion by the same rules.

    Raises UserError for a version that was champion and was rolled back: that one returns only by `twinloop promote`.
    """
    registry = Registry(context.mlruns, context.recipe)
    if judged_now or report.decision == "BLOCK":
        record_gate(registry, version, report)
    if report.decision == "BLOCK":
        describe(registry, open_ledger(context.mlruns).read(), version.version)
        return None
    return promote(registry, version.version, report, who=who())


@task(name="documents", persist_result=False)
def import_data_documents(context: Context) -> Imported | None:
    """Put what has changed in the data's documents into the index of the model. None: there are none."""
    return import_documents(context.project, context.recipe, context.domain, context.dataset)
