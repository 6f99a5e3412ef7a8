"""Text to token ids and back, in the form of vLLM's `/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from twinloop.common.errors import UserError
from twinloop.domains.domain import MAX_MESSAGES
from twinloop.domains.examples import GREETING
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.asked import ModelName
from twinloop.serving.completions import refuse_unknown_ids
from twinloop.serving.decisions import DecisionService
from twinloop.serving.described import ASK_WORDS, errors
from twinloop.serving.errors import ApiError
from twinloop.serving.messages import ChatMessage, encode_conversation, encode_messages
from twinloop.serving.model_manager import ModelManager
from twinloop.serving.sampling_fields import refused
from twinloop.serving.tools import MAX_TOOLS, Tool, prompt_tools

TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"

EXAMPLES: list[Any] = [{"prompt": "hello"}, {"messages": GREETING}]


class _Fields(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: ModelName | None = None


class TokenizeText(_Fields):
    """add_special_tokens: whether the text begins as the model's texts do, with BOS."""

    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class TokenizeMessages(_Fields):
    """add_generation_prompt: whether the header comes last after which the model answers. tools: only with it."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    add_generation_prompt: bool = True
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    return_token_strs: bool | None = False


def _form(body: Any) -> str:
    """A tag that is no field's name: an error's path has it in front of the field's."""
    return "a chat" if isinstance(body, dict) and "messages" in body else "a text"


TokenizeRequest = Annotated[
    Annotated[TokenizeText, Tag("a text")] | Annotated[TokenizeMessages, Tag("a chat")], Discriminator(_form)
]


class Tokens(BaseModel):
    """max_model_len: the tokens of prompt and answer together. token_strs: each token's text, where asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(_Fields):
    tokens: list[Annotated[int, Field(ge=0)]]


class DetokenizedText(BaseModel):
    prompt: str


def tokens_router(manager: ModelManager) -> APIRouter:
    """`POST /tokenize` and `POST /detokenize`."""
    router = APIRouter()
    responses = errors(404, 415, words=ASK_WORDS)

    @router.post(TOKENIZE, responses=responses)
    def tokenize(body: Annotated[TokenizeRequest, Body(examples=EXAMPLES)]) -> Tokens:
        service = _service(manager, body)
        tokenizer = service.tokenizer
        ids = _encode_chat(body, service) if isinstance(body, TokenizeMessages) else _encode_text(body, tokenizer)
        return Tokens(
            count=len(ids),
            max_model_len=service.scheduler.max_length,
            tokens=ids,
            token_strs=[_token_text(id, tokenizer) for id in ids] if body.return_token_strs else None,
        )

    @router.post(DETOKENIZE, responses=responses)
    def detokenize(body: Annotated[DetokenizeRequest, Body(examples=[{"tokens": [1, 2]}])]) -> DetokenizedText:
        tokenizer = _service(manager, body).tokenizer
        refuse_unknown_ids(body.tokens, tokenizer, "tokens")
        return DetokenizedText(prompt=tokenizer.decode_all(body.tokens))

    return router


def _service(manager: ModelManager, body: _Fields) -> DecisionService:
    """The served model's, whose tokens those of all others on its base are. Raises ApiError for a name of none."""
    manager.find(body.model)
    return manager.service


def _encode_text(body: TokenizeText, tokenizer: ChatTokenizer) -> list[int]:
    return tokenizer.encode_text(body.prompt) if body.add_special_tokens else tokenizer.encode(body.prompt)


def _encode_chat(body: TokenizeMessages, service: DecisionService) -> list[int]:
    if body.tools:
        service.tool_support.require()
        if not body.add_generation_prompt:
            raise refused("add_generation_prompt", "must be true with tools")
    try:
        if body.add_generation_prompt:
            return encode_messages(body.messages, service.tokenizer, prompt_tools(body.tools or []))
        return encode_conversation(body.messages, service.tokenizer)
    except UserError as error:  # the chat template does not take these messages
        raise ApiError(400, str(error), param="messages") from None


def _token_text(id: int, tokenizer: ChatTokenizer) -> str:
    """What one token means; U+FFFD stands for a part of a character."""
    return tokenizer.token_bytes[id].decode("utf-8", "replace")
