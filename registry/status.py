"""What is being served, from which data and code, who let it through, and where the way back leads.

Read from MLflow's database and the ledger; waits for no lock, hashes no weights, imports neither MLflow nor torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from twinloop.common.errors import UserError
from twinloop.registry.gates import read_gate
from twinloop.registry.ledger import Champion, Contents, Entry
from twinloop.registry.logged_models import MODEL_FOLDER
from twinloop.registry.promotion import LEDGER_HEAD, Promotion, open_ledger
from twinloop.registry.reconcile import changes_in_mlflow, existing
from twinloop.registry.snapshot import SHORT, Snapshot, Version
from twinloop.registry.versions import CANDIDATE, CHAMPION, PREVIOUS, Registry


@dataclass(frozen=True)
class VersionStatus:
    version: int
    stage: str
    digest: str
    path: str
    run_id: str | None
    gate: str | None  # SHIP, BLOCK, or None: no gate has judged it

    @classmethod
    def of(cls, version: Version) -> VersionStatus:
        gate = version.tags.get("gate_decision") if "gate_digest" in version.tags else None
        return cls(version.version, version.stage, version.digest, str(version.path), version.run_id, gate)


@dataclass(frozen=True)
class GateStatus:
    version: int
    decision: str
    digest: str
    when: str
    report: dict[str, Any]  # as evaluation.gate.GateReport writes it


@dataclass(frozen=True)
class Origin:
    """One link of the chain from the served exported model back to its data and code."""

    kind: str  # a stage's name, "base", "dataset", "code" or "recipe"
    name: str
    digest: str
    run_id: str | None = None


@dataclass(frozen=True)
class Status:
    """The registry at one moment. `origins` belongs to the champion; without one, to the candidate."""

    model: str
    champion: VersionStatus | None
    candidate: VersionStatus | None
    previous: VersionStatus | None
    last_gate: GateStatus | None
    last_promotion: Promotion | None
    last_move_is_gone: bool
    """Whether MLflow does not have the version of the last move any more."""
    origins: list[Origin]
    warnings: list[str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def to_text(self) -> str:
        lines = [f"model      {self.model}"]
        for alias in (CHAMPION, CANDIDATE, PREVIOUS):
            found: VersionStatus | None = getattr(self, alias)
            lines.append(f"{alias:<11}" + (_version_line(found) if found else "none"))
        if promotion := self.last_promotion:
            come_from = f" from version {promotion.from_version}" if promotion.from_version else ""
            went_to = (
                f"to version {promotion.to_version}" if promotion.to_version else "to none, it was removed in MLflow"
            )
            gone = " (gone from MLflow)" if self.last_move_is_gone else ""
            lines.append(
                f"last move  {promotion.action} {went_to}{gone}{come_from}, by {promotion.who}, {promotion.when}"
            )
        if gate := self.last_gate:
            lines.append(f"last gate  {gate.decision} for version {gate.version}, report {gate.digest[:SHORT]}")
            lines += [
                f"             {reason['reason']} (owner: {reason['owner']})" for reason in gate.report["reasons"]
            ]
        if self.origins:
            lines.append("made from")
            width = max(len(origin.name) for origin in self.origins if origin.digest)
            lines += [f"  {o.kind:<10} {o.name:<{width}} {o.digest[:SHORT]}".rstrip() for o in self.origins]
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])


def status(registry: Registry) -> Status:
    """What the registry and the ledger hold now. What is wrong with either is listed in `warnings`."""
    snapshot = registry.snapshot()
    warnings: list[str] = []
    contents: Contents | None = None
    try:
        contents = open_ledger(registry.mlruns).read(head=snapshot.tags.get(LEDGER_HEAD))
    except UserError as error:
        warnings.append(str(error))
    committed = contents.committed(registry.name) if contents else []
    if contents:
        warnings += _disagreements(registry.name, snapshot, contents)
    named = {alias: snapshot.alias(alias) for alias in (CHAMPION, CANDIDATE, PREVIOUS)}
    versions = {version.version: version for version in named.values() if version}
    for number, version in versions.items():
        aliases = " and ".join(alias for alias, each in named.items() if each and each.version == number)
        warnings += _about_files(aliases, version)
    if champion := named[CHAMPION]:
        from twinloop.registry.documents import documents_warning  # what it imports takes longer than all of this

        if differ := documents_warning(registry.mlruns.root.parent, champion):
            warnings.append(differ)
    last_gate = None
    try:
        last_gate = _last_gate(registry, snapshot)
    except UserError as error:
        warnings.append(str(error))
    subject = named[CHAMPION] or named[CANDIDATE]
    return Status(
        model=registry.name,
        champion=_status(named[CHAMPION]),
        candidate=_status(named[CANDIDATE]),
        previous=_status(named[PREVIOUS]),
        last_gate=last_gate,
        last_promotion=Promotion.of(committed[-1]) if committed else None,
        last_move_is_gone=bool(committed) and not _is_there(snapshot, committed[-1]),
        origins=origins(registry.lineage(subject)) if subject else [],
        warnings=warnings,
    )


def origins(chain: list[Version]) -> list[Origin]:
    """The chain of versions, itself first, and what is at its end: base, dataset, recipe and commit."""
    own = chain[0].name
    steps = [
        Origin(
            version.stage,
            f"version {version.version}" if version.name == own else f"{version.name}/{version.version}",
            version.digest,
            version.run_id,
        )
        for version in chain
    ]
    if gone := chain[-1].parent:
        steps.append(Origin("deleted", f"{gone} (not in MLflow any more)", ""))
    first = chain[-1].tags
    if base := first.get("base"):
        steps.append(Origin("base", base, first.get("base_digest", "")))
    subject = chain[0].tags
    steps.append(Origin("dataset", chain[0].dataset, subject.get("dataset_digest", "")))
    steps.append(Origin("recipe", subject.get("recipe", ""), ""))
    # All of it, not the first characters: "+dirty" is at its end.
    steps.append(Origin("code", subject.get("commit", ""), ""))
    return steps


def _disagreements(model: str, snapshot: Snapshot, contents: Contents) -> list[str]:
    found = []
    if (pending := contents.pending()) and pending.model == model:
        found.append(
            f"a {pending.action} to version {pending.to_version} by {pending.who} is under way or was interrupted; "
            "if interrupted, the next promotion or rollback finishes it"
        )
    else:
        found += changes_in_mlflow(model, snapshot, contents)
    if contents.torn:
        found.append("the ledger's last line was cut off by a crash; the next promotion or rollback moves it away")
    if not contents.entries and LEDGER_HEAD in snapshot.tags:
        found.append("the ledger is gone, and MLflow remembers that there was one")
    return found


def _about_files(aliases: str, version: Version) -> list[str]:
    if not version.path.is_dir():
        return [f"the files of {aliases} ({version}) are gone: {version.path}; `twinloop run` puts them back"]
    place = version.path.parent if version.path.name == MODEL_FOLDER else version.path
    if version.source.startswith("file:") and version.source != place.as_uri():  # MLflow stores it absolute
        return [
            f"the project was moved: MLflow's own clients look for {aliases} ({version}) in {version.source}; "
            f"`mlflow.pyfunc.load_model` takes {place} instead"
        ]
    return []


def _is_there(snapshot: Snapshot, move: Entry) -> bool:
    if move.to_version is None:
        return True
    return existing(snapshot, Champion(move.to_version, move.manifest_digest)) is not None


def _last_gate(registry: Registry, snapshot: Snapshot) -> GateStatus | None:
    judged = [version for version in snapshot.versions.values() if "gate_digest" in version.tags]
    if not judged:
        return None
    latest = max(judged, key=lambda version: version.tags.get("gate_when", ""))
    report = read_gate(registry, latest)
    assert report is not None  # it has the tag
    content = report.model_dump(mode="json")
    return GateStatus(latest.version, report.decision, report.digest(), latest.tags.get("gate_when", ""), content)


def _status(version: Version | None) -> VersionStatus | None:
    return VersionStatus.of(version) if version else None


def _version_line(found: VersionStatus) -> str:
    return f"version {found.version}  {found.stage}  {found.digest[:SHORT]}  gate {found.gate or 'none'}"
