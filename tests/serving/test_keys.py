"""API keys: made and revoked while a server runs, asked for at every route but one, and limited by the minute."""

import base64
import hashlib
import json
import time

import httpx
import openai
import pytest
from served import CASE, HELLO, MODEL, ScriptedScheduler, make_app, running

from twinloop.common.errors import UserError
from twinloop.serving import limits
from twinloop.serving.keys import KeyStore

CHAT = ("/v1/chat/completions", {"messages": HELLO})
ADMIN = "s3cret"


@pytest.fixture
def keys(tmp_path):
    return KeyStore(tmp_path / "state" / "api_keys.json")


@pytest.fixture
def serve(tmp_path, tokenizer, keys):
    """Starts a server with these keys and settings."""
    return lambda **settings: running(
        make_app(tmp_path, ScriptedScheduler(tokenizer), tokenizer, keys=keys, **settings)
    )


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def basic(key):
    return {"Authorization": "Basic " + base64.b64encode(f"anybody:{key}".encode()).decode()}


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_a_key_is_shown_once_and_only_its_hash_is_kept(keys, tmp_path):
    made = {name: keys.create(name) for name in ("shop", "console")}
    file = tmp_path / "state" / "api_keys.json"
    assert file.stat().st_mode & 0o777 == 0o600
    for name, key in made.items():
        assert key not in file.read_text()
        found = keys.find(key.encode())
        assert (found.name, found.sha256) == (name, hashlib.sha256(key.encode()).hexdigest())
        assert keys.find(key[:-1].encode()) is None
    assert len({*made.values()}) == 2
    assert keys.revoke("shop") == 1
    assert keys.find(made["shop"].encode()) is None
    assert [each.name for each in KeyStore(file).all()] == ["console"]


@pytest.mark.parametrize("name", ["", "a b", "-a", "a/b", "ä", "a" * 65, "a\n"])
def test_a_name_that_is_none_is_refused(keys, name):
    with pytest.raises(UserError, match="not a name for a key"):
        keys.create(name)
    assert not keys.protects


def test_a_name_is_for_one_key_and_only_a_key_can_be_revoked(keys):
    keys.create("shop")
    with pytest.raises(UserError, match="shop: there is a key of this name"):
        keys.create("shop")
    with pytest.raises(UserError, match="web: no such key; there are: shop"):
        keys.revoke("web")


# --- who may ask ------------------------------------------------------------------------------------------------------


def test_a_server_without_keys_answers_as_before_and_the_first_key_closes_it(serve, keys):
    with serve() as client:
        assert client.post(CHAT[0], json=CHAT[1]).status_code == 200
        key = keys.create("shop")
        assert client.post(CHAT[0], json=CHAT[1]).status_code == 401
        assert client.post(CHAT[0], json=CHAT[1], headers=bearer(key)).status_code == 200


def test_openais_client_asks_with_a_key_and_is_told_of_a_wrong_one(serve, keys):
    key = keys.create("shop")
    with serve() as client:

        def official(api_key):
            return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key=api_key, max_retries=0)

        assert official(key).chat.completions.create(model=MODEL.name, messages=HELLO).choices
        with pytest.raises(openai.AuthenticationError) as refused:
            official("tl-wrong").chat.completions.create(model=MODEL.name, messages=HELLO)
        assert refused.value.code == "invalid_api_key"


def test_every_route_but_health_needs_a_key(serve, keys):
    key = keys.create("shop")
    with serve() as client:
        described = client.get("/openapi.json", headers=bearer(key)).json()["paths"]
        paths = [(method, path) for path, methods in described.items() for method in methods]
        paths += [("get", "/"), ("get", "/openapi.json"), ("get", "/no/such"), ("get", "/health/")]
        for method, path in paths:
            asked = path.format(document_id="P-7", trace_id="0" * 32, version=1, name="returns")
            wrong = ({}, bearer("tl-wrong"), basic("wrong"), {"Authorization": "Bearer"}, {"Authorization": key})
            answers = [client.request(method, asked, json=CASE, headers=headers) for headers in wrong]
            if path in ("/health", "/health/live", "/health/ready"):
                assert {answer.status_code for answer in answers} == {200}
                assert "401" not in described[path][method]["responses"]
                continue
            for answer in answers:
                assert answer.status_code == 401, f"{method} {path}"
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"].startswith("Basic" if path == "/" else "Bearer")
            if path in described:
                assert {"401", "429"} <= set(described[path][method]["responses"])


def test_a_browser_asks_for_a_key_at_the_console_and_sends_it_with_what_the_page_asks(serve, keys):
    key = keys.create("console")
    with serve() as client:
        for path in ("/", "/v1/load", "/v1/documents"):
            assert client.get(path, headers=basic(key)).status_code == 200
        for wrong in ("Basic", "Basic !", "Basic " + base64.b64encode(key.encode()).decode()):
            assert client.get("/", headers={"Authorization": wrong}).status_code == 401


def test_two_authorizations_are_none(serve, keys):
    key = keys.create("shop")
    with serve() as client:
        both = [("Authorization", f"Bearer {key}"), ("Authorization", f"Bearer {key}")]
        assert client.get("/v1/models", headers=both).status_code == 401


def test_a_key_is_refused_from_the_request_on_that_follows_its_end(serve, keys):
    shop, web = keys.create("shop"), keys.create("web")
    with serve() as client:
        assert client.get("/v1/models", headers=bearer(shop)).status_code == 200
        keys.revoke("shop")
        assert client.get("/v1/models", headers=bearer(shop)).status_code == 401
        assert client.get("/v1/models", headers=bearer(web)).status_code == 200


@pytest.mark.parametrize("end", ["the last key is revoked", "the file is removed", "the file is broken"])
def test_a_server_that_had_keys_never_opens_again(serve, keys, tmp_path, caplog, end):
    key = keys.create("shop")
    with serve(admin_token=ADMIN) as client:
        assert client.get("/v1/models", headers=bearer(key)).status_code == 200
        if end == "the last key is revoked":
            keys.revoke("shop")
        elif end == "the file is removed":
            (tmp_path / "state" / "api_keys.json").unlink()
        else:
            (tmp_path / "state" / "api_keys.json").write_text("{")
        broken = end == "the file is broken"
        for headers in ({}, bearer(key)):
            answer = client.get("/v1/models", headers=headers)
            assert answer.status_code == (503 if broken else 401)
            assert str(tmp_path) not in answer.text
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models", headers=bearer(ADMIN)).status_code == (503 if broken else 200)
    assert len([record for record in caplog.records if "api_keys.json" in record.getMessage()]) == broken


# --- keys and administrators ------------------------------------------------------------------------------------------


def test_a_key_makes_nobody_an_administrator_and_the_administrators_token_is_a_key(serve, keys):
    key = keys.create("shop")
    put = {"text": "damaged items within 7 days."}
    with serve(admin_token=ADMIN) as client:
        for headers, status in ((bearer(key), 401), (basic(key), 401), (bearer(ADMIN), 200), (basic(ADMIN), 401)):
            assert client.put("/v1/documents/P-7", json=put, headers=headers).status_code == status
        assert client.post(CHAT[0], json=CHAT[1], headers=bearer(ADMIN)).status_code == 200


def test_this_machine_needs_a_key_too_and_no_key_helps_those_who_may_not_administer(serve, keys):
    key = keys.create("shop")
    put = {"json": {"text": "damaged items within 7 days."}}
    with serve() as client:
        assert client.put("/v1/documents/P-7", **put).status_code == 401
        for further in (
            {"X-Forwarded-For": "192.0.2.1"},
            {"Origin": "https://evil.example"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Host": "evil.example"},
        ):
            for credentials in (bearer(key), basic(key)):
                refused = client.put("/v1/documents/P-7", **put, headers=credentials | further)
                assert refused.status_code == 403
        assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
        assert client.put("/v1/documents/P-7", **put, headers=bearer(key)).status_code == 200
    with serve(local_admin=False) as client:
        assert client.put("/v1/documents/P-7", **put, headers=bearer(key)).status_code == 403


def test_a_page_of_a_named_origin_asks_before_it_has_a_key_and_can_read_that_it_needs_one(serve, keys):
    keys.create("shop")
    page = {"Origin": "https://shop.example"}
    with serve(cors_origins=["https://shop.example"]) as client:
        asked = page | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        allowed = client.options(CHAT[0], headers=asked)
        assert allowed.status_code == 204
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        refused = client.post(CHAT[0], json=CHAT[1], headers=page)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, page["Origin"])


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock of the limits that a test moves."""

    class Clock:
        now = time.monotonic()

        def monotonic(self):
            return self.now

    monkeypatch.setattr(limits, "time", clock := Clock())
    return clock


def test_requests_of_one_key_are_limited_by_the_minute_and_others_are_not(serve, keys, clock):
    few, many = keys.create("few", requests_per_minute=2), keys.create("many")
    with serve() as client:
        asked = [client.get("/v1/models", headers=bearer(few)) for _ in range(3)]
        assert [answer.status_code for answer in asked] == [200, 200, 429]
        assert asked[2].headers["retry-after"] == "30"
        assert asked[2].json()["error"] | {"message": ""} == {
            "message": "", "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded",
        }  # fmt: skip
        assert client.get("/v1/models", headers=bearer(many)).status_code == 200
        clock.now += 29.9
        assert client.get("/v1/models", headers=bearer(few)).headers["retry-after"] == "1"
        clock.now += 0.2
        assert client.get("/v1/models", headers=bearer(few)).status_code == 200
        official = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key=few, max_retries=0)
        with pytest.raises(openai.RateLimitError):
            official.models.list()
        assert client.get("/health", headers=bearer(few)).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        CHAT,
        (CHAT[0], CHAT[1] | {"stream": True}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 9}),
        ("/v1/decisions", CASE),
    ],
    ids=["chat", "stream", "completion", "decision"],
)
def test_tokens_read_and_written_are_limited_by_the_minute(serve, keys, clock, path, body):
    key = bearer(keys.create("shop", tokens_per_minute=10))
    with serve() as client:
        assert client.post(path, json=body, headers=key).status_code == 200
        refused = client.post(path, json=body, headers=key)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        clock.now += int(refused.headers["retry-after"]) - 1.1
        assert client.post(path, json=body, headers=key).status_code == 429
        clock.now += 1.1
        assert client.post(path, json=body, headers=key).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_answers_of_one_prompt_take_what_their_usage_says(serve, keys, clock, stream):
    key = bearer(keys.create("shop", tokens_per_minute=60))
    two = CHAT[1] | {"n": 2} | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})
    with serve() as client:
        answer = client.post(CHAT[0], json=two, headers=key)
        whole = json.loads(answer.text.splitlines()[-4].removeprefix("data: ")) if stream else answer.json()
        refused = client.post(CHAT[0], json=two, headers=key)
        assert int(refused.headers["retry-after"]) == whole["usage"]["total_tokens"] - 60 + 1


def test_limits_are_those_that_the_key_has_now(serve, keys, clock):
    key = keys.create("shop", requests_per_minute=1)
    with serve() as client:
        assert [client.get("/v1/models", headers=bearer(key)).status_code for _ in range(2)] == [200, 429]
        keys.revoke("shop")
        anew = keys.create("shop", requests_per_minute=2)
        assert [client.get("/v1/models", headers=bearer(anew)).status_code for _ in range(3)] == [200, 200, 429]


def test_a_wrong_key_is_no_ones_request(serve, keys, clock):
    key = keys.create("shop", requests_per_minute=1)
    with serve() as client, httpx.Client(base_url=client.base_url, trust_env=False) as other:
        for _ in range(5):
            assert other.get("/v1/models", headers=bearer("tl-wrong")).status_code == 401
        assert client.get("/v1/models", headers=bearer(key)).status_code == 200
