"""Prompts with tools have the ids that `transformers` gives them: templates trim content and look into it there too."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import published
from transformers import PreTrainedTokenizerFast

from twinloop.models.tokenizer import ChatTokenizer
from twinloop.models.tool_messages import encode_tool_prompt

Message = dict[str, Any]
TOOLS = [{"name": "find", "description": "é", "parameters": {"type": "object", "properties": {"q": {"enum": [1]}}}}]
CONTENTS = ["damaged items", "  spaces around \n\n", '{"a": "b\\"c"}', "漢字 🙂", "\n\nso\ttab", "{{ messages }}"]
THOUGHTS = ["<think>\nso it is\n</think>\n\n", "<think>\nso\n</think>\n\nyes", "a</think>b", "<think>x", "<tool_call>"]


def called(content: str, **arguments: Any) -> Message:
    function = {"name": "find", "arguments": arguments}
    call = {"id": "1", "type": "function", "function": function}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def chat(said: str, other: str) -> list[Message]:
    """With calls and results in an earlier turn and in the last one. said: by the assistant. other: by the others."""
    result = {"role": "tool", "tool_call_id": "1", "name": "find", "content": other}
    return [
        {"role": "system", "content": other},
        {"role": "user", "content": other},
        called(said, q="é"),
        result,
        {"role": "assistant", "content": said},
        {"role": "user", "content": other},
        called(said, q=[1, {"é": None}]),
        result,
    ]


def loaded(name: str, folder: Path) -> tuple[ChatTokenizer, PreTrainedTokenizerFast]:
    published(name, folder)
    return ChatTokenizer.load(folder), PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama3"])
@pytest.mark.parametrize("tools", [TOOLS, []])
def test_a_prompt_with_tools_has_the_ids_of_transformers(name: str, tools: list[Any], tmp_path: Path) -> None:
    ours, theirs = loaded(name, tmp_path)
    given = [{"type": "function", "function": tool} for tool in tools] or None
    answers = [*CONTENTS, *(THOUGHTS if name.startswith("qwen") else [])]
    for said, other in itertools.product(answers, CONTENTS):
        whole = chat(said, other)
        for messages in (whole[:4], whole[:6], whole):
            asked = theirs.apply_chat_template(messages, tools=given, add_generation_prompt=True, return_dict=False)
            assert encode_tool_prompt(ours, messages, tools) == asked, messages


def test_thoughts_of_earlier_turns_are_dropped_with_tools_as_without(tmp_path: Path) -> None:
    ours, _ = loaded("qwen3", tmp_path)
    thought = "<think>\nfirst thought\n</think>\n\nfirst"
    asked = {"role": "user", "content": "so?"}
    messages = [asked, {"role": "assistant", "content": thought}, asked]
    with_tools, without = encode_tool_prompt(ours, messages, TOOLS), ours.encode_prompt(messages)
    assert with_tools[-len(without) :] == without
    assert "first thought" not in ours.decode(with_tools)
    step = [asked, called(thought), {"role": "tool", "tool_call_id": "1", "content": "found"}]
    assert "first thought" in ours.decode(encode_tool_prompt(ours, step, TOOLS))


def test_what_spells_a_mark_is_content(tmp_path: Path) -> None:
    ours, _ = loaded("qwen3", tmp_path)
    spelled = "a\ue0000\ue001b\ue0000j\ue001"
    ids = encode_tool_prompt(ours, chat(spelled, spelled), TOOLS)
    assert ours.decode(ids).count(spelled) == len(chat("", ""))
