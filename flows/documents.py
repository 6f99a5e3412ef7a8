"""The commands of `twinloop documents`: one store a model, with the rules of its domain."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain
from twinloop.registry.champion import load_served_domain
from twinloop.registry.documents import open_documents
from twinloop.registry.versions import CHAMPION, Registry
from twinloop.serving.knowledge.documents import DocumentStore


def put_document(project: Path, model: str, document_id: str, text: str) -> int:
    if text == "-":
        text = sys.stdin.buffer.read().decode(errors="surrogateescape")  # what is no UTF-8 is refused with the rest
    with _documents(project, model) as store:
        document = store.put(document_id, text)
    print(f"{document.document_id} version {document.version}: {document.text}")
    return 0


def list_documents(project: Path, model: str) -> int:
    with _documents(project, model) as store:
        documents = store.list()
    for document in documents:
        print(f"{document.document_id:<8} v{document.version:<4} {document.text}")
    if not documents:
        print(f"{model}: no documents; `twinloop documents put ID TEXT` adds one", file=sys.stderr)
    return 0


def show_history(project: Path, model: str, document_id: str) -> int:
    with _documents(project, model) as store:
        versions = store.history(document_id)
    if not versions:
        raise UserError(f"document {document_id!r}: is not there; `twinloop documents list` names those that are")
    for version in versions:
        print(f"v{version.document.version:<4} {version.recorded_at}  {version.document.text}")
    return 0


@contextmanager
def _documents(project: Path, model: str) -> Iterator[DocumentStore]:
    with closing(open_documents(project, model, *_domain_and_dataset(project, model))) as store:
        yield store


def _domain_and_dataset(project: Path, model: str) -> tuple[Domain, str]:
    """What a model is for and made from: by its champion's tags, or, while it has none, the recipe of its name."""
    from twinloop.domains.loader import load_domain
    from twinloop.tasks.recipe import recipe_of

    champion = Registry.of(project, model).snapshot().alias(CHAMPION)
    if champion is not None:
        return load_served_domain(champion, project).domain, champion.dataset
    recipe = recipe_of(model, project)
    return load_domain(recipe.domain, project).domain, recipe.dataset
