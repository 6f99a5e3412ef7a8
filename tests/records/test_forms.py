"""The forms that people have: each becomes the standard one, in JSON lines and in Parquet, and can be trained on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from twinloop.common.errors import UserError
from twinloop.domains.chat import domain as chat_domain
from twinloop.models.config import DecoderConfig
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.models.template_check import check_template
from twinloop.records.reading import read_rows
from twinloop.records.rows import LINE, Rows
from twinloop.records.validation import check_rows, validate
from twinloop.tasks.recipe import ValidateSettings
from twinloop.training.loop import run_training
from twinloop.training.method import load_method
from twinloop.training.runtime import Runtime
from twinloop.training.weights import new_decoder

RECORD_TYPES = chat_domain.record_types()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


ONE_TURN = [user("Name a colour."), assistant("Blue.")]
TWO_TURNS = [*ONE_TURN, user("Another."), assistant("Red.")]
BRIEF = system("Be brief.")

CHATS: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "messages": ({"messages": TWO_TURNS}, TWO_TURNS),
    "messages of ShareGPT": ({"messages": [human("Name a colour."), gpt("Blue.")]}, ONE_TURN),
    "ShareGPT": (
        {"conversations": [human("Name a colour."), gpt("Blue."), human("Another."), gpt("Red.")]},
        TWO_TURNS,
    ),
    "ShareGPT with a system turn": (
        {"conversations": [{"from": "system", "value": "Be brief."}, human("Name a colour."), gpt("Blue.")]},
        [BRIEF, *ONE_TURN],
    ),
    "ShareGPT with a field for the system": (
        {"conversations": [human("Name a colour."), gpt("Blue.")], "system": "Be brief."},
        [BRIEF, *ONE_TURN],
    ),
    "ShareGPT with the same system twice": (
        {
            "conversations": [{"from": "system", "value": "Be brief."}, human("Name a colour."), gpt("Blue.")],
            "system": "Be brief.",
        },
        [BRIEF, *ONE_TURN],
    ),
    "conversations of roles": ({"conversations": TWO_TURNS, "system": ""}, TWO_TURNS),
    "prompt and completion": ({"prompt": "Name a colour.", "completion": "Blue."}, ONE_TURN),
    "prompt and completion of messages": ({"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]}, TWO_TURNS),
    "prompt and a completion of several turns": ({"prompt": TWO_TURNS[:1], "completion": TWO_TURNS[1:]}, TWO_TURNS),
    "Alpaca": (
        {"instruction": "Name a colour.", "input": "Not red.", "output": "Blue."},
        [user("Name a colour.\nNot red."), assistant("Blue.")],
    ),
    "Alpaca without an input": ({"instruction": "Name a colour.", "input": "", "output": "Blue."}, ONE_TURN),
    "Alpaca whole": (
        {
            "system": "Be brief.",
            "history": [["Name a colour.", "Blue."]],
            "instruction": "Another.",
            "input": None,
            "output": "Red.",
        },
        [BRIEF, *TWO_TURNS],
    ),
    "Alpaca with nothing before": (
        {"instruction": "Name a colour.", "output": "Blue.", "system": "", "history": []},
        ONE_TURN,
    ),
}

PROMPT = TWO_TURNS[:3]
PAIRS: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "text": ({"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Seven."}, ONE_TURN[:1]),
    "a prompt of messages": ({"prompt": PROMPT, "chosen": "Blue.", "rejected": "Seven."}, PROMPT),
    "messages, an explicit prompt of messages": (
        {"prompt": PROMPT, "chosen": [assistant("Blue.")], "rejected": [assistant("Seven.")]},
        PROMPT,
    ),
    "messages, an explicit prompt of text": (
        {"prompt": "Name a colour.", "chosen": [assistant("Blue.")], "rejected": [assistant("Seven.")]},
        ONE_TURN[:1],
    ),
    "messages, a prompt of text that they repeat": (
        {
            "prompt": "Name a colour.",
            "chosen": [user("Name a colour."), assistant("Blue.")],
            "rejected": [user("Name a colour."), assistant("Seven.")],
        },
        ONE_TURN[:1],
    ),
    "messages, a prompt that they repeat after a system message": (
        {
            "prompt": "Name a colour.",
            "chosen": [BRIEF, user("Name a colour."), assistant("Blue.")],
            "rejected": [BRIEF, user("Name a colour."), assistant("Seven.")],
        },
        [BRIEF, *ONE_TURN[:1]],
    ),
    "messages, an implicit prompt": (
        {"chosen": [*PROMPT, assistant("Blue.")], "rejected": [*PROMPT, assistant("Seven.")]},
        PROMPT,
    ),
    "ShareGPT, an implicit prompt": (
        {
            "chosen": [human("Name a colour."), gpt("Blue.")],
            "rejected": [human("Name a colour."), gpt("Seven.")],
        },
        ONE_TURN[:1],
    ),
}


def read(folder: Path, name: str, ending: str, *rows: dict[str, Any], checked: bool = True) -> Rows:
    """Rows of a file of their own. checked: without those that break a rule or are there twice."""
    path = folder / f"{name}{ending}"
    if ending == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pl.DataFrame(list(rows)).write_parquet(path)
    record = RECORD_TYPES[name]
    return check_rows(folder, [path], record)[0] if checked else read_rows(path, record)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("form", CHATS)
def test_a_chat_of_every_form_becomes_messages(form: str, ending: str, tmp_path: Path) -> None:
    row, messages = CHATS[form]
    rows = read(tmp_path, "chat", ending, row)
    assert (rows.frame["messages"].to_list(), rows.rejected) == ([messages], ())
    assert rows.ignored == frozenset()


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("form", PAIRS)
def test_a_preference_of_every_form_becomes_a_prompt_and_two_answers(form: str, ending: str, tmp_path: Path) -> None:
    row, prompt = PAIRS[form]
    rows = read(tmp_path, "preferences", ending, row)
    assert rows.rejected == ()
    assert rows.frame.select("prompt", "chosen", "rejected").to_dicts() == [
        {"prompt": prompt, "chosen": "Blue.", "rejected": "Seven."}
    ]


def test_forms_may_be_mixed_and_other_fields_are_reported(tmp_path: Path) -> None:
    rows = [row | {"source": "a forum"} for row, _ in CHATS.values()]
    lines = [*rows, {"messages": TWO_TURNS, "conversations": [human("not read")]}] * 30
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    found = read_rows(path, RECORD_TYPES["chat"])
    expected = [*(messages for _, messages in CHATS.values()), TWO_TURNS] * 30
    assert found.frame.sort(LINE)["messages"].to_list() == expected
    assert found.ignored == {"source", "conversations"}


def test_what_an_answer_holds_besides_its_text_is_reported(tmp_path: Path) -> None:
    calls = assistant("Blue.") | {"tool_calls": [{"id": "1"}]}
    row = {"prompt": "Name a colour.", "chosen": [calls], "rejected": [assistant("Seven.")]}
    assert read(tmp_path, "preferences", ".jsonl", row).ignored == {"chosen.tool_calls"}
    talk = {"conversations": [human("Name a colour."), gpt("Blue.") | {"weight": 1}]}
    assert read(tmp_path, "chat", ".jsonl", talk).ignored == {"messages.weight"}


UNKNOWN_ROLE = "messages has an unknown role (known: system, user, assistant)"
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a role of tools": (
        "chat",
        {"conversations": [human("q"), {"from": "function_call", "value": "f()"}, gpt("a")]},
        UNKNOWN_ROLE,
    ),
    "a role that is none": (
        "chat",
        {"messages": [user("q"), {"role": "critic", "content": "c"}, *ONE_TURN]},
        UNKNOWN_ROLE,
    ),
    "a talk that ends with a question": (
        "chat",
        {"conversations": [gpt("a"), human("q")]},
        "messages does not end with the assistant",
    ),
    "conversations of text": ("chat", {"conversations": ["q", "a"]}, "messages is text, not object"),
    "conversations that are none": ("chat", {"conversations": "q"}, "conversations is not a list of messages"),
    "two systems": (
        "chat",
        {"conversations": [system("x"), human("q"), gpt("a")], "system": "y"},
        "system differs from the system message in conversations",
    ),
    "a history of text": (
        "chat",
        {"instruction": "i", "output": "o", "history": ["q", "a"]},
        "history is not a list of [question, answer]",
    ),
    "a history of three": (
        "chat",
        {"instruction": "i", "output": "o", "history": [["q", "a", "b"]]},
        "history is not a list of [question, answer]",
    ),
    "two answers": ("chat", {"instruction": "i", "output": "o", "target": "t"}, "target differs from output"),
    "no answer": ("chat", {"instruction": "i", "system": "s"}, "messages is missing"),
    "a completion of numbers": (
        "chat",
        {"prompt": "q", "completion": 5},
        "prompt and completion are neither text nor messages",
    ),
    "preferences without a question in common": (
        "preferences",
        {"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]},
        "prompt is missing, and chosen and rejected do not begin with the same messages",
    ),
    "preferences of text without a prompt": (
        "preferences",
        {"chosen": "Human: a Assistant: x", "rejected": "Human: a Assistant: y"},
        "prompt is missing",
    ),
    "preferences that differ before the answer": (
        "preferences",
        {"chosen": TWO_TURNS, "rejected": [user("Name a colour."), assistant("Green."), user("Another.")]},
        "chosen is not the prompt and one answer of the assistant",
    ),
    "another prompt": (
        "preferences",
        {"prompt": "What?", "chosen": [*ONE_TURN], "rejected": [ONE_TURN[0], assistant("Seven.")]},
        "prompt is not how chosen and rejected begin",
    ),
    "the same answer twice": (
        "preferences",
        {"chosen": ONE_TURN, "rejected": ONE_TURN},
        "chosen and rejected are the same",
    ),
    "one of text, one of messages": (
        "preferences",
        {"prompt": "q", "chosen": "a", "rejected": [assistant("b")]},
        "rejected is list, not text",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_quarantined_with_its_reason(case: str, tmp_path: Path) -> None:
    name, row, reason = REFUSED[case]
    assert [one.reason for one in read(tmp_path, name, ".jsonl", row).rejected] == [reason]


@pytest.mark.parametrize(
    ("name", "row", "wanted"),
    [
        ("chat", {"question": "q", "answer": "a"}, {"messages": [user("…"), assistant("…")]}),
        ("preferences", {"chosen": "x", "rejected": "y"}, {"prompt": [user("…")], "chosen": "…", "rejected": "…"}),
        ("corpus", {"content": "x"}, {"text": "…"}),
    ],
)
def test_a_file_of_another_form_is_refused_with_the_form_that_is_wanted(
    name: str, row: dict[str, Any], wanted: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError) as raised:
        validate(tmp_path, tmp_path / "out", ValidateSettings(), chat_domain, [name])
    assert f"; a row is {json.dumps(wanted, ensure_ascii=False)}; each is in " in str(raised.value)


@pytest.mark.parametrize(("name", "method"), [("chat", "sft"), ("preferences", "dpo")])
def test_what_validation_keeps_of_every_form_can_be_trained_on(name: str, method: str, tmp_path: Path) -> None:
    forms = CHATS if name == "chat" else PAIRS
    records = read(tmp_path, name, ".jsonl", *(row for row, _ in forms.values()), checked=False).frame.to_dicts()
    assert len(records) == len(forms)
    tokenizer = train_tokenizer(["Name a colour. Blue. Another. Red. Seven. Be brief. Not red."], 300)
    found = load_method(method, tmp_path)
    examples = [conversation for record in records for conversation in found.conversations(record)]
    assert check_template(tokenizer, examples).passed
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    settings = found.settings.model_validate({"learning_rate": 0.01, "batch_tokens": 512, "seq_len": 256, "epochs": 3})
    model = new_decoder(config, seed=0)
    built = found.build(records, model, tokenizer, settings, Runtime(seed=0, threads=1), chat_domain)
    result = run_training(model, *built, settings, checkpoint_dir=None)
    assert 0 < result.loss < result.initial_loss


def test_fields_of_other_forms_that_hold_anything_at_all_cost_their_row_alone(tmp_path: Path) -> None:
    rng = random.Random(1)
    values: list[Any] = [None, 0, 1.5, True, "", "a", "b", [], {}, ["a", "b"], [["q", "a"]], [None], [[]]]
    values += [ONE_TURN, [human("q"), gpt("a")], [{"role": {}, "content": 1}], [{"from": [], "value": None}], PROMPT]
    kept, pair = 0, ("prompt", "completion", "chosen", "rejected")
    for name in ("chat", "preferences"):
        chat = ("messages", "conversations", "system", "history", "instruction", "input", "target", "output")
        fields = (*chat, *pair) if name == "chat" else pair
        rows = [{field: rng.choice(values) for field in fields if rng.random() < 0.5} for _ in range(3000)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found, source = check_rows(tmp_path, [path], RECORD_TYPES[name])
        assert len(found.frame) + len(found.rejected) == sum(source.rows) == 3000
        kept += len(found.frame)
    assert kept > 50
