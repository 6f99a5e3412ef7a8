"""Recent answers: listed newest first over all that is kept, filtered, and only for administrators."""

from __future__ import annotations

import json

import pytest
from served import CASE, GOOD, ScriptedScheduler, make_app, running, wait_until

from twinloop.serving.traces import TraceStore


def listed(client, **query):
    answer = client.get("/v1/traces", params=query)
    assert answer.status_code == 200
    return answer.json()


def test_answers_are_listed_newest_first_and_each_opens_by_its_id(scripted, script):
    asked = [scripted.post("/v1/decisions", json=CASE | {"message": f"number {n}"}).json() for n in range(3)]
    found = listed(scripted)
    assert [each["trace_id"] for each in found["answers"]] == [each["trace_id"] for each in reversed(asked)]
    assert (found["searched"], found["complete"]) == (3, True)
    newest = found["answers"][0]
    assert newest["request"]["message"] == "number 2"
    assert newest["decision"] == json.loads(GOOD)
    assert newest["model"]["version"] == "3"
    assert scripted.get(f"/v1/traces/{newest['trace_id']}").json()["checks"]["parsed"] is True
    first = listed(scripted, limit=1)
    assert ([each["trace_id"] for each in first["answers"]], first["complete"]) == ([asked[2]["trace_id"]], False)


def test_filters_are_for_what_failed_and_what_was_said(scripted, script):
    for answer, message in ((GOOD, 'a "quoted"\nword'), ("Nonsense", "straße"), (GOOD.replace("12,", "13,"), "b")):
        script.script = answer
        scripted.post("/v1/decisions", json=CASE | {"message": message})

    def messages(**query):
        return [each["request"]["message"] for each in listed(scripted, **query)["answers"]]

    assert messages(escalated=True) == ["b", "straße"]
    assert messages(escalated=False) == ['a "quoted"\nword']
    assert messages(check="parsed") == ["straße"]
    assert messages(check="days") == ["b"]
    assert messages(text="STRASSE") == ["straße"]
    assert messages(text="nonsENSE") == ["straße"]  # what the model wrote
    assert messages(text='"quoted"\n') == ['a "quoted"\nword']
    assert messages(text="p-7", escalated=False) == ['a "quoted"\nword']
    assert messages(text="nowhere") == []
    for wrong in ({"limit": 0}, {"limit": 201}, {"escalated": "perhaps"}, {"text": "x" * 201}):
        assert scripted.get("/v1/traces", params=wrong).status_code == 422


def test_only_an_administrator_lists_answers(tmp_path, tokenizer):
    with running(make_app(tmp_path, ScriptedScheduler(tokenizer), tokenizer, admin_token="s3cret")) as client:
        assert client.get("/v1/traces").status_code == 401
        assert client.get("/v1/traces", headers={"Authorization": "Bearer s3cret"}).status_code == 200


def test_what_other_servers_and_earlier_runs_have_kept_is_listed_in_order_of_time(tmp_path, tokenizer):
    def ask(client, message):
        client.post("/v1/decisions", json=CASE | {"message": message})

    apps = [make_app(tmp_path, ScriptedScheduler(tokenizer), tokenizer) for _ in range(2)]
    with running(apps[0]) as one, running(apps[1]) as other:
        ask(one, "first")
        ask(other, "second")
        ask(one, "third")
        wait_until(lambda: len(listed(other)["answers"]) == 3)
        assert [each["request"]["message"] for each in listed(other)["answers"]] == ["third", "second", "first"]


@pytest.mark.parametrize("block", [7, 64 * 2**10])
def test_lines_that_are_torn_or_of_another_form_are_left_out(tmp_path, monkeypatch, block):
    monkeypatch.setattr("twinloop.serving.traces.BLOCK_BYTES", block)
    whole = [{"trace_id": f"{n:032x}", "time": f"2026-01-0{n}T00:00:00", "text": "ü" * n} for n in range(1, 4)]
    lines = [json.dumps(each, ensure_ascii=False).encode() for each in whole]
    content = b"\n".join([lines[0], b"", b"[]", b'{"trace_id": 7}', lines[1], b'{"trace_id"', lines[2], b'{"tra'])
    (tmp_path / "traces-0-1.jsonl").write_bytes(content)
    store = TraceStore(tmp_path)
    assert [*store.newest()] == [*reversed(whole)]
    store.close()
