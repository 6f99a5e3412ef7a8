"""Bodies that no client sends: whatever comes, the answer has the one form, is no server's error, and logs nothing."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import CASE, HELLO, ScriptedScheduler, make_app, running, small_tokenizer

VALID = {
    "/v1/decisions": CASE,
    "/v1/chat/completions": {
        "messages": HELLO, "max_tokens": 3, "temperature": 0.5, "top_p": 0.5, "seed": 1, "stop": ["a"], "stream": False,
        "stream_options": {"include_usage": True}, "response_format": {"type": "json_object"}, "tools": [],
    },
    "/v1/completions": {"prompt": ["a", "b"], "max_tokens": 3, "echo": True, "stop": "a", "seed": 1, "stream": True},
    "/tokenize": {"messages": HELLO, "add_generation_prompt": True, "return_token_strs": True},
    "/detokenize": {"tokens": [1, 2, 3]},
}  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    tokenizer = small_tokenizer()
    with running(make_app(tmp_path_factory.mktemp("fuzz"), ScriptedScheduler(tokenizer), tokenizer)) as client:
        yield client


def places(value, path=()):
    """The paths of all values within a value, its own first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def replaced(value, path, by):
    if not path:
        return by
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], by)
    return copy


@st.composite
def bodies(draw, valid):
    """A valid body in which one value is another one, or whose bytes are cut, changed or followed by others."""
    body = replaced(valid, draw(st.sampled_from([*places(valid)])), draw(JSON))
    text = json.dumps(body).encode()  # with NaN and Infinity, and lone surrogates as escapes
    if draw(st.booleans()):
        return text
    start = draw(st.integers(0, len(text)))
    end = draw(st.integers(start, min(len(text), start + 8)))
    return text[:start] + draw(st.binary(max_size=6)) + text[end:]


@pytest.mark.parametrize("path", VALID)
@given(data=st.data())
@settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_no_body_breaks_a_route(client, caplog, path, data):
    answer = client.post(path, content=data.draw(bodies(VALID[path])), headers={"Content-Type": "application/json"})
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.json()["error"]["message"]
    assert not [record for record in caplog.records if record.exc_info]
    assert "could not go on" not in answer.text
