"""What any document must be, whatever its domain: one rule for the data set and for the server's store."""

from __future__ import annotations

import unicodedata

from twinloop.common.texts import is_blank
from twinloop.domains.domain import Domain, domain_code

MAX_ID_CHARACTERS = 200
MAX_TEXT_CHARACTERS = 100_000

UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories that have no place in an id: control, invisible and line-breaking characters, surrogates."""


def unusable(document_id: str, text: str) -> str | None:
    """Why no domain could use a document; None: it could. text: without white space around it."""
    if not 0 < len(document_id) <= MAX_ID_CHARACTERS or document_id != document_id.strip():
        return f"its id must have 1 to {MAX_ID_CHARACTERS} characters, and no white space around them"
    if is_blank(document_id):
        return "its id has no character that can be seen"
    if not {".", ".."}.isdisjoint(document_id.split("/")):
        return "its id has a part that is . or .., which no address can hold"
    if any(unicodedata.category(character) in UNPRINTABLE for character in document_id):
        return "its id has a character that cannot be seen; remove it"
    if is_blank(text):
        return "the text is empty"
    if len(text) > MAX_TEXT_CHARACTERS:
        return f"the text has {len(text)} characters; at most {MAX_TEXT_CHARACTERS} fit"
    if "\0" in text or not is_text(text):
        return "the text has a character that is none (NUL or half of a surrogate pair); remove it"
    return None


def is_text(text: str) -> bool:
    """Whether it can be written at all: JSON may hold halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def refused(domain: Domain, document_id: str, text: str) -> str | None:
    """Why a row of the data set's documents may not enter the store; None: it may."""
    text = text.strip()
    if (reason := unusable(document_id, text)) is not None:
        return reason
    with domain_code(domain, "check_document", f"document {document_id!r}"):
        return domain.check_document(document_id, text)
