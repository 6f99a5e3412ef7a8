"""Calls of tools over HTTP, as OpenAI's clients ask for them, in the forms of several families of models."""

from __future__ import annotations

import json
from dataclasses import dataclass

import jsonschema_rs
import openai
import pytest
from pydantic import BaseModel, Field
from served import HELLO, make_app, running
from test_chat_api import chunks_of
from test_structured import small_engine
from tool_templates import FAMILIES, save_tokenizer
from transformers import AutoTokenizer
from wish import Wish

from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.engine.scheduler import Scheduler
from twinloop.serving.response_format import MAX_DEPTH

CHAT = "/v1/chat/completions"
CALLING = [name for name in FAMILIES if name != "thinking"]
"""The families of which a forced call comes at once."""

FIND = {
    "type": "function",
    "function": {
        "name": "find_order",
        "description": 'finds "an order"\nby its number // or % not',
        "parameters": {
            "type": "object",
            "properties": {
                "order": {"type": "string", "pattern": "^A[0-9]{5}$"},
                "days": {"type": ["integer", "null"], "minimum": 0, "maximum": 30},
                "state": {"enum": ["sent", "lost <|im_end|>"]},
            },
            "required": ["order", "days", "state"],
            "additionalProperties": False,
        },
    },
}
STOP = {
    "type": "function",
    "function": {"name": "find", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}
BARE = {"type": "function", "function": {"name": "no_arguments", "description": "does it"}}
TOOLS = [FIND, STOP, BARE]
SCHEMAS = {
    "find_order": FIND["function"]["parameters"],
    "find": STOP["function"]["parameters"],
    "no_arguments": {"type": "object", "maxProperties": 0},
}
GOOD = {"order": "A10234", "days": 12, "state": "sent"}


@dataclass
class Served:
    client: object
    model: object
    tokenizer: ChatTokenizer
    folder: object

    def ask(self, messages=HELLO, **more):
        """The one choice of an answer."""
        answer = self.client.post(CHAT, json={"messages": messages, "seed": 3, "tools": TOOLS, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    def refused(self, **more):
        answer = self.client.post(CHAT, json={"messages": HELLO, "tools": TOOLS, **more})
        assert answer.status_code == 400, answer.text
        return answer.json()["error"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    for name, family in FAMILIES.items():
        save_tokenizer(family, folder / name)
    return folder


@pytest.fixture(scope="module", params=CALLING)
def served(request, folders):
    """A small network with random weights."""
    tokenizer = ChatTokenizer.load(folders / request.param)
    scheduler = Scheduler(small_engine(tokenizer, slots=4))
    with running(make_app(folders / request.param, scheduler, tokenizer)) as client:
        yield Served(client, scheduler, tokenizer, folders / request.param)
    scheduler.close(drain=False, timeout_s=20)


@pytest.fixture(scope="module", params=FAMILIES)
def wishing(request, folders):
    """A model that writes what a test wants, where it may."""
    wish = Wish(folders / request.param)
    with running(make_app(folders / request.param, wish, wish.tokenizer)) as client:
        yield Served(client, wish, wish.tokenizer, folders / request.param)


def written(served, *calls, text=""):
    """How the model's template writes an answer of calls (name, arguments), without the stop token."""
    as_text = served.folder.name == "thinking"
    made = [
        {
            "id": f"call{index:05}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments) if as_text else arguments},
        }
        for index, (name, arguments) in enumerate(calls)
    ]
    official = AutoTokenizer.from_pretrained(served.folder)
    asked = official.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
    answered = [*HELLO, {"role": "assistant", "content": text, "tool_calls": made}]
    whole = official.apply_chat_template(answered, tokenize=False)
    return whole[len(asked.removesuffix("<think>\n")) :].partition(official.eos_token)[0]


def calls_of(choice):
    """Names and arguments of an answer's calls, which are checked against their schemas."""
    calls = [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in choice["message"]["tool_calls"]
    ]
    for name, arguments in calls:
        jsonschema_rs.validate(SCHEMAS[name], arguments)
    return calls


# --- what a model with random weights writes --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("choice", ["required", "find_order"])
def test_a_forced_call_follows_its_schema_streamed_and_whole(served, choice, seed):
    named = {"type": "function", "function": {"name": choice}}
    asked = {"tool_choice": choice if choice == "required" else named, "seed": seed, "max_tokens": 600}
    whole = served.ask(**asked, parallel_tool_calls=False)
    assert (whole["finish_reason"], whole["message"]["content"]) == ("tool_calls", None)
    ((name, _),) = calls_of(whole)
    assert choice in ("required", name)
    body = {"messages": HELLO, "tools": TOOLS, **asked, "parallel_tool_calls": False, "stream": True}
    first, start, *pieces, last = (chunk["choices"][0] for chunk in chunks_of(served.client.post(CHAT, json=body)))
    assert first["delta"] == {"role": "assistant", "content": None}
    (begun,) = start["delta"]["tool_calls"]
    assert (begun["index"], begun["type"], begun["function"]) == (0, "function", {"name": name, "arguments": ""})
    deltas = [piece["delta"]["tool_calls"] for piece in pieces]
    assert all([*each[0]] == ["index", "function"] and [*each[0]["function"]] == ["arguments"] for each in deltas)
    arguments = "".join(each[0]["function"]["arguments"] for each in deltas)
    assert arguments == whole["message"]["tool_calls"][0]["function"]["arguments"]
    assert (last["delta"], last["finish_reason"]) == ({}, "tool_calls")


def test_the_official_client_calls_tools_and_sends_their_results(served):
    class FindOrder(BaseModel):
        """Finds an order."""

        order: str = Field(pattern="^A[0-9]{5}$")
        fast: bool

    official = openai.OpenAI(base_url=f"{served.client.base_url}/v1", api_key="none", max_retries=0)
    chat = official.chat.completions
    asked = {
        "model": "returns",
        "messages": HELLO,
        "tools": [openai.pydantic_function_tool(FindOrder)],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "seed": 5,
    }
    parsed = chat.parse(**asked).choices[0].message
    (call,) = parsed.tool_calls
    assert isinstance(call.function.parsed_arguments, FindOrder)
    with chat.stream(**asked) as stream:
        events = [event.type for event in stream]
        streamed = stream.get_final_completion().choices[0]
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= set(events)
    assert streamed.message.tool_calls[0].function.parsed_arguments == call.function.parsed_arguments
    assert (streamed.finish_reason, streamed.message.content) == ("tool_calls", None)
    answer = chat.create(**asked).choices[0].message
    again = [*HELLO, answer, {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "sent"}]
    said = chat.create(**asked | {"messages": again, "tool_choice": "none"}, max_tokens=20).choices[0].message
    assert said.content
    assert said.tool_calls is None
    for message in (parsed, streamed.message):  # with what the client has read of it
        again = [*HELLO, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sent"}]
        assert chat.create(**asked | {"messages": again, "tool_choice": "none"}, max_tokens=20).choices[0].message


def test_a_prompt_with_tools_has_the_tokens_that_tokenize_says(served):
    tools = [{"type": "function", "function": {"name": "find_order", "parameters": {"type": "object"}}}]
    plain, counted = (
        served.client.post("/tokenize", json={"messages": HELLO, **more}).json()["count"]
        for more in ({}, {"tools": tools})
    )
    asked = {"messages": HELLO, "tools": tools, "max_tokens": 1}
    usage = served.client.post("/v1/chat/completions", json=asked).json()["usage"]
    assert counted == usage["prompt_tokens"] > plain
    without = {"messages": HELLO, "tools": tools, "add_generation_prompt": False}
    refused = served.client.post("/tokenize", json=without)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "add_generation_prompt")


def test_an_answer_that_is_cut_says_so_and_has_what_there_is_of_its_call(served):
    choice = served.ask(tool_choice={"type": "function", "function": {"name": "find_order"}}, max_tokens=45)
    assert choice["finish_reason"] == "length"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "find_order"
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        json.loads(call["function"]["arguments"])


# --- what a model writes that wants to --------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [None, ["order"]])
def test_a_model_may_call_or_not(wishing, stop):
    wishing.model.wish = written(wishing, ("find_order", GOOD))
    called = wishing.ask(stop=stop)
    assert (called["finish_reason"], calls_of(called)) == ("tool_calls", [("find_order", GOOD)])
    assert called["message"]["content"] is None
    wishing.model.wish = "it is on its way"
    said = wishing.ask(stop="way")
    assert (said["finish_reason"], said["message"]) == (
        "stop",
        {"role": "assistant", "content": "it is on its ", "refusal": None},
    )


def test_a_call_that_is_begun_keeps_to_its_form(wishing):
    whole = written(wishing, ("find_order", GOOD))
    for end in ("find_or", '"A1'):
        wishing.model.wish = whole[: whole.index(end) + len(end)]
        ((name, arguments), *_) = calls_of(wishing.ask(max_tokens=2000, parallel_tool_calls=False))
        assert name == "find_order"
        assert arguments["order"].startswith("A1" if end == '"A1' else "A")


def test_calls_may_follow_a_text_and_each_other_where_the_template_has_it_so(wishing):
    if wishing.folder.name == "llama":  # one call a turn
        assert len(calls_of(wishing.ask(tool_choice="required"))) == 1
        return
    calls = [("find_order", GOOD), ("no_arguments", {}), ("find", {})]
    text = "" if wishing.folder.name == "mistral" else "let me see"
    wishing.model.wish = written(wishing, *calls, text=text)
    choice = wishing.ask()
    assert choice["message"]["content"] == (text or None)
    assert calls_of(choice) == calls
    ids = {call["id"] for call in choice["message"]["tool_calls"]}
    assert len(ids) == 3
    if wishing.folder.name == "mistral":
        assert all(len(id) == 9 and id.isalnum() for id in ids)
    assert calls_of(wishing.ask(parallel_tool_calls=False)) == calls[:1]
    wishing.model.wish = written(wishing, *calls, text=text if wishing.folder.name == "thinking" else "")
    assert calls_of(wishing.ask(tool_choice="required")) == calls


def test_allowed_tools_are_those_that_may_be_called(wishing):
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "no_arguments"}}]}
    wishing.model.wish = written(wishing, ("find_order", GOOD))
    choice = wishing.ask(tool_choice={"type": "allowed_tools", "allowed_tools": allowed}, parallel_tool_calls=False)
    assert calls_of(choice) == [("no_arguments", {})]
    assert b"find_order" in b"".join(wishing.tokenizer.token_bytes[id] for id in wishing.model.prompts[-1])


def test_none_is_no_call_also_of_a_model_that_wants_to(wishing):
    wishing.model.wish = written(wishing, ("find_order", GOOD))
    message = wishing.ask(tool_choice="none", max_tokens=60)["message"]
    assert message.keys() == {"role", "content", "refusal"}


def test_a_text_that_only_begins_like_a_call_is_a_text(wishing):
    whole = written(wishing, ("find_order", GOOD))
    begun = whole[: 5 if whole[0] in "<{" else 0] if wishing.folder.name != "thinking" else "<|ca"
    for text in (f"so {begun}", "so  ", "{}"):
        wishing.model.wish = text
        body = {"messages": HELLO, "tools": TOOLS, "stream": True}
        chunks = [chunk["choices"][0]["delta"] for chunk in chunks_of(wishing.client.post(CHAT, json=body))]
        assert "".join(delta.get("content") or "" for delta in chunks) == text
        assert wishing.ask()["message"]["content"] == text


def test_an_answers_schema_holds_where_no_tool_is_called(wishing):
    schema = {
        "type": "object",
        "properties": {"name": {"const": "<tool_call><|call|>[TOOL_CALLS]"}},
        "required": ["name"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    if wishing.folder.name == "llama":
        error = wishing.refused(response_format=form)
        assert error["param"] == "response_format"
    wishing.model.wish = written(wishing, ("find", {}), text="so" if wishing.folder.name == "thinking" else "")
    forced = wishing.ask(response_format=form, tool_choice="required", parallel_tool_calls=False)
    assert calls_of(forced) == [("find", {})]
    if wishing.folder.name == "llama":
        return
    wishing.model.wish = "{"
    jsonschema_rs.validate(schema, json.loads(wishing.ask(response_format=form)["message"]["content"]))
    wishing.model.wish = written(wishing, ("find_order", GOOD))
    assert calls_of(wishing.ask(response_format=form)) == [("find_order", GOOD)]
    content = wishing.ask(response_format=form, tool_choice="none")["message"]["content"]
    jsonschema_rs.validate(schema, json.loads(content))


# --- the prompt -------------------------------------------------------------------------------------------------------


def test_the_prompt_is_the_one_that_transformers_makes(wishing):
    as_text = wishing.folder.name == "thinking"
    call = {"id": "abcdefgh1", "type": "function", "function": {"name": "find_order", "arguments": json.dumps(GOOD)}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefgh1", "content": '{"found": true}'},
    ]
    wishing.model.wish = "so"
    wishing.ask(messages)
    rendered = json.loads(json.dumps(messages))
    rendered[1]["content"] = ""
    if not as_text:
        rendered[1]["tool_calls"][0]["function"]["arguments"] = GOOD
    plain = json.loads(json.dumps(TOOLS).replace(" <|im_end|>", " (im_end)"))
    plain[2]["function"]["parameters"] = {"type": "object", "properties": {}}
    wishing.ask(messages, tools=plain)
    official = AutoTokenizer.from_pretrained(wishing.folder)
    expected = official.apply_chat_template(rendered, tools=plain, add_generation_prompt=True)["input_ids"]
    assert wishing.model.prompts[-1] == expected
    special = [[id for id in prompt if id in wishing.tokenizer.special_ids] for prompt in wishing.model.prompts[-2:]]
    assert special[0] == special[1]


# --- what is refused --------------------------------------------------------------------------------------------------


def tool(**function):
    return {"type": "function", "function": {"name": "f", **function}}


def parameters(schema):
    return [FIND, tool(parameters=schema)]


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"tools": parameters({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}})},
         "tools.1.function.parameters", "uniqueItems"),
        ({"tools": parameters({"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}})},
         "tools.1.function.parameters", "x"),
        ({"tools": parameters({"type": "string"})}, "tools.1.function.parameters", "must describe an object"),
        ({"tools": [FIND, FIND]}, "tools.1.function.name", "another tool has this name"),
        ({"tools": [tool(name="a b")]}, "tools.0.function.name", "match pattern"),
        ({"tools": [tool(returns={})]}, "tools.0.function.returns", "is not a field"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type", "'function'"),
        ({"tools": [tool(name=f"f{index}") for index in range(129)]}, "tools", "at most 128"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice.function.name", "not the name"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool(name="g")]}}},
         "tool_choice.allowed_tools.tools.0.function.name", "not the name"),
        ({"tool_choice": "any"}, "tool_choice", "'required'"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice.type", "must be one of"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "without tools"),
        ({"tools": [], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "without tools"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"uniqueItems": True}}}},
         "response_format", "uniqueItems"),
        ({"functions": []}, "functions", "is not a known parameter"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_to_is_refused_by_its_path_before_anything_is_generated(served, change, param, said):
    before = served.model.metrics().totals
    error = served.refused(**change)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert error["message"].startswith(f"{param}: ")
    assert said in error["message"]
    assert served.model.metrics().totals == before


def test_data_that_is_as_deep_as_is_read_is_written_into_the_prompt(wishing):
    data = {}
    for _ in range(MAX_DEPTH - 1):
        data = {"default": data}
    call = {"id": "callnr001", "type": "function", "function": {"name": "find_order", "arguments": json.dumps(data)}}
    messages = [*HELLO, {"role": "assistant", "tool_calls": [call]}]
    messages.append({"role": "tool", "tool_call_id": "callnr001", "content": "sent"})
    wishing.model.wish = "yes"
    asked = {"messages": messages, "tools": [tool(parameters=data)], "tool_choice": "none"}
    answer = wishing.client.post(CHAT, json=asked)  # Llama's template indents, which needs more tokens than there are
    assert answer.status_code == 200 or answer.json()["error"]["code"] == "context_length_exceeded"
