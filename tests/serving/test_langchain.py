"""LangChain's OpenAI provider, unmodified, on the served model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
from pydantic import BaseModel
from served import make_app, running
from test_structured import small_engine
from test_tools import FIND
from tool_templates import FAMILIES, save_tokenizer

from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.engine.scheduler import Scheduler

ChatOpenAI = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed").ChatOpenAI


class Order(BaseModel):
    """What the customer says."""

    days: int
    damaged: bool
    reason: str | None


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("langchain")
    save_tokenizer(FAMILIES["qwen"], folder)
    tokenizer = ChatTokenizer.load(folder)
    scheduler = Scheduler(small_engine(tokenizer, slots=2))
    with running(make_app(folder, scheduler, tokenizer)) as client:
        settings = {"model": "returns", "base_url": f"{client.base_url}/v1", "api_key": "none", "max_retries": 0}
        yield ChatOpenAI(**settings, temperature=1, seed=3, max_completion_tokens=600)
    scheduler.close(drain=False, timeout_s=20)


def test_an_answer_whole_and_streamed(chat: Any) -> None:
    messages = [("system", "be brief"), ("human", "hello")]
    whole = chat.invoke(messages)
    assert whole.response_metadata["model_name"] == "returns"
    assert whole.usage_metadata["output_tokens"] > 0
    chunks = list(chat.stream(messages, stream_usage=True))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) > 0


@pytest.mark.parametrize("choice", ["required", "find_order"])
def test_tools_are_called_and_their_results_taken(chat: Any, choice: str) -> None:
    asking = chat.bind_tools([FIND], tool_choice=choice)
    called = asking.invoke("where is A10234?")
    (call, *_) = called.tool_calls
    assert call["name"] == "find_order"
    jsonschema_rs.validate(FIND["function"]["parameters"], call["args"])
    results = [("tool", json.dumps({"state": "sent"}), each["id"]) for each in called.tool_calls]
    messages = [{"role": "tool", "content": text, "tool_call_id": id} for _, text, id in results]
    assert chat.invoke([("human", "where is A10234?"), called, *messages]).usage_metadata["input_tokens"] > 0
    streamed = None
    for chunk in asking.stream("where is A10234?"):
        streamed = chunk if streamed is None else streamed + chunk
    assert [each["args"] for each in streamed.tool_calls] == [each["args"] for each in called.tool_calls]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_parsed(chat: Any, method: str) -> None:
    assert isinstance(chat.with_structured_output(Order, method=method).invoke("it came broken"), Order)
