"""Which version a candidate is to beat at the gate, case by case.

A reward model is measured on pairs of answers, and every other model on cases: two of them can only be compared where
both are reward models, or neither is. So the champion of a model is never replaced by one of the other sort.
"""

from __future__ import annotations

import logging

from twinloop.common.errors import UserError
from twinloop.models.config import Kind
from twinloop.models.directory import load_config
from twinloop.registry.snapshot import Version
from twinloop.registry.version_files import version_error
from twinloop.registry.versions import CHAMPION, PREVIOUS, Registry
from twinloop.training.method import KIND_NAMES

log = logging.getLogger(__name__)


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


def version_to_beat(registry: Registry, digest: str, kind: Kind, what: str) -> Version | None:
    """The champion; where the candidate is the champion already, or the champion is gone or cannot be loaded, the one
    before it. None where there is none of both. digest, kind: of the candidate; what: the candidate, for messages.

    Raises UserError where the candidate cannot be compared with the champion, since that is of another kind.
    """
    snapshot = registry.snapshot()
    champion = snapshot.alias(CHAMPION)
    if champion is None or champion.digest != digest:
        check_champion_kind(registry, kind, what)
    for alias in (CHAMPION, PREVIOUS):
        version = snapshot.alias(alias)
        if version is None or version.digest == digest:
            continue
        if not version.servable:
            log.warning("%s, the %s in MLflow, cannot be served: nothing is compared with it", version, alias)
        elif problem := version_error(version.path, version.digest):
            log.warning("%s, the %s: %s in %s: nothing is compared with it", version, alias, problem, version.path)
        elif not _alike(kind, other := load_config(version.path).kind):
            log.warning("%s, the %s, is %s: nothing is compared with it", version, alias, KIND_NAMES[other])
        else:
            return version
    return None


def _alike(kind: Kind, other: Kind) -> bool:
    return (kind == "reward") == (other == "reward")
