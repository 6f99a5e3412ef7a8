"""A document that validation lets through is accepted by the store and by the route, and the reverse."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from served import ScriptedScheduler, make_app, running

from twinloop.domains.documents import MAX_ID_CHARACTERS, MAX_TEXT_CHARACTERS
from twinloop.domains.domain import Document, Domain
from twinloop.domains.returns.domain import Returns
from twinloop.records.validation import validate
from twinloop.serving.knowledge.documents import DocumentError, DocumentStore
from twinloop.tasks.recipe import ValidateSettings

LENIENT = ValidateSettings(max_quarantined=1)
PIECES = [
    *(
        "P-7",
        "7",
        "a",
        "É",
        "e\u0301",
        "字",
        "😀",
        "/",
        ".",
        "..",
        "-",
        "_",
        " ",
        "  ",
        "%2F",
        "?",
        "#",
        "\\",
        "'",
        '"',
    ),
    *("\n", "\r", "\t", "\0", "\x7f", "\u200b", "\ufeff", "\u202e", "\u2028", "\ufe0f", "\u3164", "\u00a0"),
    *("damaged items within 30 days are eligible.", " within 9 days ", "x" * 99, "字" * 299, "\U000e0041"),
]
EDGES = [
    ("a" * MAX_ID_CHARACTERS, "text"),
    ("a" * (MAX_ID_CHARACTERS + 1), "text"),
    ("long", "x" * MAX_TEXT_CHARACTERS),
    ("longest", "字" * MAX_TEXT_CHARACTERS),
    ("largest", "😀" * MAX_TEXT_CHARACTERS),
    ("too-long", "x" * (MAX_TEXT_CHARACTERS + 1)),
    (".", "text"),
    ("a/../b", "text"),
    ("a//b", "text"),
    ("/a/", "text"),
    ("a b", "text"),
    ("\u3164", "text"),
    ("blank", "\u200b\ufeff"),
    ("marks", "e\u0301\u202e"),
]


def random_documents(seed: int, count: int) -> Iterator[tuple[str, str]]:
    rng = random.Random(seed)

    def text(most: int) -> str:
        return "".join(rng.choices(PIECES, k=rng.randint(0, most)))

    for number in range(count):
        document_id = rng.choice([f"P-{number}", f"{number}", text(3), text(2) + str(number)])
        yield document_id, rng.choice([text(4), f"{rng.choice(PIECES)} items within 9 days are eligible."])


class Anything(Domain):
    name = "anything"
    passages = 1


@pytest.mark.parametrize("domain", [Anything(), Returns()], ids=["any documents", "policies"])
def test_validation_store_and_route_let_the_same_documents_in(domain: Domain, tokenizer, tmp_path: Path) -> None:
    documents = list(dict([*EDGES, *random_documents(1, 150)]).items())
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"document_id": document_id, "text": text}) for document_id, text in documents]
    (tmp_path / "data" / "documents.jsonl").write_text("\n".join(rows) + "\n")
    validate(tmp_path / "data", tmp_path / "out", LENIENT, domain, ["documents"])
    lines = (tmp_path / "out" / "quarantine" / "documents.jsonl").read_text().splitlines()
    refused = {json.loads(line)["line"]: json.loads(line)["reason"] for line in lines}
    store = DocumentStore(tmp_path / "documents.db", domain.check_document)
    app = make_app(tmp_path / "served", ScriptedScheduler(tokenizer), tokenizer, domain=domain)
    with running(app) as client:
        gates = {
            document: (number not in refused, _in_store(store, document), _over_http(client, document))
            for number, document in enumerate((Document(*pair) for pair in documents), 1)
        }
    store.close()
    apart = {document: gate for document, gate in gates.items() if len(set(gate)) > 1}
    assert apart == {}
    assert {gate[0] for gate in gates.values()} == {True, False}


def _in_store(store: DocumentStore, document: Document) -> bool:
    try:
        store.put(document.document_id, document.text)
    except DocumentError:
        return False
    return True


def _over_http(client: httpx.Client, document: Document) -> bool:
    address = f"/v1/documents/{quote(document.document_id, safe='')}"
    answer = client.put(
        address, content=json.dumps({"text": document.text}), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code in (200, 400, 404, 405, 422), answer.text
    return answer.status_code == 200
