"""The registry over HTTP, as far as the server knows it: what is read by everybody, and what only moves for
administrators."""

from __future__ import annotations

import subprocess
import sys
import threading

import httpx
import pytest
from consoles import Registered
from served import ScriptedScheduler, make_app, running, wait_until

TOKEN = {"Authorization": "Bearer s3cret"}
ROUTES = [
    ("GET", "/v1/versions"),
    ("GET", "/v1/versions/4"),
    ("GET", "/v1/moves"),
    ("POST", "/v1/versions/4/promote"),
    ("POST", "/v1/rollback"),
]
GUARDED = ROUTES[2:]


@pytest.fixture
def registered():
    return Registered()


@pytest.fixture
def client(tmp_path, tokenizer, registered):
    app = make_app(tmp_path, ScriptedScheduler(tokenizer), tokenizer, admin_token="s3cret", releases=registered)
    with running(app) as client:
        yield client


def test_versions_are_listed_newest_first_with_the_one_that_answers(client, registered):
    listed = client.get("/v1/versions").json()
    assert [each["version"] for each in listed["versions"]] == [5, 4, 3, 2, 1]
    assert (listed["model"], listed["served"], listed["served_is_champion"]) == ("returns", 3, True)
    assert listed["versions"][1]["aliases"] == ["candidate"]
    registered.champions.append(4)
    assert client.get("/v1/versions").json()["served_is_champion"] is False
    registered.champions.pop()
    registered.digests[2] = "0" * 64  # the model was deleted in MLflow and made again
    assert client.get("/v1/versions").json()["served_is_champion"] is False


def test_a_version_comes_with_its_gate_report_and_origins(client):
    blocked = client.get("/v1/versions/5").json()
    assert (blocked["gate"], blocked["gate_report"]["rules"][0]["measured"]) == ("BLOCK", 0.9)
    assert blocked["gate_report"]["reasons"][0]["owner"] == "SFT data"
    assert blocked["origins"][0]["kind"] == "dataset"
    assert client.get("/v1/versions/1").json()["gate_report"] is None
    missing = client.get("/v1/versions/9")
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "version")
    assert client.get("/v1/versions/0").status_code == 422


def test_moves_are_made_and_seen_by_administrators_only(client, registered):
    for method, path in GUARDED:
        assert client.request(method, path).status_code == 401
    assert registered.done == []
    promoted = client.post("/v1/versions/4/promote", headers=TOKEN).json()
    assert (promoted["action"], promoted["from_version"], promoted["to_version"]) == ("promote", 3, 4)
    assert promoted["who"] == "ada@box over HTTP from 127.0.0.1"
    rolled_back = client.post("/v1/rollback", headers=TOKEN).json()
    assert (rolled_back["to_version"], rolled_back["smoke_test"]) == (3, "it answers <b>7</b>")
    moves = client.get("/v1/moves", headers=TOKEN).json()["moves"]
    assert [move["action"] for move in moves] == ["rollback", "promote"]


def test_a_web_page_from_elsewhere_moves_nothing_on_a_server_without_a_token(tmp_path, tokenizer, registered):
    with running(make_app(tmp_path, ScriptedScheduler(tokenizer), tokenizer, releases=registered)) as client:
        for page in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
            assert client.post("/v1/rollback", headers=page).status_code == 403
        assert registered.done == []
        assert client.post("/v1/rollback").status_code == 200


def test_what_the_registry_refuses_is_a_conflict_with_its_reason(client, registered):
    registered.refusal = "returns version 4: not promoted, its gate says BLOCK"
    refused = client.post("/v1/versions/4/promote", headers=TOKEN)
    assert (refused.status_code, refused.json()["error"]["message"]) == (409, registered.refusal)
    assert client.post("/v1/versions/9/promote", headers=TOKEN).status_code == 404


def test_what_the_registrys_tools_raise_names_nothing_of_this_machine(client, registered, monkeypatch):
    def broken(*_):
        raise OSError(5, "cannot read", "/srv/secret/mlflow.db")

    for name in ("versions", "version", "moves", "roll_back"):
        monkeypatch.setattr(registered, name, broken)
    for method, path in ROUTES:
        answer = client.request(method, path, headers=TOKEN)
        assert answer.status_code == 503, path
        assert "secret" not in answer.text


def test_one_move_at_a_time(client, registered, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    promote = registered.promote

    def slow(number, by):
        begun.set()
        assert go_on.wait(20)
        return promote(number, by)

    monkeypatch.setattr(registered, "promote", slow)
    answers = []
    first = threading.Thread(
        target=lambda: answers.append(client.post("/v1/versions/4/promote", headers=TOKEN).status_code)
    )
    first.start()
    assert begun.wait(20)
    second = client.post("/v1/rollback", headers=TOKEN)
    assert (second.status_code, "under way" in second.json()["error"]["message"]) == (409, True)
    assert client.get("/health").status_code == 200
    go_on.set()
    first.join(20)
    wait_until(lambda: bool(answers))
    assert answers == [200]
    assert client.post("/v1/rollback", headers=TOKEN).status_code == 200


MOVES_FOR_EVER = """
import sys, threading
from pathlib import Path
sys.path.insert(0, "tests/serving")
from consoles import Registered
from served import ScriptedScheduler, make_app, small_tokenizer
from twinloop.serving import api

def roll_back(by):
    print("begun", flush=True)
    threading.Event().wait()

registered, tokenizer = Registered(), small_tokenizer()
registered.roll_back = roll_back
app = make_app(Path(sys.argv[1]), ScriptedScheduler(tokenizer), tokenizer, releases=registered)
api.SHUTDOWN_S = 1
api.run_server(app, "127.0.0.1", 0, on_ready=lambda url: print(url, flush=True))
"""


def test_a_server_that_is_stopped_does_not_wait_for_a_move(tmp_path):
    answers = []
    server = subprocess.Popen([sys.executable, "-c", MOVES_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = f"{server.stdout.readline().strip()}/v1/rollback"
        ask = threading.Thread(target=lambda: answers.append(httpx.post(url, timeout=60, trust_env=False).status_code))
        ask.start()
        assert server.stdout.readline() == "begun\n"
        server.terminate()
        assert server.wait(60) == 0
        ask.join(20)
    finally:
        server.kill()
    assert answers == [503]


def test_a_server_without_a_registry_says_so(tmp_path, tokenizer):
    with running(make_app(tmp_path, ScriptedScheduler(tokenizer), tokenizer)) as client:
        for method, path in ROUTES:
            answer = client.request(method, path)
            assert answer.status_code == 404
            assert "without a registry" in answer.json()["error"]["message"]


def test_every_status_of_these_routes_is_described(client):
    paths = client.get("/openapi.json").json()["paths"]
    described = {
        (method.upper(), path): {status for status in operation["responses"]}
        for path, operations in paths.items()
        for method, operation in operations.items()
    }
    assert {"200", "404", "503"} <= described["GET", "/v1/versions"]
    assert {"200", "404", "422", "503"} <= described["GET", "/v1/versions/{version}"]
    for path in ("/v1/versions/{version}/promote", "/v1/rollback"):
        assert {"200", "401", "403", "404", "409", "503"} <= described["POST", path]
    assert {"200", "401", "403", "422"} <= described["GET", "/v1/traces"]
    schema = paths["/v1/load"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/Load"}
