"""The ledger against MLflow: who is champion now, where a rollback can go, and what was changed in MLflow itself.

People delete versions, aliases and whole models in MLflow, rename them, and move aliases there. So what is there is
read from MLflow each time; the ledger says only what happened, and a version of it counts while MLflow has that number
with that content.
"""

from __future__ import annotations

from collections.abc import Iterable

from twinloop.registry.ledger import Champion, Champions, Contents
from twinloop.registry.snapshot import Snapshot, Version
from twinloop.registry.versions import CANDIDATE, CHAMPION, PREVIOUS


def champion_in_mlflow(snapshot: Snapshot) -> Champion | None:
    """What the alias names, whatever it is. A version that is none of ours has no digest."""
    number = snapshot.aliases.get(CHAMPION)
    if number is None:
        return None
    version = snapshot.versions.get(number)
    return Champion(number, version.digest if version else "")


def existing(snapshot: Snapshot, champion: Champion | None) -> Version | None:
    """The version, where MLflow still has it with that content."""
    version = snapshot.versions.get(champion.version) if champion else None
    return version if version and champion and version.digest == champion.digest else None


def ways_back(snapshot: Snapshot, champions: Champions) -> list[Version]:
    """The champions before this one that exist and can be served, the nearest first."""
    found = (existing(snapshot, each) for each in reversed(champions.earlier))
    current = champions.current.version if champions.current else None
    return [version for version in found if version and version.servable and version.version != current]


def alias_moves(champions: Champions, snapshot: Snapshot) -> dict[str, int | None]:
    """The aliases that are not where these champions want them, in the order in which to move them; None removes one.
    An alias of what does not exist any more is removed."""
    champion = champions.current.version if existing(snapshot, champions.current) and champions.current else None
    previous = next((version.version for version in ways_back(snapshot, champions)), None)
    wanted: dict[str, int | None] = {PREVIOUS: previous, CHAMPION: champion}
    if champion is not None and snapshot.aliases.get(CANDIDATE) == champion:
        wanted[CANDIDATE] = None
    return {alias: version for alias, version in wanted.items() if snapshot.aliases.get(alias) != version}


def changes_in_mlflow(model: str, snapshot: Snapshot, contents: Contents) -> list[str]:
    """What was deleted or moved in MLflow since the ledger's last line, each in a sentence that says what to do."""
    champions = contents.champions(model)
    known, actual = champions.current, champion_in_mlflow(snapshot)
    if not snapshot.exists:
        if known is None:
            return []
        return [
            f"MLflow has no registered model {model} any more, it was deleted or renamed there (its last champion was "
            f"version {known.version}); `twinloop run` makes it anew"
        ]
    back = ways_back(snapshot, champions)
    found = list(_about_champion(snapshot, known, actual, back))
    if known is not None and known == actual:
        found += _about_previous(snapshot, champions, back)
    return found


def _about_champion(
    snapshot: Snapshot, known: Champion | None, actual: Champion | None, back: list[Version]
) -> Iterable[str]:
    go_back = f"`twinloop rollback` goes back to version {back[0].version}" if back else "`twinloop run` makes one"
    if actual is None:
        if known is None:
            return
        if existing(snapshot, known):
            again = f"`twinloop promote {known.version}` makes it the champion again"
            yield f"there is no champion: the alias of version {known.version} was removed in MLflow; {again}"
        elif known.version in snapshot.versions:
            yield f"there is no champion: version {known.version} is not the one that was the champion; {go_back}"
        else:
            yield f"there is no champion: version {known.version} was deleted in MLflow; {go_back}"
        return
    if actual != known:
        what = "the champion was moved outside of the ledger"
        if known is not None and actual.version == known.version:
            what = f"the champion, version {actual.version}, has other content than the ledger knows of"
        yield f"{what}; the next promotion or rollback writes it down"
    version = snapshot.versions.get(actual.version)
    if version is None:
        yield f"the champion, version {actual.version}, was not registered by Twinloop and is not served; {go_back}"
    elif not version.servable:
        yield f"the champion, version {actual.version}, is {what_it_is(version)} and cannot be served; {go_back}"


def _about_previous(snapshot: Snapshot, champions: Champions, back: list[Version]) -> Iterable[str]:
    if champions.earlier and not existing(snapshot, champions.earlier[-1]):
        gone = f"of the champions before this one {why_not(snapshot, champions.earlier[-1])}"
        then = f"a rollback goes to version {back[0].version}" if back else "there is nothing to roll back to"
        yield f"{gone}; {then}"
    elif back and PREVIOUS not in snapshot.aliases:
        yield f"the alias {PREVIOUS} was removed in MLflow; a rollback goes to version {back[0].version}"


def why_not(snapshot: Snapshot, champion: Champion) -> str:
    """Why a rollback does not go to this champion of before."""
    name = f"version {champion.version}"
    if not champion.digest:
        return f"{name} was not registered by Twinloop"
    version = existing(snapshot, champion)
    if version is None:
        return f"{name} was deleted in MLflow"
    return f"{name} is the champion" if version.servable else f"{name} is {what_it_is(version)}"


def what_it_is(version: Version) -> str:
    """What a version that is not served is, in words."""
    return "an export of a precision that is not served" if version.exported else f"a {version.stage} checkpoint"
