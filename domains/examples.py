"""What a model of a domain is tried with: the domain's own example, or a request in its place."""

from __future__ import annotations

from typing import Any

from twinloop.domains.domain import Domain, Message

GREETING: list[Message] = [{"role": "user", "content": "Hello!"}]
"""What is asked where a domain makes no decisions and has no `messages` as its example."""
ANY_TEXT = "hello"
"""The required fields of a request where its domain has no example: enough for a request of texts."""


def example_request(domain: Domain) -> dict[str, Any]:
    """The domain's example, or a request in its place; whether that one is valid is seen when it is asked. Of a domain
    that makes no decisions, `{"messages": …}`."""
    if domain.request is None:
        return {"messages": example_messages(domain)}
    if domain.example:
        return dict(domain.example)
    required = (name for name, field in domain.request.model_fields.items() if field.is_required())
    return dict.fromkeys(required, ANY_TEXT)


def example_messages(domain: Domain) -> list[Message]:
    """The messages that a chat is tried with."""
    messages: list[Message] = domain.example.get("messages", GREETING)
    return [dict(message) for message in messages]


def scored_example(domain: Domain) -> list[Message]:
    """The messages that a reward model is tried with, an answer last."""
    return [*example_messages(domain), {"role": "assistant", "content": "hello"}]
