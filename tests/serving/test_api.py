"""The HTTP interface, asked over real sockets: decisions, documents, traces, health, metrics, and the process."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from served import CASE, DOMAIN, GOOD, HELLO, MODEL, ORDER, SERVER, break_documents, make_store, running, wait_until

from twinloop.common.errors import UserError
from twinloop.serving.api import create_app, run_server
from twinloop.serving.decisions import DecisionService
from twinloop.serving.middleware import MAX_BODY_BYTES
from twinloop.serving.model_manager import ModelManager, ServeFailure

# --- decisions --------------------------------------------------------------------------------------------------------


def test_a_decision_has_exactly_the_documented_form(scripted):
    response = scripted.post("/v1/decisions", json=CASE)
    assert response.status_code == 200
    body = response.json()
    assert set(body) == {
        "decision", "escalated", "reasons", "checks", "passages", "model", "timings", "trace_id",
    }  # fmt: skip
    assert body["decision"] == json.loads(GOOD)
    assert body["escalated"] is False
    assert body["reasons"] == []
    assert body["passages"][0] == {"document_id": "P-7", "version": 1, "text": json.loads(GOOD)["evidence"]}
    assert body["model"] == {"name": "returns", "version": "3", "digest": "d" * 64}
    assert set(body["timings"]) == {"retrieval_ms", "queue_ms", "ttft_ms", "total_ms"}


def test_an_untrained_network_is_escalated_and_never_decides(client):
    body = client.post("/v1/decisions", json=CASE).json()
    assert body["decision"] is None
    assert body["escalated"] is True
    assert body["reasons"]
    assert not body["checks"]["evidence"]
    trace = client.get(f"/v1/traces/{body['trace_id']}").json()
    assert trace["output_text"]
    assert trace["index_digest"] == client.get("/health").json()["index"]["digest"]


def test_a_reason_that_no_policy_speaks_of_is_escalated_without_asking_the_model(scripted, script):
    body = scripted.post("/v1/decisions", json={**CASE, "order": {**ORDER, "reason": "broken"}}).json()
    assert (body["decision"], body["escalated"]) == (None, True)
    assert body["reasons"][0]["reason"] == "no current policy covers broken items"
    assert script.prompts == []


def test_a_policy_put_by_another_process_counts_for_the_next_request(scripted, script, tmp_path):
    assert scripted.post("/v1/decisions", json=CASE).json()["decision"]["eligible"] is True
    before = scripted.get("/health").json()
    code = (
        "import sys; from twinloop.serving.knowledge.documents import DocumentStore; "
        "DocumentStore(sys.argv[1]).put(*sys.argv[2:])"
    )
    text = "damaged items reported within 7 days are eligible."
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "documents.db"), "P-7", text], check=True)
    stale = scripted.post("/v1/decisions", json=CASE).json()
    assert (stale["decision"], stale["passages"][0]["version"]) == (None, 2)
    script.script = json.dumps(json.loads(GOOD) | {"evidence": text, "window_days": 7, "eligible": False})
    current = scripted.post("/v1/decisions", json=CASE).json()
    assert current["decision"]["eligible"] is False
    after = scripted.get("/health").json()
    assert after["model"]["digest"] == before["model"]["digest"]
    assert after["index"]["digest"] != before["index"]["digest"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"order": {**ORDER, "order_id": "a1"}}, "order.order_id: must be one capital letter and 4 to 6 digits"),
        ({"order": {**ORDER, "damage_confirmed": "yes"}}, "order.damage_confirmed"),
        ({"order": {**ORDER, "days_since_delivery": -1}}, "order.days_since_delivery"),
        ({"order": {**ORDER, "days_since_delivery": 12.0}}, "order.days_since_delivery"),
        ({"order": {**ORDER, "days_since_delivery": True}}, "order.days_since_delivery"),
        ({"order": {**ORDER, "eligible": True}}, "order.eligible: is not a field"),
        ({"order": {"order_id": "A10234"}}, "order.reason: is required"),
        ({"order": None}, "order"),
        ({"message": 3}, "message"),
        ({"message": "x" * 401}, "message"),
        ({"message": None}, "message"),
        ({"message": "a\0b"}, "message: holds a NUL character"),
        ({"order": {**ORDER, "reason": "Damaged Box"}}, "order.reason: must be one lower-case word"),
        ({"order": {**ORDER, "reason": "x" * 31}}, "at most 30 characters (one lower-case word, such as damaged)"),
        ({"order": {**ORDER, "days_since_delivery": "12"}}, "order.days_since_delivery"),
        ({"order": [ORDER]}, "order"),
        ({"policy": "P-7"}, "policy: is not a field"),
    ],
)
def test_a_malformed_case_is_refused_in_plain_words(scripted, script, change, said):
    response = scripted.post("/v1/decisions", json={**CASE, **change})
    assert response.status_code == 422
    assert said in response.json()["error"]["message"]
    assert script.prompts == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"order": "\xff"}',
        b'{"order": {}, "message": "a\x00b", "messages": [{"role": "user", "content": "a\x00b"}]}',
        b"[" * 100_000,
        json.dumps({**CASE, "message": "\ud800"}).encode(),
        b'{"order": {"days_since_delivery": NaN}}',
        b'{"order": {"days_since_delivery": ' + b"9" * 5000 + b"}}",
    ],
)
@pytest.mark.parametrize("path", ["/v1/decisions", "/v1/chat/completions"])
def test_a_broken_body_is_a_clients_error_in_one_form(scripted, path, body):
    response = scripted.post(path, content=body, headers={"Content-Type": "application/json"})
    assert 400 <= response.status_code < 500
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_body_over_the_limit_is_refused_however_it_comes(scripted):
    large = json.dumps({**CASE, "message": "x" * MAX_BODY_BYTES}).encode()
    assert scripted.post("/v1/decisions", content=large).status_code == 413

    def pieces():
        for start in range(0, len(large), 4096):
            yield large[start : start + 4096]

    try:
        status = scripted.post("/v1/decisions", content=pieces()).status_code
    except httpx.TransportError:  # the server may hang up while the rest is still being sent
        status = 413
    assert status == 413


# --- documents, traces, health ---------------------------------------------------------------------------------------


def test_documents_are_put_and_listed(scripted):
    text = "damaged items reported within 7 days are eligible."
    assert scripted.put("/v1/documents/P-7", json={"text": text}).json() == {
        "document_id": "P-7", "version": 2, "text": text,
    }  # fmt: skip
    listed = scripted.get("/v1/documents").json()
    assert [(p["document_id"], p["version"]) for p in listed["documents"]] == [("P-3", 1), ("P-7", 2), ("P-12", 1)]
    assert listed["digest"] == scripted.get("/health").json()["index"]["digest"]
    assert len(scripted.get("/v1/documents/P-7").json()["versions"]) == 2
    assert scripted.get("/v1/documents/P-99").status_code == 404


@pytest.mark.parametrize(
    ("policy_id", "text"), [("P-x", "within 7 days"), ("P-7", "no window"), ("P-7", " "), ("P-7", "within 7 days\n\n2")]
)
def test_a_policy_that_cannot_be_decided_on_is_refused(scripted, policy_id, text):
    response = scripted.put(f"/v1/documents/{policy_id}", json={"text": text})
    assert response.status_code == 422
    assert policy_id in response.json()["error"]["message"]


def test_an_unknown_trace_or_path_is_404_in_the_one_form(scripted):
    for path in ("/v1/traces/" + "0" * 32, "/v1/traces/..%2f..%2fetc", "/nothing"):
        response = scripted.get(path)
        assert response.status_code == 404
        assert response.json()["error"]["message"]
    assert scripted.get("/v1/decisions").status_code == 405


def test_health_fails_when_the_documents_or_the_engine_has(scripted, script, tmp_path):
    def statuses():
        return [scripted.get(path).status_code for path in ("/health", "/health/ready", "/health/live")]

    assert scripted.get("/health").json()["status"] == "ok"
    assert scripted.get("/health/ready").json() == {"status": "ok", "error": None}
    assert statuses() == [200, 200, 200]
    script.running = False
    assert statuses() == [503, 503, 503]
    script.running = True
    break_documents(tmp_path)
    assert statuses() == [503, 503, 200]  # a new start would find the same documents
    for script.running in (False, True):
        assert scripted.get("/health/ready").json()["error"] == scripted.get("/health").json()["error"]
    failing = scripted.get("/health")
    assert failing.status_code == 503
    assert failing.json()["error"]["message"] == "the documents: is corrupt (file is not a database)"
    assert failing.json()["model"]["digest"] == "d" * 64


@pytest.mark.parametrize("fault", ["no database", "a folder in its place"])
def test_what_is_wrong_with_the_documents_is_answered_without_their_path(scripted, tmp_path, caplog, fault):
    path = tmp_path / "documents.db"
    break_documents(tmp_path)
    if fault == "a folder in its place":
        path.unlink()
        path.mkdir()
    put = {"text": "damaged items within 7 days."}
    refused = [
        scripted.get("/health"),
        scripted.get("/v1/documents"),
        scripted.get("/v1/documents/P-7"),
        scripted.put("/v1/documents/P-7", json=put),
    ]
    for response in refused:
        assert response.status_code == 503
        assert "the documents: " in response.text
    decided = scripted.post("/v1/decisions", json=CASE)
    assert decided.json()["reasons"][0]["predicate"] == "retrieval"
    trace = scripted.get(f"/v1/traces/{decided.json()['trace_id']}")
    for response in (*refused, decided, trace, scripted.get("/metrics")):
        assert str(tmp_path) not in response.text
    logged = [record for record in caplog.records if str(path) in record.getMessage()]
    assert len(logged) == len(refused) + 1
    assert not any(record.exc_info for record in logged)


def test_a_mistake_that_is_the_operators_is_a_servers_error_without_its_words(scripted, monkeypatch):
    def broken(*_):
        raise UserError("/secret/place: cannot be read")

    monkeypatch.setattr("twinloop.serving.knowledge.documents.DocumentStore.history", broken)
    response = scripted.get("/v1/documents/P-7")
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in response.text


def test_messages_that_the_models_template_refuses_are_the_clients_mistake(scripted, monkeypatch):
    def refuses(*_):
        raise UserError("chat template: the roles must alternate")

    monkeypatch.setattr("twinloop.models.tokenizer.ChatTokenizer.encode_prompt", refuses)
    response = scripted.post("/v1/chat/completions", json={"messages": HELLO})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
    assert "the roles must alternate" in response.text


def test_why_a_champion_is_refused_is_answered_without_its_path(tmp_path, script, tokenizer):
    service = DecisionService(script, tokenizer, make_store(tmp_path), MODEL, DOMAIN)
    manager = ModelManager(service)
    manager.failure = ServeFailure("4", f"{tmp_path}/model.onnx differs from its digest")
    with running(create_app(manager)) as client:
        answer = client.get("/health")
    assert answer.json()["refused_champion"]["version"] == "4"
    assert "it is not used" in answer.json()["refused_champion"]["reason"]
    assert str(tmp_path) not in answer.text


def test_metrics_count_what_happened(scripted, script):
    scripted.post("/v1/decisions", json=CASE)
    script.script = "nonsense"
    scripted.post("/v1/decisions", json=CASE)
    scripted.post("/v1/chat/completions", json={"messages": HELLO})
    scripted.get("/made/up/path")
    lines = scripted.get("/metrics").text.splitlines()
    assert 'twinloop_decisions_total{outcome="eligible"} 1.0' in lines
    assert 'twinloop_decisions_total{outcome="escalated"} 1.0' in lines
    assert 'twinloop_escalations_total{predicate="parsed"} 1.0' in lines
    assert 'twinloop_requests_total{route="/v1/decisions",status="200"} 2.0' in lines
    assert 'twinloop_requests_total{route="none",status="404"} 1.0' in lines
    assert 'twinloop_time_to_first_token_seconds_count{route="decisions"} 2.0' in lines
    assert "twinloop_documents 3.0" in lines


def test_tokens_of_decisions_and_of_chats_are_counted(client, engine_scheduler):
    def tokens():
        lines = client.get("/metrics").text.splitlines()
        found = (line.split() for line in lines if line.startswith("twinloop_tokens_total{"))
        cached = (line.split() for line in lines if line.startswith("twinloop:prefix_cache_"))
        counts = {name.split('"')[1]: int(float(count)) for name, count in found}
        return counts | {name.split("{")[0].split("_")[2]: int(float(count)) for name, count in cached}

    before = tokens()
    trace = client.post("/v1/decisions", json=CASE).json()["trace_id"]
    asked = client.get(f"/v1/traces/{trace}").json()
    usage = client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 3}).json()["usage"]
    wait_until(lambda: engine_scheduler.active == 0)
    after = tokens()
    for kind in ("prompt", "completion"):
        assert after[kind] - before[kind] == asked[f"{kind}_tokens"] + usage[f"{kind}_tokens"]
    assert after["queries"] - before["queries"] == asked["prompt_tokens"] + usage["prompt_tokens"]
    again = client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 3}).json()["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1
    assert tokens()["hits"] - after["hits"] == usage["prompt_tokens"] - 1
    now, lines = engine_scheduler.metrics(), client.get("/metrics").text.splitlines()
    assert f"twinloop_slots {now.slots}.0" in lines
    for name, count in (
        ("drafts", now.totals.drafts),
        ("draft_tokens", now.totals.draft_tokens),
        ("accepted_tokens", now.totals.accepted_tokens),
    ):
        assert f'twinloop:spec_decode_num_{name}_total{{model_name="{MODEL.name}"}} {count}.0' in lines


# --- the process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_asked_to_stop_finishes_its_answers_and_ends_well(tmp_path, number):
    server = subprocess.Popen([*SERVER, str(tmp_path), "0.01"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    answers = []
    ask = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{url}/v1/decisions", json=CASE, timeout=20, trust_env=False))
    )
    wait_until(lambda: _answers(url))
    ask.start()
    time.sleep(0.2)
    os.kill(server.pid, number)
    ask.join(20)
    assert server.wait(20) == 0
    assert server.stdout.read() == "stopped\n"
    assert answers[0].json()["decision"] == json.loads(GOOD)


def _answers(url):
    try:
        return httpx.get(f"{url}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_a_port_in_use_is_an_error_of_the_user():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: cannot be served at .*--port"):
            run_server(None, "127.0.0.1", port)
    with pytest.raises(UserError, match="99999"):
        run_server(None, "127.0.0.1", 99999)
    with pytest.raises(UserError, match="not an address"):
        run_server(None, "no such host", 80)
