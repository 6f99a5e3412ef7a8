"""`twinloop data schema`: what a row of each data file must be, with an example."""

from __future__ import annotations

import difflib
from pathlib import Path

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain
from twinloop.domains.loader import load_domain
from twinloop.flows.init import KINDS, TEMPLATES
from twinloop.records.schema import text


def data_schema(domain: Domain, kind: str | None) -> str:
    """The forms of a domain's files, or of the one that `kind` names. Raises UserError where there is no such type."""
    records = domain.record_types()
    if kind is not None and kind not in records:
        near = difflib.get_close_matches(kind, records, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(records)}"
        raise UserError(f"{kind}: domain {domain.name} has no such record type; {hint}")
    shown = [record for name, record in records.items() if kind in (None, name)]
    made = {name: how.source for name, how in domain.derived().items()}
    notes = {name: f"\n\nMade from {source} where there is no file of it." for name, source in made.items()}
    return "\n\n\n".join(text(record, domain) + notes.get(record.name, "") for record in shown)


def named_domain(name: str, project: Path) -> Domain:
    """A domain as a recipe names it; a ready-made one that needs a file of one's own as `twinloop init` writes it."""
    kind = KINDS.get(name)
    try:
        return load_domain(name, project).domain
    except UserError:
        if kind is None or kind.file is None:
            raise
        return load_domain(f"./{kind.file}", TEMPLATES / name).domain
