"""Schemas of many forms for tests of structured output, made from a seed, each with an end that any model reaches."""

from __future__ import annotations

import random
from typing import Any

NAMES = ["id", "reason", "window_days", "größe", "is late", 'quote"d', "back\\slash", "漢字", "<|end|>", "a"]
WORDS = ["damaged", "late", "", "naïve ☕", '"', "\\n", "<|assistant|>", "14 days"]
PATTERNS = ["^P-[0-9]{1,3}$", "^(yes|no)$", "^[A-F]{2,4}x?$", '^ä{1,3}[^a-z"]$', "^\\d{4}-\\w+$"]
FORMATS = ["date", "time", "date-time", "uuid", "ipv4"]

Schema = dict[str, Any]


def schema_of(seed: int) -> Schema:
    """An object, most of them nested; every fifth one refers to definitions of its own."""
    chance = random.Random(seed)
    if seed % 5:
        return _object(chance, depth=2)
    schema = _object(chance, depth=1)
    shared = {"item": _value(chance, depth=1), "tree": _tree()}
    schema["$defs"] = shared
    schema["properties"] |= {"item": {"$ref": "#/$defs/item"}, "tree": {"$ref": "#/$defs/tree"}}
    schema["required"] = [*schema["required"], "item", "tree"]
    if "maxProperties" in schema:
        schema["maxProperties"] += 2
    return schema


def _tree() -> Schema:
    """Recursive."""
    children = {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1}
    properties = {"label": {"enum": WORDS}, "children": children}
    return {"type": "object", "properties": properties, "required": ["label"], "additionalProperties": False}


def _value(chance: random.Random, depth: int) -> Schema:
    makers = [_string, _number, _integer, _enum, _plain]
    makers += [_object, _array, _any_of] if depth > 0 else []
    return chance.choice(makers)(chance, depth)


def _object(chance: random.Random, depth: int) -> Schema:
    names = chance.sample(NAMES, chance.randint(1, 4))
    schema: Schema = {
        "type": "object",
        "properties": {name: _value(chance, depth - 1) for name in names},
        "required": names[: chance.randint(0, len(names))],
    }
    further = chance.choice([False, False, {"type": "boolean"}, {"type": "integer", "minimum": 0, "maximum": 99}])
    schema["additionalProperties"] = further
    if further:
        schema["required"] = names
        schema["maxProperties"] = len(names) + 1
    return schema


def _array(chance: random.Random, depth: int) -> Schema:
    least = chance.randint(0, 2)
    schema: Schema = {"type": "array", "minItems": least, "maxItems": least + chance.randint(0, 2)}
    if chance.random() < 0.3:
        schema["prefixItems"] = [_value(chance, 0), _value(chance, 0)]
    return schema | {"items": _value(chance, depth - 1)}


def _any_of(chance: random.Random, depth: int) -> Schema:
    return {"anyOf": [_value(chance, depth - 1) for _ in range(chance.randint(2, 3))]}


def _string(chance: random.Random, depth: int) -> Schema:
    kind = chance.randrange(3)
    if kind == 0:
        return {"type": "string", "pattern": chance.choice(PATTERNS)}
    if kind == 1:
        return {"type": "string", "format": chance.choice(FORMATS)}
    least = chance.randint(0, 4)
    return {"type": "string", "minLength": least, "maxLength": least + chance.randint(0, 12)}


def _number(chance: random.Random, depth: int) -> Schema:
    low = chance.randint(-20, 20) / 4
    return {"type": "number", chance.choice(["minimum", "exclusiveMinimum"]): low, "maximum": low + 2.5}


def _integer(chance: random.Random, depth: int) -> Schema:
    low = chance.randint(-200, 200)
    schema: Schema = {"type": "integer", "minimum": low, "exclusiveMaximum": low + chance.randint(20, 2000)}
    return schema | ({"multipleOf": 5} if chance.random() < 0.3 else {})


def _enum(chance: random.Random, depth: int) -> Schema:
    choices = chance.sample([*WORDS, 7, -0.5, None, True, {"a": [1]}], 3)
    return {"const": choices[0]} if chance.random() < 0.3 else {"enum": choices}


def _plain(chance: random.Random, depth: int) -> Schema:
    return {"type": chance.choice(["boolean", "null", ["boolean", "null"]])}
