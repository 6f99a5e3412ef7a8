"""What clients do to a server, each a measure of its own. All answers are greedy and of a fixed length."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.serving.client import WAIT_S, Answer, ask, prompt, user
from benchmarks.serving.servers import Server
from twinloop.common.errors import UserError

SYSTEM_WORDS, LONG_WORDS = 500, 1400
STREAMS = 4
STREAM_TOKENS = 1000
"""More than come while a long prompt is read."""
FULL = 100
"""Clients: more than have a place in the queue."""


@dataclass(frozen=True)
class Sizes:
    """words, tokens: of a prompt and an answer. one: requests of the one client; many: numbers of clients, of which
    each asks `turns` times; repeats: of a system prompt; overload: numbers of clients, for so many seconds."""

    words: int = 100
    tokens: int = 64
    one: int = 5
    many: tuple[int, ...] = (8, 32)
    turns: int = 1
    repeats: int = 3
    overload: tuple[int, int] = (32, 200)
    overload_s: float = 8.0
    refusals: int = 500
    quotes: int = 2


QUICK = Sizes(words=8, tokens=8, one=1, many=(2,), repeats=1, overload=(2, 4), overload_s=1.0, refusals=5, quotes=1)


def _whole(answers: Sequence[Answer], server: Server) -> Sequence[Answer]:
    """Raises UserError where an answer is missing: speed without it would be no speed."""
    if lost := [answer.status for answer in answers if not answer.whole]:
        raise UserError(f"{server.name}: {len(lost)} of {len(answers)} answers are not whole (HTTP {lost[0]})")
    return answers


def one_client(server: Server, sizes: Sizes, seed: int) -> tuple[float, float, float]:
    """Median milliseconds of an answer's first token and of a whole answer, one request after another; and of a whole
    answer by the clock, where that is another one."""

    async def work() -> list[tuple[float, float, float]]:
        found = []
        for each in range(sizes.one):
            began = server.seconds()
            first = await ask(server.port, user(prompt(sizes.words, seed + 2 * each)), 1)
            read = server.seconds()
            whole = await ask(server.port, user(prompt(sizes.words, seed + 2 * each + 1)), sizes.tokens)
            found.append((read - began, server.seconds() - read, whole.total_s))
            _whole([first, whole], server)
        return found

    first, whole, by_clock = (1000 * statistics.median(values) for values in zip(*asyncio.run(work()), strict=True))
    return first, whole, by_clock


def many_clients(server: Server, sizes: Sizes, clients: int, seed: int) -> float:
    """Tokens of answers a second, from the first request to the last answer."""

    async def client(number: int) -> list[Answer]:
        seeds = range(seed + number * sizes.turns, seed + (number + 1) * sizes.turns)
        return [await ask(server.port, user(prompt(sizes.words, each)), sizes.tokens) for each in seeds]

    async def work() -> list[Answer]:
        return [answer for answers in await asyncio.gather(*map(client, range(clients))) for answer in answers]

    began = server.seconds()
    answers = _whole(asyncio.run(work()), server)
    return sum(answer.tokens for answer in answers) / (server.seconds() - began)


def gaps_beside_a_long_prompt(server: Server, sizes: Sizes, seed: int) -> tuple[float, float]:
    """Milliseconds: the largest gap between texts of streams while a long prompt is read, and the median before it.

    The streams are given up once it is read.
    """
    streams = [Answer() for _ in range(STREAMS)]

    async def stream(answer: Answer, number: int) -> None:
        await ask(server.port, user(prompt(sizes.words // 4, seed + number)), STREAM_TOKENS, answer=answer)

    async def work() -> tuple[Answer, float]:
        working = [asyncio.create_task(stream(answer, number)) for number, answer in enumerate(streams)]
        try:
            await ask(server.port, user(prompt(4, seed + STREAMS)), sizes.tokens // 4)  # all of them stream by now
            while not all(each.gaps or task.done() for each, task in zip(streams, working, strict=True)):
                await asyncio.sleep(0.001)  # of a small model, that one answer may overtake theirs
            began = time.perf_counter()
            return await ask(server.port, user(prompt(LONG_WORDS, seed + STREAMS + 1)), 1), began
        finally:
            for each in working:
                each.cancel()
            await asyncio.gather(*working, return_exceptions=True)

    long, began = asyncio.run(work())
    _whole([long], server)
    ended = began + long.first_s
    gaps = [(at, at + gap, gap) for each in streams for at, gap in zip(each.at, each.gaps, strict=False)]
    # A stream that stands still until the prompt is read has no text after it: its gap lasts to the end, at least.
    gaps += [(each.at[-1], ended, ended - each.at[-1]) for each in streams if each.at and each.at[-1] < ended]
    during = [gap for start, end, gap in gaps if end > began and start < ended]
    before = [gap for _, end, gap in gaps if end <= began]
    if not during or not before:
        raise UserError(f"{server.name}: its streams did not go on while the long prompt came")
    return 1000 * max(during), 1000 * statistics.median(before)


def repeated_prompt(server: Server, sizes: Sizes, seed: int) -> tuple[float, float]:
    """Milliseconds to the first token: of the first request with a system prompt, and the median of those after it."""
    system = prompt(SYSTEM_WORDS, seed)

    async def work() -> list[float]:
        found = []
        for each in range(sizes.repeats + 1):
            began = server.seconds()
            text = prompt(sizes.words // 10 + 1, seed + 1 + each)
            _whole([await ask(server.port, user(text, system), 1)], server)
            found.append(1000 * (server.seconds() - began))
        return found

    first, *later = asyncio.run(work())
    return first, statistics.median(later)


async def _pass(server: Server, seconds: float) -> None:
    """Wait until they have passed by the server's time."""
    until, latest = server.seconds() + seconds, time.monotonic() + WAIT_S
    while server.seconds() < until:
        if time.monotonic() > latest:
            raise UserError(f"{server.name}: it stands still under load")
        await asyncio.sleep(0.1)


def overload(server: Server, sizes: Sizes, clients: int, seed: int) -> tuple[float, Counter[str]]:
    """Tokens a second of whole answers to clients that ask again at once, or when a refusal says, and how requests
    ended."""
    tokens = max(4, sizes.tokens // 4)
    ends: Counter[str] = Counter()

    async def client(number: int) -> None:
        turn = 0
        while True:
            turn += 1
            text = prompt(sizes.words // 4, seed + 10_000 * number + turn)
            answer = await ask(server.port, user(text), tokens)
            ends["whole" if answer.whole else str(answer.status)] += 1
            if answer.status != 200:
                await _pass(server, answer.retry_s)

    async def work() -> float:
        working = [asyncio.create_task(client(number)) for number in range(clients)]
        try:
            await _pass(server, sizes.overload_s / 4)  # until the queue is as long as it becomes
            before, began = ends["whole"], server.seconds()
            await _pass(server, sizes.overload_s)
            return (ends["whole"] - before) * tokens / (server.seconds() - began)
        finally:
            for each in working:
                each.cancel()
            await asyncio.gather(*working, return_exceptions=True)

    return asyncio.run(work()), ends


def refusal(server: Server, sizes: Sizes, spent: Callable[[], float], seed: int) -> float:
    """Milliseconds of `spent` that a refused request takes, of many after each other on a connection that is kept.

    spent: seconds so far. The queue is full of answers that nobody streams.
    """
    path, body = "/v1/chat/completions", {"messages": user(prompt(sizes.words, seed)), "max_tokens": 1}
    long = {**body, "max_tokens": STREAM_TOKENS, "ignore_eos": True}

    async def fill(client: httpx.AsyncClient) -> None:
        while True:
            if (await client.post(path, json=long)).status_code == 429:
                await asyncio.sleep(5)

    async def refused(client: httpx.AsyncClient, count: int) -> None:
        while count:
            count -= (await client.post(path, json=body)).status_code == 429

    async def work() -> float:
        address, unlimited = f"http://127.0.0.1:{server.port}", httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=address, trust_env=False, timeout=WAIT_S, limits=unlimited) as client:
            filling = [asyncio.create_task(fill(client)) for _ in range(FULL)]
            try:
                await refused(client, 1)
                before = spent()
                await refused(client, sizes.refusals)
                return 1000 * (spent() - before) / sizes.refusals
            finally:
                for each in filling:
                    each.cancel()
                await asyncio.gather(*filling, return_exceptions=True)

    return asyncio.run(work())


POLICIES = "\n".join(
    f"P-{number}: {reason} items reported within {days} days of delivery are eligible for a return."
    for number, reason, days in [(3, "late", 14), (7, "damaged", 30), (12, "unwanted", 10), (15, "incomplete", 21)]
)
DECISION = (
    r'\{"policy": "P-[0-9]+: [a-zA-Z0-9 ]{40,90}\.", "policy_id": "(P-3|P-7|P-12|P-15)", '
    r'"days_since_delivery": [0-9]{1,2}, "eligible": (true|false), "label_created": (true|false)\}'
)
"""As a domain states the form of its decisions (`Domain.answer_form`)."""


def quoting_decisions(server: Server, sizes: Sizes, seed: int) -> float:
    """Median milliseconds of a decision that keeps to its form and quotes its prompt."""
    fields: dict[str, Any] = {"structured_outputs": {"regex": DECISION}, "ignore_eos": False}

    async def work() -> list[float]:
        found = []
        for number in range(sizes.quotes):
            order = f"Order A{seed + number}: damaged, delivered 12 days ago. Quote the policy that applies and decide."
            began = server.seconds()
            _whole([await ask(server.port, user(f"{POLICIES}\n{order}"), 128, **fields)], server)
            found.append(1000 * (server.seconds() - began))
        return found

    return statistics.median(asyncio.run(work()))
