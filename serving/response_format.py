"""OpenAI's `response_format`: the form that an answer must have, and the constraint that it puts on the engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from twinloop.serving.engine.grammar import ANY_OBJECT, Grammars
from twinloop.serving.engine.sampling import Constraint

MAX_DEPTH = 100
"""Objects and arrays within each other in JSON of clients that is gone through level by level."""
TOO_DEEP = f"is nested more than {MAX_DEPTH} levels deep"


def check_depth(data: Any) -> Any:
    """The data itself. Raises ValueError where it is nested deeper than MAX_DEPTH."""
    level = _nested([data])
    for _ in range(MAX_DEPTH):
        level = [each for holder in level for each in _nested(holder.values() if isinstance(holder, dict) else holder)]
    if level:
        raise ValueError(TOO_DEEP)
    return data


def _nested(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if isinstance(value, (dict, list))]


JsonSchemaData = Annotated[dict[str, Any], AfterValidator(check_depth)]


class _Form(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TextFormat(_Form):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(_Form):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(_Form):
    """A schema and its name. It is always kept to, also where `strict` is false."""

    name: str = Field(pattern="^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    definition: JsonSchemaData = Field(dict(ANY_OBJECT), alias="schema", description="JSON Schema, draft 2020-12")
    strict: bool | None = None


class JsonSchemaFormat(_Form):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


def schema_of(form: ResponseFormat | None) -> Mapping[str, Any] | None:
    """The JSON Schema that the answer must follow; None for text."""
    if isinstance(form, JsonSchemaFormat):
        return form.json_schema.definition
    return ANY_OBJECT if isinstance(form, JsonObjectFormat) else None


def constraint_of(form: ResponseFormat | None, grammars: Grammars) -> Constraint | None:
    """What holds an answer to its form; None for text. Raises GrammarError for a schema that cannot be enforced."""
    schema = schema_of(form)
    return None if schema is None else grammars.json_schema(schema)
