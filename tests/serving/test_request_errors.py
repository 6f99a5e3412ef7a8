"""What is wrong with a request is said in one form, by the name of its field; methods and origins as HTTP has them."""

import json

import pytest
from served import CASE, HELLO, ScriptedScheduler, make_app, running

from twinloop.common.errors import UserError
from twinloop.serving.access import origin
from twinloop.serving.response_format import MAX_DEPTH

CHAT, DECISIONS = "/v1/chat/completions", "/v1/decisions"
BODIES = {CHAT: {"messages": HELLO}, DECISIONS: CASE}
SHOP = "https://shop.example"


@pytest.mark.parametrize("path", [CHAT, DECISIONS])
@pytest.mark.parametrize("body", [b'{"messages": [', b'{"a" 1}', b"[" * 100_000, b"\xff\xfe\x00"])
def test_a_body_that_is_no_json_names_no_field(scripted, path, body):
    answer = scripted.post(path, content=body, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, None, "invalid_request_error")
    assert error["message"].startswith("the body is not JSON")


@pytest.mark.parametrize("path", [CHAT, DECISIONS])
@pytest.mark.parametrize(
    ("content_type", "said"),
    [
        ("application/x-www-form-urlencoded", "Content-Type 'application/x-www-form-urlencoded' is not read"),
        ("text/plain", "Content-Type 'text/plain' is not read"),
        (None, "the body has no Content-Type"),
    ],
)
def test_a_body_that_is_not_said_to_be_json_gets_one_clear_line(scripted, path, content_type, said):
    headers = {"Content-Type": content_type} if content_type else {}
    answer = scripted.post(path, content=json.dumps(BODIES[path]).encode(), headers=headers)
    message = answer.json()["error"]["message"]
    assert (answer.status_code, message.partition(";")[0]) == (415, said)
    assert "Content-Type: application/json" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tool_choice": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"n": True}, "n"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"stop": [5]}, "stop.0"),
        ({"stream_options": {"include_usages": True}}, "stream_options.include_usages"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"model": "returns:v" + "1" * 5000}, "model"),
    ],
)
def test_the_field_that_is_wrong_is_named_by_its_path(scripted, change, param):
    answer = scripted.post(CHAT, json={"messages": HELLO, **change})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert error["message"].startswith(f"{param}: ")


def nested(levels):
    """Objects and arrays within each other."""
    data = {}
    for level in range(levels - 2):
        data = [data] if level % 2 else {"default": data}
    return {"default": data}


def in_a_schema(data):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": data}}
    return {"response_format": form}, "response_format.json_schema.schema"


def in_a_tool(data):
    tool = {"type": "function", "function": {"name": "f", "parameters": data}}
    return {"tools": [tool], "tool_choice": "none"}, "tools.0.function.parameters"


def in_a_call(data):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps(data)}}
    asked = [*HELLO, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": ""}]
    return {"messages": asked}, "messages.1.tool_calls.0.function.arguments"


@pytest.mark.parametrize("levels", [MAX_DEPTH + 1, 600, 900])
@pytest.mark.parametrize("place", [in_a_schema, in_a_tool, in_a_call])
def test_what_is_nested_too_deeply_is_refused_by_its_path(scripted, place, levels):
    change, param = place(nested(levels))
    answer = scripted.post(CHAT, json={"messages": HELLO} | change)
    said = f"{param}: is nested more than {MAX_DEPTH} levels deep"
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, said)


@pytest.mark.parametrize("path", [f"{DECISIONS}?model={'1' * 5000}", "/v1/versions/" + "1" * 5000])
def test_a_number_of_many_digits_is_a_mistake_of_the_request(scripted, path):
    assert scripted.request("POST" if "decisions" in path else "GET", path, json=CASE).status_code == 422


@pytest.mark.parametrize("choice", ["auto", "none", None])
def test_a_choice_of_tools_without_tools_changes_nothing(scripted, choice):
    answer = scripted.post(CHAT, json={"messages": HELLO, "tool_choice": choice, "parallel_tool_calls": False})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("OPTIONS", CHAT, "POST"),
        ("GET", DECISIONS, "POST"),
        ("HEAD", CHAT, "POST"),
        ("DELETE", "/v1/documents/P-7", "GET, HEAD, PUT"),
        ("POST", "/v1/documents", "GET, HEAD"),
        ("TRACE", "/health", "GET, HEAD"),
        ("PATCH", "/", "GET, HEAD"),
    ],
)
def test_a_method_that_a_path_does_not_have_is_told_which_it_has(scripted, method, path, allowed):
    answer = scripted.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    if method != "HEAD":
        assert allowed in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", "/v1/documents/P-7", "/v1/documents/P-99"])
def test_head_is_get_without_a_body(scripted, path):
    head, get = scripted.head(path), scripted.get(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize("path", ["/health/", "/v1/models/", "/no/such"])
def test_no_path_answers_outside_of_the_one_form(scripted, path):
    answer = scripted.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"]


# --- pages of other origins -------------------------------------------------------------------------------------------


def preflight(client, path, of, method="POST"):
    asked = {
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "content-type, x-stainless-lang",
    }
    return client.options(path, headers={"Origin": of, **asked})


def test_without_the_setting_no_page_of_another_origin_is_answered_by_a_browser(scripted):
    refused = preflight(scripted, CHAT, SHOP)
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    answer = scripted.post(CHAT, json=BODIES[CHAT], headers={"Origin": SHOP})
    assert not [name for name in {**refused.headers, **answer.headers} if name.startswith("access-control-")]


def test_a_page_of_a_named_origin_may_ask(tmp_path, tokenizer):
    app = make_app(tmp_path, ScriptedScheduler(tokenizer), tokenizer, cors_origins=[SHOP, "http://localhost:3000"])
    with running(app) as client:
        for of in (SHOP, "http://localhost:3000"):
            allowed = preflight(client, CHAT, of)
            assert (allowed.status_code, allowed.content) == (204, b"")
            assert allowed.headers["access-control-allow-origin"] == of
            assert "x-stainless-lang" in allowed.headers["access-control-allow-headers"]
            for answer in (
                client.post(CHAT, json=BODIES[CHAT], headers={"Origin": of}),
                client.post(DECISIONS, json={}, headers={"Origin": of}),
            ):
                assert answer.headers["access-control-allow-origin"] == of
                assert "origin" in answer.headers["vary"].lower()
        other = preflight(client, CHAT, "https://other.example")
        assert (other.status_code, other.json()["error"]["type"]) == (403, "permission_error")
        assert "access-control-allow-origin" not in other.headers
        put = {"text": "damaged items reported within 7 days are eligible."}
        assert client.put("/v1/documents/P-7", json=put, headers={"Origin": SHOP}).status_code == 403
        assert client.options(CHAT).status_code == 405


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("https://Shop.example", SHOP),
        ("https://shop.example:443", SHOP),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:80", "http://[::1]"),
    ],
)
def test_an_origin_is_taken_as_browsers_name_it(given, named):
    assert origin(given) == named


@pytest.mark.parametrize("given", ["*", "null", "shop.example", "https://shop.example/", "https://a.example/b", ""])
def test_what_is_no_origin_is_refused(given):
    with pytest.raises(UserError, match=r"--cors-origin .*not an origin.*https://shop.example"):
        origin(given)
