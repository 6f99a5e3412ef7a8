"""A thousand schemas of every kind: each is answered to a valid end, or refused by name before anything is written."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from served import HELLO, make_app, running, small_tokenizer
from test_structured import answer_schemas, form_of, small_engine
from wide_schemas import schema_of

from twinloop.serving.engine.grammar import GrammarError, Grammars
from twinloop.serving.engine.scheduler import Scheduler

SEEDS = {"fast": range(50), "slow": range(50, 1000)}
PARTS = [pytest.param("fast"), pytest.param("slow", marks=pytest.mark.slow)]


@pytest.mark.parametrize("part", PARTS)
def test_each_schema_is_answered_to_a_valid_end_or_refused_by_name(part: str) -> None:
    tokenizer, schemas = small_tokenizer(), {seed: schema_of(seed) for seed in SEEDS[part]}
    scheduler = Scheduler(small_engine(tokenizer, slots=8), queue_size=len(schemas))
    answered, refused = answer_schemas(schemas, scheduler, tokenizer, Grammars(tokenizer))
    scheduler.close()
    assert answered >= len(schemas) // 2
    assert all(refused)


DEEP: Any = {"type": "null"}
for _ in range(900):
    DEEP = {"type": "array", "items": DEEP}

NUMBERS = [
    {"type": "integer", "maximum": -(2**63), "minimum": -(2**64)},  # llguidance 1.9 dies of it
    {"type": "integer", "const": -(2**63 - 2)},
    {"type": "integer", "enum": [1, 2**53 + 1]},
    {"type": "number", "minimum": -1e300, "maximum": -1e300},
    {"properties": {"a": {"anyOf": [{"type": "null"}, {"multipleOf": 10**20}]}}},
]


@pytest.mark.parametrize("schema", NUMBERS)
def test_a_number_that_cannot_be_held_exactly_is_refused(schema: dict[str, Any]) -> None:
    grammars = Grammars(small_tokenizer())
    with pytest.raises(GrammarError, match="a number beyond 9007199254740992 in"):
        grammars.json_schema(schema)
    edge = {"type": "integer", "minimum": -(2**53), "maximum": 2**53}
    grammars.json_schema({"anyOf": [edge, {"const": -(2**53)}]})
    grammars.json_schema({"type": "string", "description": str(2**70), "default": 2**70})


def test_what_ends_a_process_ends_none_of_ours(tmp_path) -> None:
    tokenizer = small_tokenizer()
    scheduler = Scheduler(small_engine(tokenizer, slots=1))
    with running(make_app(tmp_path, scheduler, tokenizer)) as client:
        for schema in (NUMBERS[0], DEEP):
            for more in (
                {"response_format": form_of(schema)},
                {
                    "tools": [
                        {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": schema}}}}
                    ]
                },
            ):
                refused = client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1, **more})
                assert refused.status_code in (200, 400), refused.text
    scheduler.close(drain=False, timeout_s=10)


@pytest.mark.parametrize("length", [10, 200])
def test_a_schema_that_refers_to_itself_in_a_circle_is_refused_or_answered(length: int) -> None:
    """In a process of its own: what is tried here must not end."""
    program = f"""
import sys
sys.path.insert(0, "tests/serving")
from served import small_tokenizer
from twinloop.serving.engine.grammar import GrammarError, Grammars
grammars = Grammars(small_tokenizer())
circle = {{str(each): {{"$ref": f"#/$defs/{{(each + 1) % {length}}}"}} for each in range({length})}}
itself = [{{"$ref": "#"}}]
for schema in ({{"$defs": circle, "$ref": "#/$defs/0"}}, {{"allOf": itself}}, {{"anyOf": itself}}):
    try:
        grammars.json_schema(schema)
    except GrammarError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
