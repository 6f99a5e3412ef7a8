"""Which parameter is named where an answer cannot have the form that was asked for, before it begins or in its middle:
response_format, structured_outputs or tools."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import numpy as np
import openai
import pytest
from served import HELLO, make_app, running
from test_grammar import EACH_CHARACTER, NESTED, TOO_COSTLY
from test_structured import small_engine
from tokenizers import Tokenizer
from tool_templates import FAMILIES, save_tokenizer

from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.engine.grammar import Grammar
from twinloop.serving.engine.sampling import ConstraintError
from twinloop.serving.engine.scheduler import Scheduler

CHAT, TEXTS = "/v1/chat/completions", "/v1/completions"
SCHEMA = {"type": "object", "properties": {"days": {"type": "integer"}}, "required": ["days"]}
FORM = {"response_format": {"type": "json_schema", "json_schema": {"name": "order", "schema": SCHEMA}}}
OUTPUTS = {"structured_outputs": {"regex": "[a-z]+"}}
TOOLS = {"tools": [{"type": "function", "function": {"name": "find", "parameters": SCHEMA}}]}
CALL = '<tool_call>\n{"name": "find", "arguments": {"da'
CHOICES = ["none", "auto", "required", {"type": "function", "function": {"name": "find"}}]


@dataclass
class Served:
    client: httpx.Client
    scheduler: Scheduler
    by_name: Tokenizer
    """Of the model: it reads the names of special tokens as the tokens."""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A small network with random weights, whose chat template has tools."""
    folder = tmp_path_factory.mktemp("forms")
    save_tokenizer(FAMILIES["qwen"], folder)
    tokenizer = ChatTokenizer.load(folder)
    scheduler = Scheduler(small_engine(tokenizer, slots=2))
    with running(make_app(folder, scheduler, tokenizer)) as client:
        yield Served(client, scheduler, Tokenizer.from_file(str(folder / "tokenizer.json")))
    scheduler.close(drain=False, timeout_s=20)


class Writes:
    """A constraint's state that allows one text alone, and fails at its end."""

    def __init__(self, tokens, vocab_size):
        self._left, self._vocab_size = list(tokens), vocab_size

    def allowed(self):
        if not self._left:
            raise ConstraintError("too complex")
        return np.packbits(np.arange(self._vocab_size) == self._left[0], bitorder="little")

    def forced(self):
        return []

    def accept(self, token):
        assert token == self._left.pop(0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "asked", "written", "param"),
    [
        (CHAT, FORM, '{"da', "response_format"),
        (CHAT, {"response_format": {"type": "json_object"}}, "{", "response_format"),
        (CHAT, OUTPUTS, "ab", "structured_outputs"),
        (CHAT, {"structured_outputs": {"json": SCHEMA}}, "{", "structured_outputs"),
        (CHAT, TOOLS, "so", "tools"),
        (CHAT, TOOLS, CALL, "tools"),
        (CHAT, TOOLS | {"tool_choice": "none"}, "so", "tools"),
        (CHAT, TOOLS | {"tool_choice": "required"}, CALL, "tools"),
        (CHAT, TOOLS | {"tool_choice": "required"} | FORM, CALL, "tools"),
        (CHAT, TOOLS | {"tool_choice": "none"} | FORM, '{"da', "response_format"),
        (CHAT, TOOLS | FORM, '{"da', "response_format"),
        (CHAT, TOOLS | FORM, CALL, "tools"),
        (CHAT, {"tools": []} | OUTPUTS, "ab", "structured_outputs"),
        (TEXTS, FORM, '{"da', "response_format"),
        (TEXTS, OUTPUTS, "ab", "structured_outputs"),
    ],
)
def test_a_form_that_fails_in_the_middle_is_named_by_its_parameter(
    served, monkeypatch, path, asked, written, param, stream
):
    tokens = served.by_name.encode(written, add_special_tokens=False).ids
    monkeypatch.setattr(Grammar, "start", lambda grammar: Writes(tokens, served.by_name.get_vocab_size()))
    prompt = {"messages": HELLO} if path == CHAT else {"prompt": "a", "max_tokens": 100}
    answer = served.client.post(path, json=prompt | asked | {"stream": stream})
    assert answer.status_code == (200 if stream else 400)
    *_, last = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    error = json.loads(last)["error"]
    assert (error["message"], error["param"]) == (f"{param}: too complex", param)


@pytest.mark.parametrize("choice", CHOICES)
def test_structured_outputs_beside_tools_are_refused_whatever_may_be_called(served, choice):
    before = served.scheduler.metrics().totals
    answer = served.client.post(CHAT, json={"messages": HELLO, "tool_choice": choice} | TOOLS | OUTPUTS)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "structured_outputs", "unsupported_parameter")
    assert error["message"].startswith("structured_outputs: cannot be kept to beside tools")
    assert served.scheduler.metrics().totals == before


def test_structured_outputs_beside_an_empty_list_of_tools_are_kept_to(served):
    body = {"messages": HELLO, "tools": [], "structured_outputs": {"choice": ["yes", "no"]}}
    assert served.client.post(CHAT, json=body).json()["choices"][0]["message"]["content"] in ("yes", "no")


@pytest.mark.parametrize("outputs", [{"regex": EACH_CHARACTER}, {"grammar": f"start: T\nT: /{EACH_CHARACTER}/"}])
def test_what_costs_too_much_to_follow_is_refused_before_anything_is_generated(served, outputs):
    official = openai.OpenAI(base_url=f"{served.client.base_url}/v1", api_key="none", max_retries=0)
    before = served.scheduler.metrics().totals
    with pytest.raises(openai.BadRequestError) as refused:
        official.completions.create(model="returns", prompt="a", extra_body={"structured_outputs": outputs})
    assert refused.value.param == "structured_outputs"
    assert refused.value.body["message"] == f"structured_outputs: {TOO_COSTLY}"
    assert served.scheduler.metrics().totals == before


def test_an_answer_whose_step_costs_too_much_ends_and_the_one_beside_it_does_not(served):
    text = {"prompt": "a", "max_tokens": 300, "seed": 1}
    with ThreadPoolExecutor() as pool:
        beside = pool.submit(served.client.post, TEXTS, json=text | {"ignore_eos": True})
        failed = served.client.post(TEXTS, json=text | {"structured_outputs": {"regex": f"order {NESTED}y"}})
    assert beside.result().json()["choices"][0]["finish_reason"] == "length"
    assert failed.status_code == 400
    assert failed.json()["error"]["message"] == f"structured_outputs: {TOO_COSTLY}"
