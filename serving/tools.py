"""OpenAI's `tools`: what an answer may call, and the constraint that holds its calls to their schemas."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from twinloop.common.errors import UserError
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.models.tool_calls import CallForm, read_call_form, takes_tools
from twinloop.models.tool_messages import CALL_ID_LENGTH
from twinloop.serving.engine.grammar import GrammarError, Grammars, json_rule
from twinloop.serving.engine.sampling import Constraint
from twinloop.serving.response_format import OUTPUTS, JsonSchemaData, TextFormFields, schema_of
from twinloop.serving.sampling_fields import refused

MAX_TOOLS = 128

Name = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$", description="1 to 64 letters, digits, _ or -")]


class _Fields(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FunctionDefinition(_Fields):
    """What a tool does. Its arguments are always held to `parameters`, also where `strict` is false."""

    name: Name
    description: str | None = None
    parameters: JsonSchemaData | None = Field(None, description="JSON Schema of an object; without it, an empty one")
    strict: bool | None = None


class Tool(_Fields):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(_Fields):
    name: Name


class NamedTool(_Fields):
    """The tool that has to be called."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(_Fields):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedToolChoice(_Fields):
    """`auto` or `required`, of some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = (
    Literal["none", "auto", "required"]
    | Annotated[NamedTool | AllowedToolChoice, Field(discriminator="type")]
)  # fmt: skip

Mode = Literal["none", "auto", "required"]


class FormFields(TextFormFields):
    """The part of a request that says what form its answer has, and what it may call."""

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None


class ToolSupport:
    """What a model's chat template says of tools, read with the first request that has some."""

    def __init__(self, tokenizer: ChatTokenizer):
        self._tokenizer = tokenizer

    def require(self) -> CallForm:
        """Raises ApiError where tools cannot be served."""
        form = self._form
        if isinstance(form, str):
            raise refused("tools", form)
        return form

    @cached_property
    def _form(self) -> CallForm | str:
        """The form of calls, or why there is none."""
        if not takes_tools(self._tokenizer):
            return "the chat template of this model has no tools; say in a message what it may answer with"
        try:
            return read_call_form(self._tokenizer)
        except UserError as error:
            return f"how this model writes a call cannot be read from its chat template: {error}"


@dataclass(frozen=True)
class ToolUse:
    """The tools of one request. anchored: calls can only be the whole of an answer, with no text before them.
    text_param: the parameter that holds an answer without calls to its form."""

    form: CallForm
    prompt_tools: Sequence[Mapping[str, Any]]
    constraint: Constraint
    may_call: bool
    anchored: bool
    text_param: str


def tool_use(asked: FormFields, support: ToolSupport, grammars: Grammars) -> ToolUse | None:
    """What a request's tools ask for; None where it has none. Raises ApiError for what cannot be served, GrammarError
    for a `response_format` beside the tools that cannot be enforced."""
    tools, choice = asked.tools, asked.tool_choice
    if not tools:
        if not isinstance(choice, str | None) or choice == "required":
            raise refused("tool_choice", "cannot be kept to without tools")
        return None
    form = support.require()
    _check(tools)
    mode, names = _chosen(tools, choice)
    answer_schema = _answer_schema(asked, mode, form, grammars)
    anchored = answer_schema is not None or not form.after_text
    begin = _beginning(form, grammars, after_text=form.text_first if mode == "required" else not anchored)
    start = {"none": "text", "required": f"{begin} calls", "auto": f"text | {begin} calls"}[mode]
    called = [tool.function for tool in tools if mode != "none" and tool.function.name in names]
    try:
        text = _text_rules(form, anchored, grammars) if answer_schema is None else f"text: {json_rule(answer_schema)}\n"
        calls = _calls_rules(form, called, grammars, several=asked.parallel_tool_calls is not False)
        constraint = grammars.lark(f"start: {start}\n{text}{calls}")
    except GrammarError as error:
        _name_refused(tools, grammars)
        raise refused("tools", str(error)) from None
    return ToolUse(
        form,
        prompt_tools(tools),
        constraint,
        may_call=mode != "none",
        anchored=anchored,
        text_param="tools" if answer_schema is None else "response_format",
    )


def _answer_schema(asked: FormFields, mode: Mode, form: CallForm, grammars: Grammars) -> Mapping[str, Any] | None:
    """The schema of an answer that calls nothing; None where it is text, or there is no such answer."""
    schema = schema_of(asked.response_format)
    if asked.structured_outputs is not None:
        raise refused(OUTPUTS, "cannot be kept to beside tools; ask for one of both, or for a response_format")
    if schema is not None:
        grammars.json_schema(schema)  # refuses it by its own name
        if mode == "auto" and form.trigger.lstrip("[")[:1] in ("", "{", '"'):
            raise refused("response_format", "cannot be told from this model's calls of tools; ask for one of both")
    return None if mode == "required" else schema


def _check(tools: Sequence[Tool]) -> None:
    names: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.function.name in names:
            raise refused(f"tools.{index}.function.name", "another tool has this name")
        names.add(tool.function.name)
        if (tool.function.parameters or {}).get("type", "object") != "object":
            raise refused(f"tools.{index}.function.parameters", "must describe an object")


def _chosen(tools: Sequence[Tool], choice: ToolChoice | None) -> tuple[Mode, list[str]]:
    """Whether something must be called, and what may be."""
    known = [tool.function.name for tool in tools]
    if isinstance(choice, NamedTool):
        mode: Mode = "required"
        named = {"tool_choice.function.name": choice.function.name}
    elif isinstance(choice, AllowedToolChoice):
        mode = choice.allowed_tools.mode
        allowed = enumerate(choice.allowed_tools.tools)
        named = {
            f"tool_choice.allowed_tools.tools.{index}.function.name": each.function.name for index, each in allowed
        }
    else:
        return choice or "auto", known
    for path, name in named.items():
        if name not in known:
            raise refused(path, "is not the name of one of the tools")
    return mode, list(dict.fromkeys(named.values()))


def _name_refused(tools: Sequence[Tool], grammars: Grammars) -> None:
    """Raise ApiError for the first of the tools whose arguments cannot be held to their schema."""
    for index, tool in enumerate(tools):
        try:
            grammars.json_schema(_schema(tool.function))
        except GrammarError as error:
            raise refused(f"tools.{index}.function.parameters", str(error)) from None


def _schema(function: FunctionDefinition) -> dict[str, Any]:
    """The schema of a tool's arguments, which are an object."""
    if not function.parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **function.parameters}


def prompt_tools(tools: Sequence[Tool]) -> list[Mapping[str, Any]]:
    """Tools as the chat template takes them."""
    return [_prompt_tool(tool.function) for tool in tools]


def _prompt_tool(function: FunctionDefinition) -> dict[str, Any]:
    description = {} if function.description is None else {"description": function.description}
    return {
        "name": function.name,
        **description,
        "parameters": function.parameters or {"type": "object", "properties": {}},
    }


def _calls_rules(form: CallForm, functions: Sequence[FunctionDefinition], grammars: Grammars, *, several: bool) -> str:
    """The rules of `calls`: what comes after the opening, from the first call's name on. None without functions."""
    if not functions:
        return ""
    id = "" if form.before_id is None else f"{grammars.literal(form.before_id)} ID"
    more = f"({grammars.literal(form.between)} call)*" if several and form.between is not None else ""
    rules = [f"calls: call {more} {grammars.literal(form.closing)}"]
    rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(functions))))
    for index, function in enumerate(functions):
        begin = grammars.literal(function.name + form.after_name)
        rules.append(f"call_{index}: {begin} {json_rule(_schema(function))} {id}")
    if id:
        rules.append(f"ID: /[A-Za-z0-9]{{{CALL_ID_LENGTH}}}/")
    return "\n".join(rules) + "\n"


def _text_rules(form: CallForm, anchored: bool, grammars: Grammars) -> str:
    """The rule of `text`, which is anything that cannot be taken for calls, and of `head`, a text before them."""
    trigger = _regex(form.trigger)
    before = r"\s*" if anchored else ".*"
    head = "" if anchored or grammars.starts_special(form.trigger) else f"head[lazy]: /(?s:.*){trigger}/\n"
    return f"text: TEXT\nTEXT: /(?s:.*)/ & ~/(?s:{before}{trigger}.*)/\n" + head


def _beginning(form: CallForm, grammars: Grammars, *, after_text: bool) -> str:
    """From the beginning of an answer to the name of its first call."""
    if not after_text:
        return grammars.literal(form.opening)
    start = form.opening.lstrip()
    if grammars.starts_special(form.trigger):
        return f"text {grammars.literal(start)}"
    return f"head {grammars.literal(start[len(form.trigger) :])}"


def _regex(text: str) -> str:
    """For a regular expression between slashes."""
    return re.sub(r"([^A-Za-z0-9<>])", lambda found: f"\\{found[0]}" if found[0].isascii() else found[0], text)
