"""The messages of a chat request, as OpenAI's clients send them: each role with the fields that it may have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from twinloop.models.tokenizer import ChatTokenizer
from twinloop.models.tool_messages import call_arguments, encode_tool_prompt
from twinloop.serving.errors import ApiError
from twinloop.serving.response_format import TOO_DEEP, check_depth


class _Fields(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


OF_CLIENT: Any = Field(None, description="accepted, and without effect: what OpenAI's client adds to an answer")


class TextPart(_Fields):
    type: Literal["text"]
    text: str


Content = str | list[TextPart]


class _Message(_Fields):
    name: str | None = Field(None, description="accepted, and without effect: no chat template says who is speaking")


class SystemMessage(_Message):
    role: Literal["system"]
    content: Content


class DeveloperMessage(_Message):
    """What OpenAI's newer clients call the system's; a chat template knows the latter."""

    role: Literal["developer"]
    content: Content


class UserMessage(_Message):
    role: Literal["user"]
    content: Content


def _check_arguments(text: str) -> str:
    try:
        check_depth(_arguments(text))
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    return text


Arguments = Annotated[str, AfterValidator(_check_arguments)]


class FunctionCall(_Fields):
    name: str = Field(min_length=1)
    arguments: Arguments = Field(description="a JSON object, as the model wrote it")
    parsed_arguments: Any = OF_CLIENT


class ToolCall(_Fields):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = OF_CLIENT


class AssistantMessage(_Message):
    """What the model has answered before: a text, or calls of tools where its chat template has them."""

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: list[ToolCall] | None = None
    # OpenAI's client sends its own answers back with all of their fields.
    parsed: Any = OF_CLIENT
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolMessage(_Message):
    """What a tool returned, for a model whose chat template has tools."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str


ChatMessage = Annotated[
    SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


def encode_messages(
    messages: Sequence[ChatMessage], tokenizer: ChatTokenizer, tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """The prompt of a request; tools: as `encode_tool_prompt` takes them.

    Raises ApiError for messages that the model's chat template has no place for, and UserError where the template
    itself refuses them.
    """
    for index, message in enumerate(messages):
        if isinstance(message, AssistantMessage) and message.content is None and not message.tool_calls:
            path = f"messages.{index}.content"
            raise ApiError(400, f"{path}: is required without tool_calls", code="unsupported_message", param=path)
    tool_field = next((field for index, each in enumerate(messages) if (field := _tool_field(index, each))), None)
    if tool_field is None and not tools:
        return tokenizer.encode_prompt(_plain(messages))
    if tool_field is not None and call_arguments(tokenizer) is None:
        problem = f"{tool_field}: the chat template of this model has no tools; send their results as a user's text"
        raise ApiError(400, problem, code="unsupported_message", param=tool_field)
    return encode_tool_prompt(tokenizer, [_with_tools(each) for each in messages], tools)


def encode_conversation(messages: Sequence[ChatMessage], tokenizer: ChatTokenizer) -> list[int]:
    """The messages without the header of an answer to come. Raises like `encode_messages`."""
    if field := next((field for index, each in enumerate(messages) if (field := _tool_field(index, each))), None):
        problem = f"{field}: calls of tools are encoded with add_generation_prompt only"
        raise ApiError(400, problem, code="unsupported_message", param=field)
    return tokenizer.encode_conversation(_plain(messages))


def encode_answered(messages: Sequence[ChatMessage], tokenizer: ChatTokenizer) -> list[int]:
    """A conversation up to the stop token of its last answer, as a reward model scores it. Raises ApiError for one that
    ends with another's turn, and like `encode_messages`."""
    *asked, answer = messages
    if not isinstance(answer, AssistantMessage) or answer.content is None or not asked:
        raise ApiError(400, "input: the last message must be the assistant's answer that is scored", param="input")
    return encode_messages(asked, tokenizer) + tokenizer.encode_sampled(_text(answer))


def _plain(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    return [{"role": _role(each), "content": _text(each)} for each in messages]


def _tool_field(index: int, message: ChatMessage) -> str | None:
    """The path of the first field of a message that only a template with tools has a place for."""
    if isinstance(message, ToolMessage):
        return f"messages.{index}.role"
    if isinstance(message, AssistantMessage) and message.tool_calls:
        return f"messages.{index}.tool_calls"
    return None


def _role(message: ChatMessage) -> str:
    return "system" if isinstance(message, DeveloperMessage) else message.role


def _text(message: ChatMessage) -> str:
    content = message.content or ""
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _with_tools(message: ChatMessage) -> dict[str, Any]:
    """A message as chat templates take it: the arguments of a call as data, where they are a JSON object."""
    fields: dict[str, Any] = {"role": _role(message), "content": _text(message)}
    if isinstance(message, ToolMessage):
        fields["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage) and message.tool_calls:
        fields["tool_calls"] = [
            {
                "id": call.id,
                "type": call.type,
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return fields


def _arguments(text: str) -> Any:
    try:
        arguments = json.loads(text)
    except ValueError:
        return text
    return arguments if isinstance(arguments, dict) else text
