"""What a template looks up is stated in it: prompts are the same here, in transformers, and on another day."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import pytest
from tiny_tokenizers import PUBLISHED, published, write_model
from transformers import AutoTokenizer

from twinloop.common.errors import UserError
from twinloop.models.template_pins import TemplatePins
from twinloop.models.tokenizer import ChatTokenizer

PINS = TemplatePins(thinking=False, date=datetime.date(2024, 7, 26))
ANSWER = '{"eligible": true}'
CHAT = [{"role": "user", "content": "so?"}, {"role": "assistant", "content": ANSWER}]
LONGER = [*CHAT, *CHAT]
# In the manner of SmolLM3: its own default of thinking, and two forms of the date.
CLOCK = """
{%- if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}
{{- '<|im_start|>system\\n' + strftime_now('%d %B %Y') + ' ' + strftime_now("%Y-%m-%d") + '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- set empty = '' if enable_thinking or message.role != 'assistant' else '<think>\\n\\n</think>\\n' %}
    {{- '<|im_start|>' + message.role + '\\n' + empty + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' + ('' if enable_thinking else '<think>\\n\\n</think>\\n') }}
{%- endif %}
"""


def write(name: str, folder: Path) -> Path:
    if name in PUBLISHED:
        return published(name, folder)
    template = CLOCK if name == "clock" else CALLERS
    return write_model(folder, "qwen", template, ("<|im_end|>",), eos_token="<|im_end|>")


def pinned(name: str, folder: Path, pins: TemplatePins = PINS) -> ChatTokenizer:
    """As it comes, then pinned; also written to a folder."""
    tokenizer = ChatTokenizer.load(write(name, folder / "came")).pinned(pins)
    tokenizer.save(folder / "pinned")
    return tokenizer


@pytest.mark.parametrize("name", [*PUBLISHED, "clock"])
def test_an_answer_decoded_from_what_is_trained_is_the_answer_that_was_given(name: str, tmp_path: Path) -> None:
    ours = pinned(name, tmp_path)
    assert ours.decode(ours.encode_answer(ANSWER)).strip() == ANSWER
    for messages in (CHAT, LONGER):
        trained = ours.encode_turns(messages)[0]
        answer = trained.answers[-1]
        assert trained.ids[: answer.start] == ours.encode_prompt(messages[:-1])
        assert ours.decode(trained.ids[answer.start : answer.stop]).strip() == ANSWER


@pytest.mark.parametrize("name", [*PUBLISHED, "clock"])
def test_transformers_writes_the_same_with_the_pinned_template(name: str, tmp_path: Path) -> None:
    ours, theirs = pinned(name, tmp_path), AutoTokenizer.from_pretrained(tmp_path / "pinned")
    for messages in (CHAT, LONGER):
        asked = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert ours.encode_prompt(messages[:-1]) == asked
        assert ours.encode_conversation(messages) == theirs.apply_chat_template(messages, return_dict=False)


# What llama-server gives to every template, and to those of Llama 3.
LLAMA_CPP = {"enable_thinking": True, "date_string": "02 Jan 2030"}
# In the manner of Llama 3.1, which has no clock.
CALLERS = (
    "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("name", [*PUBLISHED, "clock", "caller's"])
def test_what_a_caller_says_of_it_changes_nothing(name: str, tmp_path: Path) -> None:
    ours, theirs = pinned(name, tmp_path), AutoTokenizer.from_pretrained(tmp_path / "pinned")
    for messages in (CHAT, LONGER):
        asked = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False, **LLAMA_CPP)
        assert ours.encode_prompt(messages[:-1]) == asked
    came = ChatTokenizer.load(tmp_path / "came")
    if name in ("llama3", "caller's"):
        with_date = came.pinned(TemplatePins(thinking=False, date=datetime.date(2020, 1, 2)))
        assert "02 Jan 2020" in with_date.render(CHAT)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_template_that_looks_up_nothing_of_it_is_left_as_it_came(name: str, tmp_path: Path) -> None:
    came = ChatTokenizer.load(write(name, tmp_path))
    assert (came.pinned(PINS) is came) == (name not in ("qwen3", "llama3"))
    if name == "qwen3":
        assert came.pinned(TemplatePins(thinking=True, date=PINS.date)) is came


def test_an_answer_that_thinks_is_refused_without_thinking_and_the_setting_is_named(tmp_path: Path) -> None:
    thinks = [CHAT[0], {"role": "assistant", "content": f"<think>\nhm\n</think>\n\n{ANSWER}"}]
    with pytest.raises(UserError, match="otherwise than it is asked for; a base with `thinking: true`"):
        pinned("qwen3", tmp_path / "without").encode_turns(thinks)
    with_thoughts = pinned("qwen3", tmp_path / "with", TemplatePins(thinking=True, date=PINS.date))
    (turns,) = with_thoughts.encode_turns(thinks)
    assert with_thoughts.decode(turns.ids[turns.answers[0].start :][: len(turns.answers[0])]) == thinks[1]["content"]


def test_the_date_is_the_one_that_was_chosen_in_each_of_its_forms(tmp_path: Path) -> None:
    chosen = TemplatePins(thinking=False, date=datetime.date(2020, 1, 2))
    assert "Today Date: 02 Jan 2020\n" in pinned("llama3", tmp_path / "llama3", chosen).render(CHAT)
    came = ChatTokenizer.load(write("clock", tmp_path / "clock"))
    assert re.search(r"system\n02 January 2020 2020-01-02<", came.pinned(chosen).render(CHAT))
    thinking = came.pinned(TemplatePins(thinking=True, date=chosen.date))
    assert thinking.render(CHAT[:1]).endswith("assistant\n")
    assert came.pinned(chosen).render(CHAT[:1]).endswith("assistant\n<think>\n\n</think>\n")
    again = came.pinned(chosen).pinned(chosen)
    assert again.render(CHAT) == came.pinned(chosen).render(CHAT)


def test_white_space_that_a_template_begins_with_is_kept(tmp_path: Path) -> None:
    said = "\n  {{ messages[0].content }}{% if enable_thinking is false %} <think>{% endif %}"
    came = ChatTokenizer.load(write_model(tmp_path, "qwen", said, eos_token="<|im_end|>"))
    assert came.render(CHAT) == "\n  so?"
    assert came.pinned(PINS).render(CHAT) == "\n  so? <think>"
