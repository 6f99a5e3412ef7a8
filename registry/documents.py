"""The documents of a registered model: those that the data brings, and those that an administrator has put since.

Each model has a store of its own, since another one of the project may be for another domain. `run` puts what has
changed in the data as new versions; a document that an administrator has changed is the administrator's.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from twinloop.domains.domain import Document, Domain
from twinloop.records import DATA_FILE
from twinloop.registry.snapshot import DOCUMENTS_DIGEST, Version
from twinloop.serving.knowledge.documents import EMPTY_DIGEST, DocumentStore, DocumentStoreError
from twinloop.serving.knowledge.history import contents_digest
from twinloop.serving.knowledge.imports import Imported


def documents_file(project: Path, model: str) -> Path:
    """Where a model's documents are."""
    return project / "state" / "documents" / f"{model}.db"


def open_documents(project: Path, model: str, domain: Domain, dataset: str = DATA_FILE) -> DocumentStore:
    """The documents that a model's answers are based on. A store that is still empty starts with those of the data.

    dataset: the file that versions the data, relative to the project.
    """
    store = DocumentStore(documents_file(project, model), domain.check_document)
    if (
        domain.passages
        and store.digest() == EMPTY_DIGEST
        and (documents := documents_of_data(project / dataset, domain))
    ):
        store.seed(documents)
    return store


def import_documents(project: Path, model: str, domain: Domain, dataset: str = DATA_FILE) -> Imported | None:
    """Put what has changed in the data's documents; None where the domain has none, or the data no file of them."""
    documents = documents_of_data(project / dataset, domain)
    if not documents:
        return None
    with closing(DocumentStore(documents_file(project, model), domain.check_document)) as store:
        return store.import_documents(documents)


def documents_warning(project: Path, champion: Version) -> str | None:
    """Where answers are given from other documents than the champion was trained with: what to know, in a line."""
    file, measured = documents_file(project, champion.name), champion.tags.get(DOCUMENTS_DIGEST)
    if not measured or not file.exists():
        return None
    try:
        with closing(DocumentStore(file)) as store:
            differs = store.contents() != measured
    except DocumentStoreError as error:
        return str(error)
    advice = "`twinloop documents list` shows those in use, and `twinloop run` trains with those of data/"
    words = f"the documents are not those that {champion} was trained and evaluated with; {advice}"
    return words if differs else None


def data_digest(dataset: Path, domain: Domain) -> str | None:
    """`contents_digest` of the data's documents, which a model is trained and evaluated with; None: it has none."""
    documents = documents_of_data(dataset, domain)
    return contents_digest(documents) if documents else None


def documents_of_data(dataset: Path, domain: Domain) -> list[Document]:
    """The good rows of the data's documents, of each document the newest; none where there are none."""
    if not domain.passages:
        return []
    from twinloop.records.files import find_data  # pandera and polars take a second
    from twinloop.records.validation import check_rows

    data, records = dataset.with_suffix(""), domain.record_types()
    if not (paths := find_data(data, records).of.get("documents")):
        return []
    rows, _ = check_rows(data, paths, records["documents"])
    newest: dict[str, dict[str, Any]] = {}
    for row in rows.frame.iter_rows(named=True):
        before = newest.get(row["document_id"])
        if before is None or (row["version"] or 0) >= (before["version"] or 0):
            newest[row["document_id"]] = row
    return [Document(row["document_id"], row["text"]) for row in newest.values()]
