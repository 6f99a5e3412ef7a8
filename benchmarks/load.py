"""How long clients wait for a decision: 1, 8 and 32 of them, each asking again as soon as it is answered.

    python benchmarks/load.py [--url http://127.0.0.1:8080 [--key KEY]] [--seconds 10]

Without --url the champion is served for the time of the measurement (`twinloop serve`, so run the lifecycle first).
Time to first token is the server's own (from the request's arrival); total is what the client waits, over a real
socket. Clients share the machine's cores with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import httpx
from rich.console import Console
from rich.table import Table

REASONS = ("damaged", "defective", "late", "wrong", "unwanted", "incomplete")
MESSAGE = "my label has already been created, confirm it."


@dataclass
class Load:
    """What the clients of one run saw. Milliseconds."""

    ttft_ms: list[float] = field(default_factory=list)
    total_ms: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)


async def ask(client: httpx.AsyncClient, number: int, until: float, load: Load) -> None:
    """One client: orders that differ, each sent when the one before is answered."""
    turn = 0
    while time.perf_counter() < until:
        turn += 1
        order = {
            "order_id": f"B{10000 + (number * 997 + turn * 13) % 90000}",
            "reason": REASONS[(number + turn) % len(REASONS)],
            "damage_confirmed": turn % 3 > 0,
            "days_since_delivery": (number * 7 + turn * 11) % 60,
        }
        started = time.perf_counter()
        response = await client.post("/v1/decisions", json={"order": order, "message": MESSAGE})
        waited_ms = (time.perf_counter() - started) * 1000
        if response.status_code != 200:
            load.outcomes[str(response.status_code)] += 1
            await asyncio.sleep(0.05)
            continue
        answer = response.json()
        ttft_ms = answer["timings"]["ttft_ms"]
        if ttft_ms is None:  # no policy speaks of the reason: fast, and no measure of the model
            load.outcomes["not asked"] += 1
            continue
        load.outcomes["escalated" if answer["escalated"] else "decided"] += 1
        load.total_ms.append(waited_ms)
        load.ttft_ms.append(ttft_ms)


async def press(url: str, key: str, clients: int, seconds: float) -> Load:
    """A closed loop of `clients` for `seconds`, after one second of warm-up that is not counted."""
    headers = {"Authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=60, trust_env=False) as client:
        for length, load in ((1.0, Load()), (seconds, Load())):
            until = time.perf_counter() + length
            await asyncio.gather(*(ask(client, number, until, load) for number in range(clients)))
    return load


def quantile(values: Sequence[float], share: float) -> str:
    if len(values) < 2:
        return "-"
    return f"{statistics.quantiles(values, n=100, method='inclusive')[round(share * 100) - 1]:.1f}"


@contextmanager
def champion(token: str) -> Iterator[str]:
    """The champion's server, as a user would start it. token: its administrator's, which opens what API keys open."""
    command = [sys.executable, "-m", "twinloop.flows.cli", "serve", "--port", "0"]
    environment = os.environ | {"TWINLOOP_ADMIN_TOKEN": token}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            sys.exit(server.wait())  # it has said on stderr what is missing
        yield line.split()[0]
    finally:
        server.terminate()
        server.wait(60)


def measure(url: str, key: str, seconds: float) -> Table:
    model = httpx.get(f"{url}/health", trust_env=False).json()["model"]
    table = Table(
        "clients", "answers/s", "ttft p50", "ttft p95", "total p50", "total p95", "outcomes",
        title=f"{model['name']} version {model['version']}, {seconds:g} s each, ms",
    )  # fmt: skip
    for clients in (1, 8, 32):
        load = asyncio.run(press(url, key, clients, seconds))
        outcomes = ", ".join(f"{count} {name}" for name, count in load.outcomes.most_common())
        table.add_row(
            str(clients),
            f"{len(load.total_ms) / seconds:.1f}",
            quantile(load.ttft_ms, 0.5),
            quantile(load.ttft_ms, 0.95),
            quantile(load.total_ms, 0.5),
            quantile(load.total_ms, 0.95),
            outcomes,
        )
    return table


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--url", help="a server that runs already")
    arguments.add_argument("--key", help="an API key, where that server asks for one")
    arguments.add_argument("--seconds", type=float, default=10.0, help="length of each run")
    options = arguments.parse_args()
    console = Console(width=100)  # the same table in a terminal and in a file
    key = options.key or secrets.token_urlsafe(32)
    server = nullcontext(options.url) if options.url else champion(key)
    with server as url:
        try:
            console.print(measure(url, key, options.seconds))
        except httpx.TransportError as error:
            sys.exit(f"{url}: {error or type(error).__name__}; is `twinloop serve` running there?")


if __name__ == "__main__":
    main()
