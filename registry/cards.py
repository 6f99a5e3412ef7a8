"""The descriptions that MLflow's pages show, in Markdown: what a version is, from what, how it was judged, its use.

Written anew whenever something of it changes. The aliases beside it are MLflow's own and always true; what is said here
of champions is history.
"""

from __future__ import annotations

import logging
from itertools import zip_longest
from pathlib import Path

from twinloop.common.errors import UserError, one_line
from twinloop.registry.gates import read_gate
from twinloop.registry.ledger import Contents
from twinloop.registry.snapshot import SHORT, Version
from twinloop.registry.versions import Registry

log = logging.getLogger(__name__)


def describe(registry: Registry, contents: Contents, *numbers: int | None) -> None:
    """Write the descriptions of these versions, and of their registered model. Never raises: it is for reading."""
    try:
        snapshot, client = registry.snapshot(), registry.mlruns.client
        for version in (snapshot.versions.get(number or 0) for number in dict.fromkeys(numbers)):
            if version is not None:
                text = describe_version(registry, contents, version)
                client.update_model_version(registry.name, str(version.version), text)
        if snapshot.exists:
            newest = max(snapshot.versions.values(), key=lambda version: version.version, default=None)
            client.update_registered_model(registry.name, describe_model(registry, newest))
    except Exception as error:  # whatever it is: what is registered and served does not depend on it
        log.warning("%s: its descriptions in MLflow were not written: %s", registry.name, one_line(error))


def describe_model(registry: Registry, version: Version | None) -> str:
    """What the registered model is for, and what its aliases mean."""
    about = version.tags.get("about", "") if version else ""
    for_what = f" for the domain `{version.tags.get('domain', '')}`: {about}" if version and about else ""
    if registry.name != registry.experiment:
        comma = "," if for_what else ""
        return "\n\n".join(
            [
                f"What [{registry.experiment}](#/models/{registry.experiment}) is made from{comma}{for_what}",
                "Checkpoints of each stage of training, for lineage and for going on from; none of them is served. "
                "An alias names the newest of each stage. Exports in precisions that are not served are here too.",
                _code(f'mlflow.transformers.load_model("models:/{registry.name}/VERSION")'),
            ]
        )
    return "\n\n".join(
        [
            f"Exported models{for_what}",
            "- `champion` is served\n- `candidate` is the newest one, before its gate\n"
            "- `previous` is where `twinloop rollback` goes",
            f"Only `twinloop promote` and `twinloop rollback` move the champion, on a gate report that says SHIP. What "
            f"they were made from is in [{registry.checkpoints.name}](#/models/{registry.checkpoints.name}).",
            _code(f'mlflow.pyfunc.load_model("models:/{registry.name}@champion")'),
        ]
    )


def describe_version(registry: Registry, contents: Contents, version: Version) -> str:
    """All that a person asks about one version."""
    history = _history(registry, contents, version) if version.servable else ""
    parts = [_headline(version), *_facts(registry, version, champion=history)]
    if version.servable:
        load = (
            f'model = mlflow.pyfunc.load_model("models:/{registry.name}/{version.version}")\nmodel.predict([request])'
        )
        parts += [_code(load), f"`twinloop serve --model {registry.name}` serves the champion."]
    elif not version.exported:
        parts.append(_code(f'mlflow.transformers.load_model("models:/{registry.name}/{version.version}")'))
    return "\n\n".join(parts)


def model_card(
    registry: Registry,
    version: Version,
    code: str,
    *,
    library: str = "transformers",
    task: str = "text-generation",
) -> str:
    """The README.md of a version that is handed over, as model hubs read it, without names of people and folders.

    code: how it is loaded, in Python, by that library. task: what hubs call what it does.
    """
    about = version.tags.get("about", "")
    license = [f"license: {named}"] if (named := version.tags.get("base_license")) else []
    parts = [
        "\n".join(["---", f"pipeline_tag: {task}", f"library_name: {library}", *license, "---"]),
        f"# {version}",
        f"Domain `{version.tags.get('domain', '')}`" + (f": {about}" if about else ""),
        *_facts(registry, version, recipe=f"`{Path(version.tags.get('recipe', '')).name}`"),
        f"```python\n{code}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _facts(registry: Registry, version: Version, **more: str) -> list[str]:
    """What it was made from, and what its gate found. more: rows of the table, instead of those of the same name."""
    tags = version.tags
    chain = registry.lineage(version)[1:]
    made_from = " ← ".join(f"`{each.name}/{each.version}` ({each.stage})" for each in chain)
    rows = {
        "made from": " ← ".join(filter(None, [made_from, tags.get("base", "")])),
        "data": ", ".join(filter(None, [_digest("DVC", tags.get("dataset_digest")), tags.get("rows", "")])),
        "recipe": f"`{tags['recipe']}`" if tags.get("recipe") else "",
        "code": f"`{tags['commit']}`" if tags.get("commit") else "",
        "content": _digest("sha256", version.digest),
        "adapter": _digest("LoRA in `model/adapter`, of the base in `model/base`: sha256", tags.get("adapter_base")),
        **more,
    }
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value)]
    return ["\n".join(table), *(_gate(registry, version) if version.servable else [])]


def _headline(version: Version) -> str:
    about = version.tags.get("about", "")
    purpose = f"domain `{version.tags.get('domain', '')}`" + (f": {about}" if about else "")
    precision = version.tags.get("precision", "")
    if version.servable:
        return f"**Exported model**{f' in {precision}' if precision else ''}, {purpose}"
    if version.exported:
        return f"**Exported model in {precision or 'another precision'}, not served**, {purpose}"
    return f"**Checkpoint after {version.stage}**, not served, {purpose}"


def _gate(registry: Registry, version: Version) -> list[str]:
    try:
        report = read_gate(registry, version)
    except UserError as error:
        return [f"**Gate**: {error}"]
    if report is None:
        return ["**Gate**: none has judged it yet."]
    passed = sum(check.outcome == "pass" for check in report.checks)
    skipped = sum(check.outcome == "skipped" for check in report.checks)
    reasons = "; ".join(f"{reason.reason} (owner: {reason.owner})" for reason in report.reasons)
    line = f"**Gate**: {report.decision}, {passed} of {len(report.checks)} rules pass"
    line += f", {skipped} skipped" if skipped else ""
    line += f": {reasons}" if reasons else ""
    rows = [
        f"| {check.rule} | {check.outcome} | {'–' if check.measured is None else f'{check.measured:.4g}'} "
        f"| {check.bound} {check.limit:g} | {check.detail} |"
        for check in report.checks
    ]
    head = ["| rule | outcome | measured | limit | |", "|---|---|---|---|---|"]
    return [f"{line} (report `{report.digest()[:SHORT]}`)", *(["\n".join([*head, *rows])] if rows else [])]


def _history(registry: Registry, contents: Contents, version: Version) -> str:
    """When it was champion, and which version was before and after it."""
    moves = contents.committed(registry.name)
    found = []
    for move, after in zip_longest(moves, moves[1:]):
        if (move.to_version, move.manifest_digest) != (version.version, version.digest):
            continue
        words = f"{move.action} on {move.when} by {move.who}"
        words += f", after version {move.from_version}" if move.from_version else ""
        if after is not None:
            words += f"; then version {after.to_version}" if after.to_version else "; then removed in MLflow"
        found.append(words)
    return "<br>".join(found)


def _digest(kind: str, digest: str | None) -> str:
    return f"{kind} `{digest}`" if digest else ""


def _code(text: str) -> str:
    return f"```python\nimport mlflow\n\n{text}\n```"
