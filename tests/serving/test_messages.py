"""Messages of all of OpenAI's roles: as the chat template takes them, or refused by the name of their field."""

import json
from contextlib import suppress

import pytest
from served import HELLO, ScriptedScheduler, make_app, running
from transformers import AutoTokenizer

from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.messages import AssistantMessage, UserMessage, encode_answered

CHAT = "/v1/chat/completions"

# As those of open models: a call is written as JSON, and what a tool returned as a turn of its own.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ 'user' if message.role == 'tool' else message.role }}|>"
    "{% if message.role == 'tool' %}<tool_response>{{ message.content }}</tool_response>"
    "{% else %}{{ message.content }}{% for call in message.tool_calls or [] %}"
    "<tool_call>{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}</tool_call>"
    "{% endfor %}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def call_of(arguments):
    return {"id": "call_1", "type": "function", "function": {"name": "find_order", "arguments": arguments}}


def conversation(arguments='{"order": "A10234"}', result="delivered"):
    return [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call_of(arguments)]},
        {"role": "tool", "tool_call_id": "call_1", "content": result},
    ]


@pytest.fixture
def with_tools(tmp_path, tokenizer):
    """A tokenizer whose chat template has tools, and its directory."""
    folder = tmp_path / "tokenizer"
    tokenizer.save(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return ChatTokenizer.load(folder), folder


def prompt_of(client, script, messages):
    answer = client.post(CHAT, json={"messages": messages})
    assert answer.status_code == 200, answer.text
    return script.prompts[-1]


def refusal_of(client, messages):
    answer = client.post(CHAT, json={"messages": messages})
    assert answer.status_code == 400
    return answer.json()["error"]


def test_a_developers_message_is_the_systems(scripted, script):
    system, developer = (
        prompt_of(scripted, script, [{"role": role, "content": "be brief"}, *HELLO]) for role in ("system", "developer")
    )
    assert developer == system


def test_an_answer_of_openais_client_may_be_sent_back_with_all_of_its_fields(scripted, script):
    plain = {"role": "assistant", "content": "yes"}
    unused = {"refusal": None, "audio": None, "function_call": None, "tool_calls": None, "annotations": []}
    unused |= {"parsed": {"eligible": True}, "name": "agent"}
    prompts = [prompt_of(scripted, script, [*HELLO, answer, *HELLO]) for answer in (plain, plain | unused)]
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize(
    ("message", "param", "said"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [call_of("{}")]}, "tool_calls", "has no tools"),
        ({"role": "assistant", "content": "so", "tool_calls": [call_of("{}")]}, "tool_calls", "has no tools"),
        ({"role": "tool", "tool_call_id": "call_1", "content": "x"}, "role", "has no tools"),
        ({"role": "tool", "content": "x"}, "tool_call_id", "is required"),
        ({"role": "assistant", "content": None}, "content", "is required without tool_calls"),
        ({"role": "assistant", "content": "so", "function_call": {"name": "f"}}, "function_call", "not supported"),
        ({"role": "user", "content": None}, "content", "should be a valid string"),
        ({"role": "user", "content": "so", "weight": 1}, "weight", "is not a field"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "content.0.type", "should be 'text'"),
        ({"role": "critic", "content": "so"}, "role", "must be one of"),
        ({"content": "so"}, "role", "is required"),
    ],
)
def test_what_has_no_place_in_the_prompt_is_refused_by_its_path_and_never_dropped(scripted, message, param, said):
    error = refusal_of(scripted, [*HELLO, message])
    assert error["param"] == f"messages.1.{param}"
    assert error["message"].startswith(f"messages.1.{param}: ")
    assert said in error["message"]


@pytest.mark.parametrize("result", ["delivered", "a <|end|> b", '"quoted"\n\\ grüße'])
@pytest.mark.parametrize("arguments", ['{"order": "A1", "n": [1, null]}', "{}", "none", '{"<|end|>": "a\\"b"}'])
def test_a_template_with_tools_gets_calls_and_results(tmp_path, with_tools, arguments, result):
    tokenizer, folder = with_tools
    script = ScriptedScheduler(tokenizer)
    messages = conversation(arguments, result)
    with running(make_app(tmp_path, script, tokenizer)) as client:
        prompt = prompt_of(client, script, messages)
    as_data = json.loads(json.dumps(messages))
    as_data[1]["content"] = ""
    with suppress(ValueError):
        as_data[1]["tool_calls"][0]["function"]["arguments"] = json.loads(arguments)
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        as_data, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(prompt) == expected
    special = [id for id in prompt if id in tokenizer.special_ids]
    plain = tokenizer.encode_prompt([{"role": role, "content": "x"} for role in ("user", "assistant", "user")])
    assert special == [id for id in plain if id in tokenizer.special_ids]


def test_a_sampled_answer_that_the_template_splits_is_scored_as_it_is(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    split = settings["chat_template"].replace("message['content']", "message['content'].split('</think>')[-1]")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": split}))
    splits, said = ChatTokenizer.load(tmp_path), "so</think>yes"
    messages = [UserMessage(role="user", content="late?"), AssistantMessage(role="assistant", content=said)]
    prompt = splits.encode_prompt([{"role": "user", "content": "late?"}])
    assert encode_answered(messages, splits) == [*prompt, *splits.encode(said), splits.stop_id]
