"""More is asked than the server can answer: what it answers does not become less, and the rest is refused at once."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path

import pytest
from raw_clients import Answer, EngineServer, ask, engine_server, post
from served import HELLO, wait_until

SLOTS, QUEUE = 4, 8
CAPACITY = SLOTS + QUEUE
TIMES = 4
"""Clients, of those that the server takes."""
ROUNDS, ROUND_S = 3, 5.0
AGAIN_AFTER_S = 0.1
"""A tenth of what the server asks for."""
LEAST_SHARE = 0.5
"""Of the answers without overload; less than what is measured, since clients and server share the cores."""

_seeds = itertools.count()


def request() -> bytes:
    """Of which the model's part takes the most time."""
    body = {"messages": HELLO, "max_tokens": 500, "temperature": 1, "ignore_eos": True, "seed": next(_seeds)}
    return post("/v1/chat/completions", body)


async def use(server: EngineServer, clients: int) -> list[Answer]:
    """What so many clients are answered in a round; who is refused asks again."""
    end, answers = time.monotonic() + ROUND_S, list[Answer]()

    async def client() -> None:
        while time.monotonic() < end:
            answers.append(await ask(server.port, request()))
            if answers[-1].status != 200:
                await asyncio.sleep(AGAIN_AFTER_S)

    await asyncio.gather(*[client() for _ in range(clients)])
    return answers


@pytest.mark.slow
def test_goodput_holds_with_four_times_the_clients_that_a_server_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual, crowded = list[Answer](), list[Answer]()
    with engine_server(tmp_path, slots=SLOTS, queue_size=QUEUE) as server:
        for _ in range(ROUNDS):  # in turn: other work on the machine comes and goes
            usual += asyncio.run(use(server, CAPACITY))
            crowded += asyncio.run(use(server, TIMES * CAPACITY))
        wait_until(lambda: server.queue() == {"queued": 0, "active": 0, "capacity": CAPACITY})
        log = server.log.read_text()
    good = [answer for answer in crowded if answer.status == 200]
    refused = [answer for answer in crowded if answer.status == 429]
    with capsys.disabled():
        per_s = ROUNDS * ROUND_S
        print(
            f"\n{CAPACITY} clients: {len(usual) / per_s:.1f} answers/s; {TIMES * CAPACITY} clients: "
            f"{len(good) / per_s:.1f} ({len(good) / len(usual):.2f}), {len(refused) / per_s:.1f} refused/s"
        )
    assert {answer.status for answer in usual} == {200}
    assert len(good) + len(refused) == len(crowded)
    assert all('"finish_reason":"length"' in answer.body for answer in [*usual, *good])
    assert all("\r\nretry-after: 1" in answer.head and '"queue_full"' in answer.body for answer in refused)
    assert len(refused) > len(good)
    assert len(good) >= LEAST_SHARE * len(usual)
    assert "Traceback" not in log
