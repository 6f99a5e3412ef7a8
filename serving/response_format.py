"""OpenAI's `response_format` and vLLM's `structured_outputs`: the form that an answer must have, and the constraint
that it puts on the engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from twinloop.serving.engine.grammar import ANY_OBJECT, Grammar, GrammarError, Grammars
from twinloop.serving.engine.sampling import Constraint
from twinloop.serving.sampling_fields import refused

OUTPUTS = "structured_outputs"

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


def _describe_one(schema: dict[str, Any]) -> None:
    """Say that there is one of the fields."""
    forms = {name: {**form, "anyOf": form["anyOf"][:1]} for name, form in schema.pop("properties").items()}
    schema["oneOf"] = [
        {"type": "object", "properties": {name: form}, "required": [name], "additionalProperties": False}
        for name, form in forms.items()
    ]
    del schema["type"], schema["additionalProperties"]


class StructuredOutputs(_Form):
    """vLLM's, one of them: what the whole answer is."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, json_schema_extra=_describe_one)

    definition: JsonSchemaData | None = Field(None, alias="json", description="JSON Schema, draft 2020-12")
    json_object: Literal[True] | None = None
    regex: str | None = Field(None, description="in the syntax of Rust's `regex`: no look-around, no back-references")
    choice: list[str] | None = Field(None, min_length=1)
    grammar: str | None = Field(None, description="llguidance's form of Lark; `start` is the whole answer")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(getattr(self, name) is not None for name in type(self).model_fields) != 1:
            raise ValueError("must have one of json, json_object, regex, choice and grammar")
        return self

    def constraint(self, grammars: Grammars) -> Grammar:
        """Raises GrammarError for what cannot be enforced."""
        if self.regex is not None:
            return grammars.regex(self.regex)
        if self.grammar is not None:
            return grammars.clients_lark(self.grammar)
        if self.choice is not None:
            return grammars.choice(self.choice)
        return grammars.json_schema(ANY_OBJECT if self.definition is None else self.definition)


class TextFormFields(BaseModel):
    """The part of a request that says what form its answer's text has."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def form_param(self) -> str:
        """The parameter that says so."""
        return "response_format" if self.structured_outputs is None else OUTPUTS


def schema_of(form: ResponseFormat | None) -> Mapping[str, Any] | None:
    """The JSON Schema that the answer must follow; None for text."""
    if isinstance(form, JsonSchemaFormat):
        return form.json_schema.definition
    return ANY_OBJECT if isinstance(form, JsonObjectFormat) else None


def constraint_of(asked: TextFormFields, grammars: Grammars) -> Constraint | None:
    """What holds an answer to its form; None for text. Raises GrammarError for a `response_format` that cannot be
    enforced, and ApiError for `structured_outputs` that cannot, or where both ask for a form."""
    schema, outputs = schema_of(asked.response_format), asked.structured_outputs
    if outputs is None:
        return None if schema is None else grammars.json_schema(schema)
    if schema is not None:
        raise refused(OUTPUTS, "response_format asks for a form too; ask for one of both")
    try:
        return outputs.constraint(grammars)
    except GrammarError as error:
        raise refused(OUTPUTS, str(error)) from None
