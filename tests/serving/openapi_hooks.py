"""For schemathesis: what a request that fits /openapi.json may be refused for."""

import schemathesis

ASKED = {f"POST {path}" for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")}
NAMED = {
    "context_length_exceeded", "empty_prompt", "too_many_prompts", "unknown_token", "unsupported_message",
    "unsupported_parameter",
}  # fmt: skip
"""What no schema can say of a request to the model: the description of its 400 names these codes."""


@schemathesis.hook
def map_body(context, body):
    """Integers are written without a fraction, which the description of 422 says and JSON Schema cannot."""
    return _without_fractions(body)


def _without_fractions(value):
    if isinstance(value, dict):
        return {key: _without_fractions(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_fractions(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


@schemathesis.check
def refused_only_as_documented(ctx, response, case):
    """A request that fits the description is answered, or refused for one of the reasons that the description names."""
    if not case.meta.generation.mode.is_positive or not 400 <= response.status_code < 500:
        return
    error = response.json()["error"]
    named = (
        response.status_code in (401, 404, 409)
        or (case.operation.label.startswith("PUT /v1/documents/") and error["message"].startswith("document "))
        or (case.operation.label in ASKED and error["code"] in NAMED)
    )
    assert named, f"{response.status_code}: {error['message']}"


@schemathesis.check
def errors_have_one_form(ctx, response, case):
    """Also those of statuses that no route declares, such as 405."""
    if response.status_code >= 400 and response.request.method != "HEAD":
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}, response.content
