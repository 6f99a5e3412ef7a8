"""What every request for a text of the model has, whether it is a chat or a text that goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from twinloop.serving.decisions import DecisionService
from twinloop.serving.errors import ApiError
from twinloop.serving.health import refuse_closed
from twinloop.serving.sampling_fields import SamplingFields, refused

IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
"""Parameters that do not concern the answer."""


ModelName = Annotated[str, Field(max_length=256)]

UsageInStream = Literal["none", "last", "each"]
"""Which chunks say how many tokens there are."""

Priority = Annotated[int, Field(description="in the queue: lower is earlier, and of equal ones the first to come")]


NEUTRAL: Mapping[str, Any] = {"best_of": 1, "suffix": "", "modalities": ["text"]}
"""Parameters with the one value that asks for nothing."""


class StreamOptions(BaseModel):
    """Both kinds of usage together are vLLM's; OpenAI's server pads chunks (`include_obfuscation`), and this never."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    include_usage: bool = False
    continuous_usage_stats: bool | None = Field(
        None, description="with include_usage: the tokens so far, in each chunk"
    )
    include_obfuscation: bool | None = Field(None, description="accepted, and without effect")


def _describe_others(schema: dict[str, Any]) -> None:
    """Add the parameters that are not fields, since they change nothing, to the schema of a request."""
    schema["properties"] |= {name: {"description": "accepted, and without effect"} for name in sorted(IGNORED)}
    schema["properties"] |= {name: {"const": value} for name, value in NEUTRAL.items()}
    schema["additionalProperties"] = False


class Asked(SamplingFields):
    """A parameter that would have to be ignored is refused by its name."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, json_schema_extra=_describe_others)

    model: ModelName | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    priority: Priority = 0

    @property
    def usage_in_stream(self) -> UsageInStream:
        if self.stream_options is None or not self.stream_options.include_usage:
            return "none"
        return "each" if self.stream_options.continuous_usage_stats else "last"


def refuse_too_long(
    tokens: int, wanted: int | None, longest: int, *, param: Literal["messages", "prompt", "input"]
) -> None:
    """Raises ApiError where an answer does not fit beside its prompt.

    tokens: of the prompt; wanted: of the answer, where the request says so; longest: of both together; param: the field
    that holds the prompt.
    """
    if longest - tokens >= (wanted or 1):
        return
    have = {"messages": "the messages have", "prompt": "the prompt has", "input": "an input has"}[param]
    asked = f" and {wanted} were asked for" if wanted else ""
    problem = f"the model reads and writes at most {longest} tokens; {have} {tokens}{asked}"
    raise ApiError(400, problem, code="context_length_exceeded", param=param)


def refuse_unserved(asked: Asked, service: DecisionService, *, prompts: int = 1) -> None:
    """Raises ApiError for a model that writes no text, unknown parameters, and more answers than the server holds."""
    if service.kind != "text":
        refuse_closed("text", service)
    for name, value in (asked.model_extra or {}).items():
        if name in NEUTRAL and value not in (None, NEUTRAL[name]):
            raise refused(name, f"only {json.dumps(NEUTRAL[name])} is served")
        if name not in {*IGNORED, *NEUTRAL} and value is not None:
            raise refused(name, "is not a known parameter")
    if asked.stream_options is not None and not asked.stream:
        raise refused("stream_options", "is for an answer with stream: true")
    capacity = service.scheduler.capacity
    if prompts > capacity:
        problem = f"prompt: this server works on {capacity} answers at once, at most"
        raise ApiError(400, problem, code="too_many_prompts", param="prompt")
    if prompts * asked.choices > capacity:
        raise refused("n", f"this server works on {capacity} answers at once, at most")
