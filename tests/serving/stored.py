"""Documents that tests put, and what a search finds of them."""

import subprocess
import sys

from twinloop.domains.domain import Document

DAMAGED = "damaged items reported within 30 days are eligible."
LATE = "late items reported within 14 days are eligible."
UNWANTED = "unwanted items within 10 days are eligible."
THREE = [Document("P-7", DAMAGED), Document("P-3", LATE), Document("P-12", UNWANTED)]


def ids(documents):
    return [document.document_id for document in documents]


def found(store, query, limit):
    return ids(store.find(query, limit).documents)


def put_in_another_process(path, document_id, text):
    code = (
        "import sys; from twinloop.serving.knowledge.documents import DocumentStore; "
        "DocumentStore(sys.argv[1]).put(*sys.argv[2:])"
    )
    subprocess.run([sys.executable, "-c", code, str(path), document_id, text], check=True, timeout=60)
