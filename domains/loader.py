"""Finds the domain that a recipe names, and lists the code it is made of.

`returns` is a ready-made one, `my_package.tickets` an importable module, `./tickets.py` a file, from the project's
folder. The module defines `domain`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import twinloop.domains
from twinloop.common.errors import UserError
from twinloop.common.modules import FoundModule, find_module, modules_in
from twinloop.domains.domain import Domain

NOT_READY_MADE = frozenset(
    {"documents", "domain", "examples", "generate", "judging", "loader", "metrics", "owners", "record_types"}
)


@dataclass(frozen=True)
class LoadedDomain:
    """A domain and where it is defined: what fingerprints are made from."""

    name: str
    """As the recipe names it: what loads it again."""
    domain: Domain
    found: FoundModule

    @property
    def file(self) -> Path:
        """The module's source."""
        return self.found.file


def ready_made() -> list[str]:
    """The names of the domains that come with Twinloop."""
    return [name for name in modules_in(twinloop.domains) if name not in NOT_READY_MADE]


def load_domain(name: str, project: Path) -> LoadedDomain:
    """The domain of this name. A module is also looked for in the project's folder.

    Raises UserError where there is none, where its code fails, or where it defines no `domain`.
    """
    found = find_module(name, project, kind="domain", package=twinloop.domains, ready_made=ready_made())
    domain = getattr(found.module, "domain", None)
    if not isinstance(domain, Domain):
        needed = getattr(found.module, "NEEDS", "end the module with `domain = MyDomain()`")
        raise UserError(f"domain: {name} defines no `domain`; {needed}")
    return LoadedDomain(name, domain, found)
