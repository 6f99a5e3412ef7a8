"""Schemas with any keyword of JSON Schema in any combination, made from a seed, for tests of structured output. Some
cannot be enforced and some cannot be met; an answer to any other ends, whatever the model."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from schemas import FORMATS, NAMES, PATTERNS, WORDS
from schemas import schema_of as plain_schema

Schema = dict[str, Any]
Maker = Callable[[random.Random, int], Schema]
OTHER_FORMATS = ["email", "hostname", "uri", "ipv6", "duration", "json-pointer", "regex", "no-such-format"]
OTHER_PATTERNS = [
    "a{2,5}b?",
    "^[^\\x00-\\x1f]{0,6}$",
    "^(?:a|b){1,4}$",
    "^\\S{1,5}$",
    "x|y{1,2}",
    "^(a)\\1$",
    "(?=a)a{1,3}",
]
TYPES = ["string", "number", "integer", "boolean", "null", "object", "array"]


def schema_of(seed: int) -> Schema:
    """Every second one has only keywords that go together."""
    chance = random.Random(f"wide {seed}")
    schema = plain_schema(seed) if seed % 4 == 0 else _value(chance, depth=chance.randint(1, 3))
    if chance.random() < 0.15:
        schema = schema | _annotations(chance)
    if chance.random() < 0.1:
        schema = {"$defs": {"own name": schema}, "$ref": "#/$defs/own%20name"}
    return schema if seed % 2 else schema | _any_keyword(chance)


def _value(chance: random.Random, depth: int) -> Schema:
    makers: list[Maker] = [_string, _number, _choice, _types]
    makers += [_object, _object, _array, _combined] if depth > 0 else []
    return chance.choice(makers)(chance, depth)


def _string(chance: random.Random, depth: int) -> Schema:
    longest = chance.randint(0, 9)
    schema: Schema = {"type": "string", "maxLength": longest}
    kind = chance.randrange(5)
    if kind == 0:
        return {"type": "string", "pattern": chance.choice(PATTERNS + OTHER_PATTERNS), "maxLength": 12}
    if kind == 1:
        return {"type": "string", "format": chance.choice(FORMATS + OTHER_FORMATS), "maxLength": 60}
    if kind == 2:
        return schema | {"minLength": chance.randint(0, longest + 1)}
    return schema | {"contentEncoding": "base64"} if kind == 3 else schema


def _number(chance: random.Random, depth: int) -> Schema:
    low, width = chance.choice([-3, 0, 0.5, 7, 1e6, -1e-3]), chance.choice([0, 0.25, 4, 1000])
    schema: Schema = {"type": chance.choice(["number", "integer", ["integer", "null"]])}
    schema[chance.choice(["minimum", "exclusiveMinimum"])] = low
    schema[chance.choice(["maximum", "exclusiveMaximum"])] = low + width
    return schema | ({"multipleOf": chance.choice([1, 3, 0.5, 0.01, 10])} if chance.random() < 0.3 else {})


def _choice(chance: random.Random, depth: int) -> Schema:
    values = [
        *WORDS,
        0,
        -1.5,
        10**20,
        1e-7,
        True,
        None,
        [],
        {},
        [1, [2]],
        {"a": {"b": None}},
        "😀",
        "\x00\x1f",
    ]
    some = chance.sample(values, chance.randint(1, 4))
    schema: Schema = {"const": some[0]} if chance.random() < 0.4 else {"enum": some}
    return schema | ({"type": chance.choice(TYPES)} if chance.random() < 0.2 else {})


def _types(chance: random.Random, depth: int) -> Schema:
    return {"type": chance.sample(["boolean", "null"], chance.randint(1, 2))}


def _object(chance: random.Random, depth: int) -> Schema:
    names = chance.sample(NAMES, chance.randint(0, 4))
    schema: Schema = {
        "type": "object",
        "properties": {name: _value(chance, depth - 1) for name in names},
        "required": chance.sample([*names, "other"], chance.randint(0, len(names))),
        "additionalProperties": chance.choice([False, False, {"type": "null"}]),
    }
    if chance.random() < 0.15:
        schema["patternProperties"] = {chance.choice(["^x{1,3}$", "^größe$", "a"]): {"type": "boolean"}}
    if schema["additionalProperties"] or "patternProperties" in schema:
        schema["maxProperties"] = len(names) + 2
    if chance.random() < 0.1:
        schema["minProperties"] = chance.randint(0, 3)
    return schema


def _array(chance: random.Random, depth: int) -> Schema:
    least = chance.randint(0, 2)
    schema: Schema = {"type": "array", "minItems": least, "maxItems": least + chance.randint(0, 2)}
    if chance.random() < 0.4:
        schema["prefixItems"] = [_value(chance, 0) for _ in range(chance.randint(1, 3))]
    return schema | {"items": chance.choice([False, _value(chance, depth - 1), _value(chance, depth - 1)])}


def _combined(chance: random.Random, depth: int) -> Schema:
    several = [_value(chance, depth - 1) for _ in range(chance.randint(1, 3))]
    kind = chance.choice(["anyOf", "anyOf", "oneOf", "allOf"])
    if kind == "allOf" and chance.random() < 0.7:
        bounds = [{"minimum": chance.randint(0, 5)}, {"maximum": chance.randint(6, 50)}, {"type": "integer"}]
        return {"allOf": chance.sample(bounds, 3)}
    return {kind: several}


def _annotations(chance: random.Random) -> Schema:
    return {"title": "a title", "description": 'of "it"', "default": 3, "examples": [{}], "$comment": "x",
            "$schema": "https://json-schema.org/draft/2020-12/schema", "deprecated": True}  # fmt: skip


def _any_keyword(chance: random.Random) -> Schema:
    """One that may not suit the schema, may not be enforceable, or does not exist."""
    name = chance.choice(NAMES)
    keywords: list[Schema] = [
        {"not": {"type": "string"}}, {"uniqueItems": True}, {"contains": {"type": "null"}}, {"minContains": 1},
        {"if": {"type": "object"}, "then": {"maxProperties": 1}}, {"else": False}, {"propertyNames": {"maxLength": 3}},
        {"dependentRequired": {name: ["a"]}}, {"dependentSchemas": {name: {"required": ["a"]}}}, {"maxLength": 2},
        {"unevaluatedProperties": False}, {"unevaluatedItems": False}, {"$anchor": "here"}, {"additionalItems": False},
        {"minProperties": 1}, {"maxProperties": 1}, {"minItems": 1}, {"pattern": "^a$"}, {"nullable": True},
        {"readOnly": True}, {"no such keyword": 1}, {"$id": "https://shop.example/x"}, {"$ref": "#"}, {"$ref": "other"},
        {"type": "object"}, {"const": {}}, {"enum": []}, {"anyOf": []}, {"required": [name]}, {"format": "date"},
    ]  # fmt: skip
    return chance.choice(keywords)
