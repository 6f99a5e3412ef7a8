"""Documents that the data brings: they replace what earlier data brought, and never what an administrator has put."""

import sqlite3
from contextlib import closing

import pytest
from stored import DAMAGED, LATE, THREE, ids

from twinloop.common.errors import UserError
from twinloop.domains.domain import Document
from twinloop.serving.knowledge.documents import DocumentStore

NEWER, NEWEST = DAMAGED.replace("30", "20"), DAMAGED.replace("30", "10")
OWN = DAMAGED.replace("30", "7")


def with_text(text, *others):
    return [Document("P-7", text), *others]


def now(store):
    return {each.document_id: (each.version, each.text) for each in store.list()}


def test_a_changed_text_of_the_data_becomes_a_new_version(store):
    done = store.import_documents([Document("P-7", NEWER), *THREE[1:], Document("P-20", LATE)])
    assert [(each.document_id, each.version) for each in done.put] == [("P-7", 2), ("P-20", 1)]
    assert (done.kept, done.left) == ([], [])
    assert now(store)["P-7"] == (2, NEWER)
    assert [each.document.text for each in store.history("P-7")] == [DAMAGED, NEWER]


def test_the_same_data_again_changes_nothing(store):
    digest = store.digest()
    for _ in range(2):
        done = store.import_documents(THREE)
        assert (done.put, done.kept, done.left, str(done)) == ([], [], [], "none changed")
    assert store.digest() == digest


def test_what_an_administrator_has_put_is_kept_and_reported_where_the_data_changed_too(store):
    store.put("P-7", OWN)
    unchanged = store.import_documents(THREE)
    assert (unchanged.put, unchanged.kept) == ([], [])
    changed = store.import_documents([Document("P-7", NEWER), *THREE[1:]])
    assert (changed.put, ids(changed.kept)) == ([], ["P-7"])
    assert "P-7 kept as an administrator put it" in str(changed)
    assert now(store)["P-7"] == (2, OWN)
    assert ids(store.import_documents([Document("P-7", NEWER), *THREE[1:]]).kept) == ["P-7"]  # until somebody decides


def test_an_administrator_who_puts_what_the_data_says_gives_the_document_back(store):
    store.put("P-7", OWN)
    store.put("P-7", NEWER)
    assert store.import_documents([Document("P-7", NEWER), *THREE[1:]]).kept == []
    assert ids(store.import_documents([Document("P-7", NEWEST), *THREE[1:]]).put) == ["P-7"]
    assert now(store)["P-7"] == (4, NEWEST)


def test_an_administrators_own_document_is_neither_replaced_nor_missed(store):
    store.put("P-30", OWN)
    assert store.import_documents(THREE).left == []
    assert ids(store.import_documents([*THREE, Document("P-30", LATE)]).kept) == ["P-30"]


def test_what_the_data_no_longer_holds_is_reported_and_still_found(store):
    done = store.import_documents(THREE[1:])
    assert (done.put, ids(done.left)) == ([], ["P-7"])
    assert "P-7 no longer in the data" in str(done)
    assert now(store)["P-7"] == (1, DAMAGED)


def test_a_store_of_an_earlier_release_takes_its_first_versions_for_the_datas(store):
    store.put("P-3", LATE.replace("14", "15"))
    with closing(sqlite3.connect(store.path)) as database:
        database.execute("DROP TABLE imported")
        database.commit()
    store = DocumentStore(store.path)
    done = store.import_documents([Document("P-7", NEWER), Document("P-3", LATE.replace("14", "3")), THREE[2]])
    assert (ids(done.put), ids(done.kept)) == (["P-7"], ["P-3"])


@pytest.mark.parametrize("bad", [Document("P-8", " "), Document("P-7", LATE)])
def test_an_import_is_whole_or_not_at_all(store, bad):
    before = store.digest()
    with pytest.raises(UserError):
        store.import_documents([*with_text(NEWER, *THREE[1:]), bad])
    assert store.digest() == before


def test_the_contents_are_the_same_whatever_the_history(store, tmp_path):
    other = DocumentStore(tmp_path / "other.db")
    for document in reversed(THREE):
        other.put(document.document_id, LATE.replace("14", "99"))
        other.put(document.document_id, document.text)
    assert other.contents() == store.contents()
    assert other.digest() != store.digest()
    before = other.contents()
    other.put("P-7", OWN)
    assert other.contents() != before
