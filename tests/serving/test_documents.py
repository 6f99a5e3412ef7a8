"""Documents: versions, checks, and finding the one that fits."""

import time

import pytest
from stored import DAMAGED, LATE, THREE, found, ids

from twinloop.common.errors import UserError
from twinloop.domains.documents import MAX_ID_CHARACTERS, MAX_TEXT_CHARACTERS
from twinloop.domains.domain import Document
from twinloop.domains.returns.domain import domain as returns
from twinloop.serving.knowledge import history
from twinloop.serving.knowledge.documents import (
    EMPTY_DIGEST,
    DocumentError,
    DocumentStore,
)


def test_put_makes_a_new_version_and_keeps_history(store):
    changed = store.put("P-7", "damaged items reported within 7 days are eligible.")
    assert changed.version == 2
    versions = store.history("P-7")
    assert [(each.document.version, each.document.text) for each in versions] == [(1, DAMAGED), (2, changed.text)]
    assert all(each.recorded_at.startswith("20") for each in versions)
    assert [document for document in store.list() if document.document_id == "P-7"] == [changed]


def test_putting_the_newest_text_again_changes_nothing(store):
    before = store.digest()
    assert store.put("P-7", f"  {DAMAGED} ") == Document("P-7", DAMAGED, 1)
    assert store.digest() == before


def test_documents_are_listed_as_people_order_them(store):
    assert ids(store.list()) == ["P-3", "P-7", "P-12"]


def test_the_reason_finds_its_policy_and_distractors_fill_the_rest(store):
    assert found(store, "damaged", 2) == ["P-7", "P-3"]
    assert found(store, "unwanted", 2) == ["P-12", "P-3"]
    assert found(store, "LATE arrival", 5) == ["P-3", "P-7", "P-12"]


def test_the_example_of_the_returns_domain_finds_its_documents(tmp_path):
    store = DocumentStore(tmp_path / "documents.db", returns.check_document)
    store.seed(returns.example_documents)
    query = returns.query(returns.request.model_validate(returns.example))
    assert store.find(query, returns.passages).documents == list(returns.example_documents)


def test_only_the_newest_version_is_found(store):
    store.put("P-7", "broken goods may come back within 7 days.")
    assert found(store, "damaged", 1) == ["P-3"]
    assert store.find("broken", 1).documents[0].version == 2


def test_other_forms_of_a_word_find_the_document(store):
    assert found(store, "damages", 1) == ["P-7"]
    assert found(store, "DAMAGE", 1) == ["P-7"]


@pytest.mark.parametrize(
    ("text", "query"), [("Die Straße ist gesperrt", "Straße"), ("हिन्दी में", "हिन्दी"), ("das Café öffnet", "CAFÉ")]
)
def test_words_with_any_letters_and_marks_find_their_document(store, text, query):
    store.put("P-20", text)
    assert found(store, query, 1) == ["P-20"]


def test_equal_scores_are_ordered_by_number(tmp_path):
    store = DocumentStore(tmp_path / "documents.db")
    store.seed([Document(f"P-{number}", DAMAGED) for number in (30, 4, 11)])
    assert found(store, "damaged", 3) == ["P-4", "P-11", "P-30"]


@pytest.mark.parametrize(
    "query",
    [
        'x" OR late', "NEAR(", '"', "*", "_", "text: late", "late -damaged", "late AND damaged", "NOT", "²", "漢字", "",
        "^late", "{text}: late", "late*", "a\0b", "\ud800", "rowid:1", "late + damaged", "(late", "word " * 100_000,
        " ".join(f"w{number}" for number in range(10_000)),
    ],
)  # fmt: skip
def test_a_query_is_words_and_never_syntax(store, query):
    assert len(found(store, query, 2)) == 2
    assert store.find(f"{query[:200]} damaged", 1).documents[0].document_id in ("P-7", "P-3")


def test_a_store_that_is_not_there_is_empty_and_reading_makes_no_file(tmp_path):
    store = DocumentStore(tmp_path / "absent" / "documents.db")
    assert store.find("damaged", 2).documents == []
    assert (store.list(), store.history("P-7"), store.count()) == ([], [], 0)
    assert store.digest() == EMPTY_DIGEST
    assert list(tmp_path.iterdir()) == []


def test_seed_leaves_a_store_that_holds_anything(store):
    assert store.seed([Document("P-1", DAMAGED)]) == 0
    assert ids(store.list()) == ["P-3", "P-7", "P-12"]


def test_seed_installs_all_or_nothing(tmp_path):
    store = DocumentStore(tmp_path / "documents.db", returns.check_document)
    with pytest.raises(DocumentError, match="P-2"):
        store.seed([Document("P-1", DAMAGED), Document("P-2", "no window here")])
    with pytest.raises(UserError, match="same id"):
        store.seed([Document("P-1", DAMAGED), Document("P-1", LATE)])
    assert store.list() == []


def test_equal_histories_have_equal_digests_whenever_they_were_put(tmp_path, store, monkeypatch):
    class Later(history.datetime):
        @classmethod
        def now(cls, zone):
            return cls(2031, 5, 1, tzinfo=zone)

    monkeypatch.setattr(history, "datetime", Later)
    other = DocumentStore(tmp_path / "other.db")
    other.seed(THREE)
    assert other.history("P-7")[0].recorded_at != store.history("P-7")[0].recorded_at
    assert other.digest() == store.digest()
    other.put("P-7", LATE)
    assert other.digest() != store.digest()


@pytest.mark.parametrize(
    ("document_id", "text", "said"),
    [
        ("", DAMAGED, "1 to 200 characters"),
        (" P-7", DAMAGED, "1 to 200 characters"),
        ("P" * (MAX_ID_CHARACTERS + 1), DAMAGED, "1 to 200 characters"),
        ("P-7\n8", DAMAGED, "cannot be seen"),
        ("P-\ud800", DAMAGED, "cannot be seen"),
        ("P-7", " \n ", "the text is empty"),
        ("P-7", "x" * (MAX_TEXT_CHARACTERS + 1), "at most"),
        ("P-7", "damaged\0items", "NUL"),
        ("P-7", "damaged\ud800items", "surrogate"),
    ],
)
def test_what_no_domain_could_use_is_refused_in_one_line(store, document_id, text, said):
    before = store.digest()
    with pytest.raises(DocumentError) as error:
        store.put(document_id, text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert store.digest() == before


@pytest.mark.parametrize(
    ("document_id", "text", "said"),
    [
        ("P-", DAMAGED, "must be P- and a number"),
        ("p-7", DAMAGED, "must be P- and a number"),
        ("P-07", DAMAGED, "must be P- and a number"),
        ("P-٧", DAMAGED, "must be P- and a number"),
        ("../P-7", DAMAGED, "which no address can hold"),
        ("P-7", DAMAGED + "x" * 300, "at most"),
        ("P-7", "damaged items\nwithin 30 days", "character 14"),
        ("P-7", "damaged\u2028items within 30 days", "U+2028"),
        ("P-7", "damaged\u202eitems within 30 days", "U+202E"),
        ("P-7", "damaged items are eligible.", "within N days"),
        ("P-7", "within 30 days, or within 40 days", "exactly once"),
    ],
)
def test_what_the_domain_refuses_does_not_enter(tmp_path, document_id, text, said):
    store = DocumentStore(tmp_path / "documents.db", returns.check_document)
    with pytest.raises(DocumentError, match=r"^document '") as error:
        store.put(document_id, text)
    assert said in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_ten_thousand_documents_are_searched_in_milliseconds(tmp_path):
    store = DocumentStore(tmp_path / "documents.db")
    store.seed(
        Document(f"P-{number}", f"{word} items of kind k{number} within {number % 90 + 1} days are eligible.")
        for number in range(1, 10_001)
        for word in [("damaged", "late", "wrong", "unwanted", "defective")[number % 5]]
    )
    reader = DocumentStore(store.path)
    assert found(reader, "damaged k77", 1) == ["P-77"]  # reads the file
    started = time.perf_counter()
    for _ in range(20):
        assert found(reader, "damaged", 1) == ["P-5"]
    assert (time.perf_counter() - started) / 20 < 0.05
