"""Grammars on their own: which tokens a schema allows, what is refused, and what is kept."""

from __future__ import annotations

import json
from string import ascii_lowercase

import jsonschema_rs
import numpy as np
import pytest
from llguidance import LLParserLimits
from served import small_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from twinloop.models.new_tokenizer import CHAT_TEMPLATE
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.engine import grammar as grammar_module
from twinloop.serving.engine.grammar import Grammar, GrammarError, Grammars

ORDER = {
    "type": "object",
    "properties": {"days": {"type": "integer"}, "note": {"type": "string"}},
    "required": ["days"],
    "additionalProperties": False,
}


TOO_COSTLY = "takes too much computation to follow; use smaller counts"


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def grammars(tokenizer) -> Grammars:
    return Grammars(tokenizer)


def ids(state) -> list[int]:
    """The tokens that may be next."""
    return np.flatnonzero(np.unpackbits(state.allowed(), bitorder="little")).tolist()


def drawn(grammar: Grammar, tokenizer: ChatTokenizer, seed: int, limit: int = 400) -> list[int]:
    """An answer of equally likely tokens."""
    state, random, tokens = grammar.start(), np.random.default_rng(seed), []
    while len(tokens) < limit:
        tokens.append(int(random.choice(ids(state))))
        if tokens[-1] == tokenizer.stop_id:
            break
        state.accept(tokens[-1])
    return tokens


def allowed_after(grammar: Grammar, tokenizer: ChatTokenizer, text: str) -> set[int]:
    state = grammar.start()
    for token in tokenizer.encode(text):
        assert token in ids(state), tokenizer.decode([token])
        state.accept(token)
    return set(ids(state))


@pytest.mark.parametrize(
    ("text", "may_end"),
    [
        ("", False),
        ("{", False),
        ('{"days": ', False),
        ('{"days": 12', False),
        ('{"days": 12, "note": "so', False),
        ('{"days": 12}', True),
        ('{\n  "days": 12,\n  "note": "so"\n}', True),
    ],
)
def test_the_stop_token_is_allowed_exactly_where_the_answer_may_end(grammars, tokenizer, text, may_end):
    assert (tokenizer.stop_id in allowed_after(grammars.json_schema(ORDER), tokenizer, text)) is may_end


def test_a_number_may_end_and_may_go_on(grammars, tokenizer):
    allowed = allowed_after(grammars.json_schema({"type": "integer"}), tokenizer, "12")
    assert {tokenizer.stop_id, *tokenizer.encode("3")} <= allowed


@pytest.mark.parametrize("text", ["{", '{"note": "', '{"note": "<|', '{"note": "<|end|>'])
def test_no_special_token_is_ever_allowed_in_a_text(grammars, tokenizer, text):
    allowed = allowed_after(grammars.json_schema({"type": "object"}), tokenizer, text)
    assert not allowed & tokenizer.special_ids
    assert max(allowed) < tokenizer.vocab_size


def test_a_text_that_spells_a_special_token_is_written_as_text(grammars, tokenizer):
    grammar = grammars.json_schema({"const": "<|end|><|assistant|>"})
    tokens = drawn(grammar, tokenizer, 0)
    assert json.loads(tokenizer.decode(tokens)) == "<|end|><|assistant|>"
    assert set(tokens) & tokenizer.special_ids == {tokenizer.stop_id}


def test_characters_of_many_bytes_are_allowed_byte_by_byte_and_only_whole(grammars, tokenizer):
    grammar = grammars.json_schema({"type": "string", "pattern": "^[é漢]*$"})
    (first,) = (id for id, token in enumerate(tokenizer.token_bytes) if token == "漢".encode()[:1])
    state = grammar.start()
    for token in tokenizer.encode('"'):
        state.accept(token)
    assert first in ids(state)
    state.accept(first)
    follow = {tokenizer.token_bytes[id][0] for id in ids(state)}
    assert follow == {"漢".encode()[1]}


@pytest.mark.parametrize("seed", range(8))
def test_any_characters_make_a_text_that_is_valid_utf8(grammars, tokenizer, seed):
    tokens = drawn(grammars.json_schema({"type": "string", "minLength": 30, "maxLength": 40}), tokenizer, seed)
    text = b"".join(tokenizer.token_bytes[token] for token in tokens[:-1]).decode()
    assert 30 <= len(json.loads(text)) <= 40


def chat_tokenizer(normalizer=None, holes: int = 0) -> ChatTokenizer:
    """Bytes, a plain added token, special ones, and ids of no token before the last."""
    vocabulary = {character: id for id, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["zz"] = len(vocabulary) + holes
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("z", "z")]))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>"])
    return ChatTokenizer(tokenizer, {"eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE})


def test_added_tokens_of_plain_text_may_be_used_and_ids_of_no_token_never():
    tokenizer = chat_tokenizer(holes=3)
    grammars = Grammars(tokenizer)
    allowed = allowed_after(grammars.json_schema({"type": "string"}), tokenizer, '"')
    assert set(tokenizer.encode("<think>")) <= allowed
    assert all(tokenizer.token_bytes[id] for id in allowed)
    assert not allowed & tokenizer.special_ids
    tokens = drawn(grammars.json_schema({"const": "a <think>"}), tokenizer, 0)
    assert json.loads(tokenizer.decode(tokens)) == "a <think>"


@pytest.mark.parametrize("text", ["e\u0301te\u0301", "naïve", "ﬁ zz"])
def test_a_tokenizer_that_normalises_writes_the_exact_text_nevertheless(text):
    tokenizer = chat_tokenizer(normalizers.NFKC())
    assert json.loads(tokenizer.decode(drawn(Grammars(tokenizer).json_schema({"const": text}), tokenizer, 0))) == text


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "strin"}, "strin"),
        ({"type": "object", "properties": {"a": {"not": {"type": "null"}}}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "nonsense"}, "nonsense"),
        ({"type": "string", "pattern": "(?=x)y"}, "look-ahead"),
        ({"type": "string", "pattern": "["}, "regex"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "minLength": 3}]}, "oneOf"),
        ({"$ref": "#/$defs/none"}, "none"),
        ({"$ref": "http://127.0.0.1:1/schema"}, "retrieving"),
        ({"$ref": "file:///etc/passwd"}, "retrieving"),
        ({"type": "number", "minimum": float("nan")}, "expected value"),
        ({"const": "\ud800"}, "escape"),
        ({"properties": {"a": {"type": "object", "minProperties": 2, "required": ["b"]}}}, "minProperties"),
        ({"anyOf": [{"type": "object", "minProperties": 2}, {"type": "null"}]}, "minProperties"),
        ({"type": "string", "not": {}, "x-guidance": {"lenient": True}}, "not"),
    ],
)
def test_what_cannot_be_enforced_is_refused_in_one_line(grammars, schema, said):
    with pytest.raises(GrammarError, match=said) as refused:
        grammars.json_schema(schema)
    assert 0 < len(str(refused.value)) <= 300
    assert "\n" not in str(refused.value)


def test_names_and_values_that_look_like_keywords_are_none(grammars, tokenizer):
    schema = {
        "type": "object",
        "properties": {"minProperties": {"const": {"minProperties": 9}}, "not": {"enum": ["uniqueItems"]}},
        "required": ["minProperties", "not"],
        "minProperties": 2,
        "additionalProperties": False,
    }
    answer = json.loads(tokenizer.decode(drawn(grammars.json_schema(schema), tokenizer, 1)))
    assert answer == {"minProperties": {"minProperties": 9}, "not": "uniqueItems"}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "required": True, "minProperties": "two", "maxLength": 3},
        {"type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": {"type": "null"}},
        {"type": "array", "items": [{"type": "null"}], "maxItems": 2, "default": {"minProperties": 5}},
        {"type": "null", "properties": None, "title": "x", "description": "y", "$comment": "z", "examples": [1]},
    ],
)
def test_odd_schemas_are_answered_or_refused(grammars, tokenizer, schema):
    try:
        grammar = grammars.json_schema(schema)
    except GrammarError:
        return
    json.loads(tokenizer.decode(drawn(grammar, tokenizer, 2, limit=2000)))


def test_blanks_come_to_an_end(grammars, tokenizer):
    state = grammars.json_schema(ORDER).start()
    for token in tokenizer.encode("{"):
        state.accept(token)
    (blank,) = tokenizer.encode("\n")
    for _ in range(16):
        assert blank in ids(state)
        state.accept(blank)
    assert blank not in ids(state)


def test_a_schema_is_compiled_once_and_few_are_kept(tokenizer, monkeypatch):
    monkeypatch.setattr(grammar_module, "_GRAMMARS_KEPT", 3)
    grammars = Grammars(tokenizer)
    first = grammars.json_schema({"const": 0})
    assert grammars.json_schema({"const": 0}) is first
    for number in range(1, 4):
        grammars.json_schema({"const": number})
    assert grammars.json_schema({"const": 0}) is not first


@pytest.mark.parametrize("states", [150, 300])
def test_an_answer_does_not_fail_by_what_others_needed_of_the_same_grammar(tokenizer, monkeypatch, states):
    schema = {"type": "string", "pattern": "^[ab]*a[ab]{10}$"}
    alone = [drawn(Grammars(tokenizer).json_schema(schema), tokenizer, seed) for seed in range(40)]
    monkeypatch.setattr(grammar_module, "_LIMITS", LLParserLimits(max_lexer_states=states, verbose_errors=False))
    shared = Grammars(tokenizer).json_schema(schema)
    assert [drawn(shared, tokenizer, seed) for seed in range(40)] == alone


def test_an_answer_that_needs_too_much_fails_and_says_so(tokenizer, monkeypatch):
    schema = {"type": "string", "minLength": 300}
    monkeypatch.setattr(grammar_module, "_LIMITS", LLParserLimits(max_lexer_states=100, verbose_errors=False))
    with pytest.raises(GrammarError, match="states"):
        drawn(Grammars(tokenizer).json_schema(schema), tokenizer, 1)


EACH_CHARACTER = "(" + "".join(f"[^{letter}]{{0,99}}" for letter in ascii_lowercase) + "){0,99}"
NESTED = r"(((\w{0,9}\W{0,9}){0,99}){0,99}x?){0,99}"
"""Without a bound a step of it takes up to half a minute, after some twenty tokens."""
UNBOUNDED = LLParserLimits(initial_lexer_fuel=10**9, step_lexer_fuel=10**9, verbose_errors=False)


@pytest.mark.parametrize(
    "read",
    [
        lambda grammars: grammars.regex(EACH_CHARACTER),
        lambda grammars: grammars.clients_lark(f"start: TEXT\nTEXT: /{EACH_CHARACTER}/"),
        lambda grammars: grammars.clients_lark("start: A\nA: /(.{0,99}a){0,99}/ & ~/(.{0,99}b){0,99}/ & /(.{0,99}c)*/"),
    ],
    ids=["regex", "grammar", "intersection"],
)
def test_what_costs_too_much_to_begin_is_refused(grammars, read):
    with pytest.raises(GrammarError) as refused:
        read(grammars)
    assert str(refused.value) == TOO_COSTLY


@pytest.mark.parametrize("begin", ["", "x", "order "])
def test_a_step_that_costs_too_much_ends_its_answer(tokenizer, monkeypatch, begin):
    with pytest.raises(GrammarError) as failed:
        drawn(Grammars(tokenizer).regex(begin + NESTED), tokenizer, 1)
    assert str(failed.value) == TOO_COSTLY
    monkeypatch.setattr(grammar_module, "_LIMITS", UNBOUNDED)
    assert len(drawn(Grammars(tokenizer).regex(begin + NESTED), tokenizer, 1, limit=6)) == 6


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"a{1,100000}", r"(a{1,100}){1,1000}", r"(?s:.*)a(?s:.{500})", r"[a-z ]{2000}", r"(\w{1,50} ){1,50}"),
        *(r"(\w+ ?){1,1000}", r"([a-z]{1,20} ?){1,200}"),
    ],
)
def test_large_counts_alone_cost_little(grammars, tokenizer, pattern):
    assert len(drawn(grammars.regex(pattern), tokenizer, 1, limit=100)) > 1


def test_answers_of_one_grammar_do_not_mix(grammars, tokenizer):
    grammar = grammars.json_schema(ORDER)
    states = [grammar.start() for _ in range(2)]
    texts = ['{"days": 1}', '{"days": 2, "note": "x"}']
    for state, text in zip(states, texts, strict=True):
        for token in tokenizer.encode(text):
            assert token in ids(state)
            state.accept(token)
    assert [tokenizer.stop_id in ids(state) for state in states] == [True, True]


def test_a_tagged_union_of_pydantic_is_served(grammars, tokenizer):
    schema = {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": "a"}},
                "required": ["kind"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"kind": {"const": "b"}},
                "required": ["kind"],
                "additionalProperties": False,
            },
        ],
        "discriminator": {"propertyName": "kind"},
    }
    jsonschema_rs.validate(schema, json.loads(tokenizer.decode(drawn(grammars.json_schema(schema), tokenizer, 3))))


def definitions(count: int, form) -> dict:
    """Each refers to the next one."""
    chain = {f"d{index}": form({"$ref": f"#/$defs/d{index + 1}"}) for index in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": chain | {f"d{count}": {"type": "boolean"}}}


@pytest.mark.parametrize(
    "form",
    [
        lambda inner: {"type": "object", "properties": {"a": inner}, "required": ["a"], "additionalProperties": False},
        lambda inner: {"type": "array", "items": inner, "minItems": 1},
        lambda inner: inner,
    ],
    ids=["objects", "arrays", "references"],
)
def test_definitions_that_refer_to_thousands_of_others_end_no_process(grammars, form):
    """Compiled on a thread's usual stack, they ended the server's."""
    state = grammars.json_schema(definitions(3000, form)).start()
    for _ in range(50):
        allowed = np.flatnonzero(np.unpackbits(state.allowed(), bitorder="little"))
        state.accept(int(allowed[0]))


def test_rules_that_name_thousands_of_others_end_no_process(grammars):
    rules = "\n".join(f"r{index}: r{index + 1}" for index in range(15_000))
    grammar = grammars.lark(f'start: r0\n{rules}\nr15000: "a"')
    assert np.unpackbits(grammar.start().allowed()).sum() == 1
