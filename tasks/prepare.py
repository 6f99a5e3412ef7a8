"""Data as stages: built by DVC, then validated."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import task

from twinloop.records.dataset import DataVersion, build_data, current_version
from twinloop.records.validated import ignored_files
from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context, Report
from twinloop.tasks.recipe import Recipe, ValidateSettings

log = logging.getLogger(__name__)

SHOWN_FILES = 5


def data_stage(context: Context) -> tuple[DataVersion, float | None]:
    """data/ at the version of params.yaml and the generator, every file hashed.

    With the seconds that making it took; None where it was there.
    """
    context.progress.started("data")
    started = time.perf_counter()
    seconds = None
    if (version := current_version(context.data_home)) is None:
        version = build_data(context.data_home)
        seconds = time.perf_counter() - started
    context.progress.finished("data", seconds=seconds, name=version.md5)
    return version, seconds


prepare_data = task(name="data", persist_result=False)(data_stage)


def validate_stage(
    context: Context, settings: ValidateSettings, *, needed: Sequence[str], data: DataVersion
) -> Artifact:
    """One Parquet file a record type, the quarantine, and report.json. needed: the types whose files must be there."""

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        from twinloop.records.validation import validate

        found = validate(data.path, out, settings, context.domain, needed)
        ignored = {name: file.ignored_fields for name, file in found.files.items() if file.ignored_fields}
        return {**found.metrics(), "findings": [str(each) for each in found.findings], "ignored_fields": ignored}

    artifact = context.run(
        "validate",
        work,
        settings={**settings.model_dump(), "needed": sorted(needed)},
        inputs={"data": data.md5},
        modules=("twinloop.records.validation", "twinloop.records.validated"),
        uses_domain=True,
    )
    for finding in artifact.metrics["findings"]:
        log.warning("%s", finding)
    if count := artifact.metrics["quarantined"]:
        log.warning("quarantined rows: %d; each, with its reason, is in %s", count, artifact.path / "quarantine")
    for name, fields in artifact.metrics["ignored_fields"].items():
        log.warning("fields of %s that nothing reads: %s", name, ", ".join(fields))
    if ignored := ignored_files(artifact.path):
        named = [f"{name} ({why})" for name, why in ignored.items()]
        more = f", and {len(named) - SHOWN_FILES} more" if len(named) > SHOWN_FILES else ""
        log.warning("ignored files of %s: %s%s", data.path, ", ".join(named[:SHOWN_FILES]), more)
    return artifact


validate_data = task(name="validate", persist_result=False)(validate_stage)


def ready_data(context: Context, recipe: Recipe) -> tuple[Context, Artifact]:
    """Build and validate the data, for a command without Prefect; with the context that names their version."""
    version, _ = data_stage(context)
    context = context.on_data(version.md5)
    return context, validate_stage(context, recipe.validate_, needed=recipe.record_types, data=version)
