"""A client of OpenAI's streaming chat API that costs little itself: it shares the machine with the servers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"),
    *("family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system"),
    *("program", "question", "work", "government", "number", "night", "point", "home", "water", "room", "mother"),
    *("area", "money", "story", "fact", "month", "lot", "right", "study", "book", "eye", "job", "word", "business"),
)
"""Each is one token behind a space."""
WAIT_S = 300.0


@dataclass
class Answer:
    """What a client saw. Seconds are from the request to its first and its last text; at: when each text came.

    status: of HTTP; 0 where the connection broke before the answer was whole. retry_s: after which a refused client may
    ask again, as the server says.
    """

    status: int = 0
    retry_s: float = 1.0
    first_s: float = 0.0
    total_s: float = 0.0
    at: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return self.status == 200 and bool(self.usage)

    @property
    def tokens(self) -> int:
        return int(self.usage.get("completion_tokens", 0))

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.at, self.at[1:], strict=False)]


def prompt(words: int, seed: int) -> str:
    """Text of so many words. Texts of different seeds begin differently, so that no cache helps."""
    chosen = np.random.default_rng(seed).choice(WORDS, words)
    return " ".join(chosen.tolist())


def user(text: str, system: str = "") -> list[dict[str, str]]:
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": text}]


async def ask(
    port: int, messages: Sequence[dict[str, str]], max_tokens: int, *, answer: Answer | None = None, **fields: Any
) -> Answer:
    """One streamed answer, greedy; it runs to `max_tokens` unless `fields` say otherwise.

    answer: filled as it comes, for a caller that may give it up; it is also what is returned.
    """
    body = {"model": "smollm2", "messages": list(messages), "max_tokens": max_tokens, "temperature": 0}
    body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}} | fields
    answer = answer or Answer()
    began = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            async with asyncio.timeout(WAIT_S):
                await _send(writer, port, json.dumps(body).encode())
                await _read(reader, answer, began)
        finally:
            writer.close()
    except (OSError, asyncio.IncompleteReadError, TimeoutError):
        answer.status, answer.usage = 0, {}
    return answer


async def _send(writer: asyncio.StreamWriter, port: int, body: bytes) -> None:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    await writer.drain()


async def _read(reader: asyncio.StreamReader, answer: Answer, began: float) -> None:
    status = int((await reader.readuntil(b"\r\n")).split()[1])
    while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
        if line.lower().startswith(b"retry-after:"):
            answer.retry_s = float(line.split(b":")[1])
    answer.status = status
    if status != 200:
        return
    held = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        *lines, held = (held + (await reader.readexactly(size + 2))[:-2]).split(b"\n")
        now = time.perf_counter()
        if any(_note(line, answer) for line in lines):
            answer.at.append(now)
            answer.first_s = answer.first_s or now - began
            answer.total_s = now - began


def _note(line: bytes, answer: Answer) -> bool:
    """Whether an event of the stream has text."""
    if not line.startswith(b"data: {"):
        return False
    event = json.loads(line[6:])
    answer.usage = event.get("usage") or answer.usage
    return any(choice["delta"].get("content") for choice in event.get("choices", ()))
