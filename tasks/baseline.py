"""Which version a candidate is to beat at the gate, case by case, or why there is none.

A champion that is damaged is still what users were given: without one before it that stands in for it, the comparison
is not measured, and blocks. One that cannot be served at all was moved there in MLflow, past the gate, and is none.

A reward model is measured on pairs of answers, and every other model on cases: two of them can only be compared where
both are reward models, or neither is. So the champion of a model is never replaced by one of the other sort.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from twinloop.common.errors import UserError
from twinloop.models.config import KIND_NAMES, Kind
from twinloop.models.directory import load_config
from twinloop.registry.reconcile import what_it_is
from twinloop.registry.snapshot import Version
from twinloop.registry.version_files import version_error
from twinloop.registry.versions import CHAMPION, PREVIOUS, Registry

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Baseline:
    """What a candidate is compared with. version: None where there is nothing. note: why it is not compared with the
    champion, or with the one before where it is the champion itself. damaged: whether there is a champion to compare
    with that cannot be read, and none before it that stands in for it."""

    version: Version | None = None
    note: str = ""
    damaged: bool = False


def check_champion_kind(registry: Registry, kind: Kind, what: str) -> None:
    """Raises UserError where a model of this kind cannot be compared with the champion. what: that model, for the
    message."""
    champion = registry.snapshot().alias(CHAMPION)
    if champion is None or not champion.servable:
        return
    try:
        other = load_config(champion.path).kind
    except UserError:  # its files are damaged, so it is not compared with
        return
    if not _alike(kind, other):
        raise UserError(
            f"{champion}, the champion, is {KIND_NAMES[other]} and {what} is {KIND_NAMES[kind]}: they are measured on "
            "different things, so no gate can compare them; give the recipe another `name`, or rename the registered "
            f"model {registry.name} in MLflow"
        )


def find_baseline(registry: Registry, digest: str, kind: Kind, what: str) -> Baseline:
    """The champion; where the candidate is the champion already, or the champion is gone or cannot be read, the one
    before it. digest, kind: of the candidate; what: the candidate, for messages.

    Raises UserError where the candidate cannot be compared with the champion, since that is of another kind.
    """
    snapshot = registry.snapshot()
    champion = snapshot.alias(CHAMPION)
    if champion is None or champion.digest != digest:
        check_champion_kind(registry, kind, what)
    notes: list[str] = []
    damaged = False
    for alias, named in ((CHAMPION, "the champion"), (PREVIOUS, "the champion before")):
        version = snapshot.alias(alias)
        if version is None or version.digest == digest:
            continue
        if not version.servable:
            notes.append(f"{version}, {named} in MLflow, is {what_it_is(version)}")
        elif problem := version_error(version.path, version.digest):
            notes.append(f"{version}, {named}, is damaged ({problem}); its recipe, run again, repairs it")
            damaged |= version == champion
        elif not _alike(kind, other := load_config(version.path).kind):
            notes.append(f"{version}, {named}, is {KIND_NAMES[other]}")
        else:
            return _noted(Baseline(version, "; ".join(notes)))
    return _noted(Baseline(None, "; ".join(notes), damaged))


def _noted(baseline: Baseline) -> Baseline:
    if baseline.note:
        log.warning("nothing is compared with %s", baseline.note)
    return baseline


def _alike(kind: Kind, other: Kind) -> bool:
    return (kind == "reward") == (other == "reward")
