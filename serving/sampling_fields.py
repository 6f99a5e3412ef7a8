"""The fields of a request that say how its answers are drawn, as OpenAI and vLLM name them."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated

from pydantic import BaseModel, Field

from twinloop.serving.engine.sampling import Constraint, SamplingParams
from twinloop.serving.errors import ApiError

MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 100
MAX_CHOICES = 128

StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
LogitBias = Annotated[
    dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(json_schema_extra={"additionalProperties": False})
]


class SamplingFields(BaseModel):
    """Temperature 0 is greedy. A field of the name and the meaning of one of `SamplingParams` is passed on as it is."""

    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: int | None = Field(None, ge=-1, description="0 and -1: the whole vocabulary")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: LogitBias | None = Field(None, description="by token id, in decimal digits")
    seed: int | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOP_STRINGS)] | None = None
    ignore_eos: bool | None = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def stop_texts(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def most_tokens(self) -> int | None:
        """Of one answer, where the request has a limit."""
        return self.max_tokens

    @property
    def reported(self) -> int | None:
        """Of how many likeliest tokens the log-probabilities are reported; None: not even those of the answer."""
        raise NotImplementedError

    def sampling_params(
        self, *, max_tokens: int, stop: tuple[int, ...], constraint: Constraint | None, vocab_size: int
    ) -> SamplingParams:
        """max_tokens: where the request has no limit. stop: the tokens with which the model ends an answer.

        Raises ApiError for fields that cannot be served together, or with this model.
        """
        max_tokens = self.most_tokens or max_tokens
        self._check(max_tokens, constraint, vocab_size)
        values = {name: value for name in _PASSED_ON if (value := getattr(self, name)) is not None}
        return SamplingParams(
            **{"temperature": 1.0}
            | values
            | {
                "max_tokens": max_tokens,
                "stop": () if self.ignore_eos else stop,
                "constraint": constraint,
                "logit_bias": {int(token): bias for token, bias in (self.logit_bias or {}).items()},
                "top_logprobs": self.reported,
            }
        )

    def _check(self, max_tokens: int, constraint: Constraint | None, vocab_size: int) -> None:
        if (self.min_tokens or 0) > max_tokens:
            raise refused("min_tokens", f"the answer may have {max_tokens} tokens at most")
        for name in ("min_tokens", "ignore_eos"):
            if constraint is not None and getattr(self, name):
                raise refused(
                    name,
                    "an answer held to a form, by response_format, structured_outputs or tools, ends with it",
                )
        for token in self.logit_bias or {}:
            if int(token) >= vocab_size:
                raise refused(f"logit_bias.{token}", f"the model's token ids are 0 to {vocab_size - 1}")


_PASSED_ON = [each.name for each in fields(SamplingParams) if each.name in SamplingFields.model_fields]


def refused(name: str, problem: str) -> ApiError:
    """For a field that cannot be served."""
    return ApiError(400, f"{name}: {problem}", code="unsupported_parameter", param=name)
