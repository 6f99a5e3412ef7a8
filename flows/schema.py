"""`twinloop data schema`: what a row of each data file must be, with an example."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain
from twinloop.domains.loader import load_domain
from twinloop.domains.record_types import RecordType
from twinloop.flows.environment import prepare_environment
from twinloop.flows.init import KINDS, TEMPLATES
from twinloop.records.schema import example_row, other_forms, text


def data_schema(domain: Domain, kind: str | None) -> str:
    """The forms of a domain's files, or of the one that `kind` names. Raises UserError where there is no such type."""
    records = domain.record_types()
    if kind is not None and kind not in records:
        near = difflib.get_close_matches(kind, records, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(records)}"
        raise UserError(f"{kind}: domain {domain.name} has no such record type; {hint}")
    if kind is not None:
        return _whole(records[kind], domain)
    return "\n\n\n".join(_text(record, domain) for record in records.values())


def _whole(record: RecordType, domain: Domain) -> str:
    """With the forms of other tools."""
    forms = other_forms(record, example_row(record, domain)).items()
    lines = [f"{name}: {json.dumps(row, ensure_ascii=False)}" for name, row in forms]
    if "prompt" in record.columns:
        lines.append("A prompt may also be one text, which is the user's message.")
    return "\n\n".join([_text(record, domain), *(["Also read:"] if lines else []), *lines])


def _text(record: RecordType, domain: Domain) -> str:
    how = domain.derived().get(record.name)
    note = f"\n\nMade from {how.source} where there is no file of it." if how else ""
    return text(record, domain) + note


def named_domain(name: str, project: Path) -> Domain:
    """A domain as a recipe names it; a ready-made one that needs a file of one's own as `twinloop init` writes it."""
    kind = KINDS.get(name)
    try:
        return load_domain(name, project).domain
    except UserError:
        if kind is None or kind.file is None:
            raise
        return load_domain(f"./{kind.file}", TEMPLATES / name).domain


def recipe_domain() -> Domain:
    """That of the recipe of the project in this folder. Raises UserError outside of a project."""
    from twinloop.tasks.context import find_project
    from twinloop.tasks.recipe import default_recipe, load_recipe

    try:
        project = find_project()
    except UserError as error:
        raise UserError(f"{error}, or name a domain, such as --domain returns") from None
    prepare_environment(project)
    return named_domain(load_recipe(default_recipe(project), project).domain, project)
