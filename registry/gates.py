"""Gate reports of versions: kept under their own digest, named in the version's tags, read before a promotion."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from twinloop.common.errors import UserError
from twinloop.common.files import write_whole
from twinloop.registry.reconcile import what_it_is
from twinloop.registry.snapshot import SHORT, Version
from twinloop.registry.versions import Registry

if TYPE_CHECKING:
    from twinloop.evaluation.gate import GateReport  # imported where a report is read


def record_gate(registry: Registry, version: Version, report: GateReport) -> None:
    """Keep a gate's report, SHIP or BLOCK, and name it in the version's tags.

    The report lies in `mlruns/gates/` under its own digest, so that it cannot change unnoticed. Raises UserError for
    a report on something else.
    """
    _is_about(version, report)
    digest = report.digest()
    path = _gate_file(registry, digest)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, report.to_json().encode())
    if version.tags.get("gate_digest") != digest:
        when = datetime.now(UTC).isoformat()
        # The digest last: killed in between, it differs, and the next recording writes all three again.
        registry.tag(version, {"gate_decision": report.decision, "gate_when": when, "gate_digest": digest})


def read_gate(registry: Registry, version: Version) -> GateReport | None:
    """The latest gate report of a version, None if no gate has judged it. Raises UserError if it was changed."""
    from twinloop.evaluation.gate import GateReport

    if not (digest := version.tags.get("gate_digest")):
        return None
    path = _gate_file(registry, digest)
    try:
        report = GateReport.from_json(path.read_bytes())
    except (OSError, ValueError):
        report = None
    if report is None or report.digest() != digest:
        raise UserError(f"{path}: the gate report of {version} is missing or changed; run the gate again")
    return report


def require_ship(version: Version, report: GateReport | None) -> GateReport:
    """The report, if it lets this very version through. Raises UserError if it does not."""
    if not version.servable:
        raise UserError(f"{version}: {what_it_is(version)} is not served; `twinloop status` names the candidate")
    if report is None:
        remedy = f"run `twinloop gate --version {version.version}`"
        raise UserError(f"{version}: not promoted, no gate has judged it; {remedy}")
    _is_about(version, report)
    if report.decision != "SHIP":
        raise UserError(
            f"{version}: not promoted, its gate says {report.decision}; `twinloop status` gives the reasons"
        )
    return report


def _is_about(version: Version, report: GateReport) -> None:
    if report.candidate != version.digest:
        raise UserError(
            f"{version}: the gate report is about {report.candidate[:SHORT] or 'nothing named'} and this version "
            f"is {version.digest[:SHORT]}; run `twinloop gate --version {version.version}`"
        )


def _gate_file(registry: Registry, digest: str) -> Path:
    return registry.mlruns.root / "gates" / f"{digest}.json"
