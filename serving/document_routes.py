"""The routes of documents: reading them is open, changing them is for administrators."""

# No `from __future__ import annotations`: what a document's id must be is the domain's own, and FastAPI must be handed
# the type itself.

from typing import Annotated

from fastapi import APIRouter, Body, Path
from pydantic import BaseModel, ConfigDict, Field

from twinloop.domains.documents import MAX_ID_CHARACTERS, MAX_TEXT_CHARACTERS
from twinloop.domains.domain import Domain, Text
from twinloop.serving.decisions import Passage
from twinloop.serving.described import WITH_BODY, Guard, errors
from twinloop.serving.errors import ApiError
from twinloop.serving.knowledge.documents import DocumentStore

REFUSED_DOCUMENT = {
    422: "The id or the text is none that the domain's check of documents accepts; the message says why"
}


class DocumentText(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Text = Field(min_length=1, max_length=MAX_TEXT_CHARACTERS, description="the document's new text")


class DocumentList(BaseModel):
    """The newest version of each document, and the digest of all versions ever put."""

    documents: list[Passage]
    digest: str


class DocumentVersion(BaseModel):
    version: int
    text: str
    recorded_at: str


class DocumentHistory(BaseModel):
    document_id: str
    versions: list[DocumentVersion]


def document_router(documents: DocumentStore) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/documents", responses=errors())
    def newest() -> DocumentList:
        listed = documents.list_with_digest()
        return DocumentList(documents=[Passage.of(each) for each in listed.documents], digest=listed.digest)

    @router.get("/v1/documents/{document_id:path}", responses=errors(404))
    def history(document_id: Annotated[str, Path(min_length=1)]) -> DocumentHistory:
        versions = documents.history(document_id)
        if not versions:
            raise ApiError(404, f"document {document_id!r} is not there", param="document_id")
        recorded = [
            DocumentVersion(version=each.document.version, text=each.document.text, recorded_at=each.recorded_at)
            for each in versions
        ]
        return DocumentHistory(document_id=document_id, versions=recorded)

    return router


def admin_router(domain: Domain, documents: DocumentStore, guard: Guard) -> APIRouter:
    """What administrators do with documents."""
    router = APIRouter(dependencies=guard.dependencies)
    # What the domain asks of documents is only described here: the store asks its check.
    patterns = {name: {"pattern": pattern} for name, pattern in domain.document_patterns.items()}
    shown = domain.example_documents[0] if domain.example_documents else None
    name = Path(
        min_length=1,
        json_schema_extra={"maxLength": MAX_ID_CHARACTERS, **patterns.get("document_id", {})},
        examples=[shown.document_id] if shown else None,
    )
    body_of = Body(examples=[{"text": shown.text}] if shown else None)

    @router.put(
        "/v1/documents/{document_id:path}", responses=errors(*WITH_BODY, *guard.statuses, words=REFUSED_DOCUMENT)
    )
    def put(document_id: Annotated[str, name], body: Annotated[DocumentText, body_of]) -> Passage:
        return Passage.of(documents.put(document_id, body.text))

    return router
