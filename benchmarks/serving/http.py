"""Our server beside llama-server, both up at the same time and asked in turns."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from operator import truediv

from benchmarks.serving import requests
from benchmarks.serving.goals import LLAMA, OURS, Comparison, Goal
from benchmarks.serving.models import MAX_LENGTH, Models
from benchmarks.serving.our_server import COUNTS
from benchmarks.serving.requests import Sizes
from benchmarks.serving.servers import Server, free_port, running
from benchmarks.table import Row, percent, promise
from twinloop.common.errors import UserError

SLOTS = 8
OUR_SERVER = [sys.executable, "-m", "benchmarks.serving.our_server"]
OURS_NAME, LLAMA_NAME = f"{OURS} int8", f"{LLAMA} Q8_0"


def http_rows(models: Models, *, cores: Sequence[int], rounds: int, sizes: Sizes) -> Iterator[Row]:
    """All measures over HTTP: first those of both, then those of ours alone."""
    setting = f"int8, {len(cores)} core{'s' * (len(cores) > 1)}"
    threads, exported = ["--threads", str(len(cores))], models.exported("int8")
    with ExitStack() as stack:
        stack.enter_context(client_beside(cores))
        ours = stack.enter_context(running(OURS_NAME, [*OUR_SERVER, exported, "--slots", str(SLOTS), *threads], cores))
        servers, missing = [ours], dict[str, str]()
        try:
            servers.append(stack.enter_context(_llama(models, cores)))
        except UserError as error:
            missing[LLAMA_NAME] = str(error)
        yield from _Turns(setting, servers, missing, sizes).rows(rounds)
        yield from _repeat_rows(ours, setting, sizes)
        if len(cores) == 1:
            yield from _cpu_rows(ours, setting, sizes)
            yield from _refusal_rows(ours, setting, sizes)
        plain_command = [*OUR_SERVER, exported, "--slots", "1", "--drafts", "0", *threads]
        plain = stack.enter_context(running(f"{OURS_NAME} without drafts", plain_command, cores))
        yield from _draft_rows(ours, plain, setting, sizes, rounds)
        yield from _overload_rows(ours, setting, sizes)


@contextmanager
def _llama(models: Models, cores: Sequence[int]) -> Iterator[Server]:
    """With its prompt cache, which is on by default."""
    if LLAMA in models.peers.missing:
        raise UserError(models.peers.missing[LLAMA])
    port, threads = free_port(), str(len(cores))
    command: list[object] = [models.peers.program("llama-server"), "-m", models.gguf("q8_0")]
    command += ["--host", "127.0.0.1", "--port", port]
    command += ["-t", threads, "-tb", threads, "-np", str(SLOTS), "-c", str(SLOTS * MAX_LENGTH), "--jinja", "--no-ui"]
    with running(LLAMA_NAME, command, cores, port=port) as server:
        yield server


@contextmanager
def client_beside(cores: Sequence[int]) -> Iterator[None]:
    """Meanwhile, this process runs on the cores that are not the server's, where there are others."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, own - set(cores) or own)
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


class _Turns:
    """The measures that all servers are asked for in turns. A server that fails is shown with the reason."""

    def __init__(self, setting: str, servers: list[Server], missing: dict[str, str], sizes: Sizes):
        self._setting, self._servers, self._missing, self._sizes = setting, servers, missing, sizes
        self._clock, self._seed = servers[0].clock, 0

    def rows(self, rounds: int) -> Iterator[Row]:
        yield from self._memory_rows()
        yield from self._one_client_rows(rounds)
        for clients in self._sizes.many:
            yield from self._many_clients_rows(clients, rounds)
        yield from self._gap_rows(rounds)

    def _memory_rows(self) -> Iterator[Row]:
        """Every slot is used once, and none twice: what a server keeps of earlier prompts is not counted."""
        memory = self._comparison(f"memory, {SLOTS} slots x {MAX_LENGTH:,}", "MiB", [Goal(1.0)], less=True)

        def measure(server: Server, seed: int) -> list[float]:
            requests.many_clients(server, self._sizes, SLOTS, seed)
            return [server.memory_mib]

        self._take(measure, [memory], rounds=1)
        yield from memory.rows()

    @property
    def _asked(self) -> str:
        return f"{self._setting}, prompt of {self._sizes.words} words, {self._sizes.tokens} tokens"

    def _one_client_rows(self, rounds: int) -> Iterator[Row]:
        unit, goal = self._clock.milliseconds, [Goal(1.5)]
        first = self._comparison("HTTP, 1 client: first token", unit, goal, less=True, setting=self._asked)
        whole = self._comparison("HTTP, 1 client: whole answer", unit, goal, less=True, setting=self._asked)
        by_clock = self._comparison("· by the clock", "ms", less=True, setting=self._asked)
        measured = [first, whole, by_clock]
        self._take(lambda server, seed: requests.one_client(server, self._sizes, seed), measured, rounds)
        for each in measured if self._clock.by_cpu else measured[:2]:
            yield from each.rows()

    def _many_clients_rows(self, clients: int, rounds: int) -> Iterator[Row]:
        many = self._comparison(f"HTTP, {clients} clients", self._clock.rate, [Goal(1.5)], setting=self._asked)
        self._take(lambda server, seed: [requests.many_clients(server, self._sizes, clients, seed)], [many], rounds)
        yield from many.rows()

    def _gap_rows(self, rounds: int) -> Iterator[Row]:
        """By the clock always: a gap is what somebody waits."""
        setting = f"{self._setting}, beside {requests.STREAMS} streams {requests.LONG_WORDS:,} words arrive"
        gap = self._comparison("largest gap of a stream", "ms", [Goal(10.0)], less=True, setting=setting)
        usual = self._comparison("median gap before", "ms", less=True, setting=setting)
        self._take(
            lambda server, seed: requests.gaps_beside_a_long_prompt(server, self._sizes, seed), [gap, usual], rounds
        )
        yield from gap.rows()
        yield from usual.rows()
        times = statistics.median(map(truediv, gap.values[OURS_NAME], usual.values[OURS_NAME]))
        yield Row("· largest to median gap", setting, f"{times:.1f}", "times", promise("at most 5", times <= 5))

    def _comparison(
        self, what: str, unit: str, goals: Sequence[Goal] = (), *, less: bool = False, setting: str = ""
    ) -> Comparison:
        return Comparison(what, setting or self._setting, unit, goals, less=less, missing=self._missing)

    def _take(self, measure: Callable[[Server, int], Sequence[float]], into: Sequence[Comparison], rounds: int) -> None:
        """Ask every server, round after round. Both get the same prompts, and no prompt comes twice."""
        for number in range(rounds):
            self._seed += 1000
            for server in [each for each in self._servers if each.name not in self._missing]:
                _announce(f"{into[0].setting}: {into[0].what}, {server.name}, round {number + 1}")
                try:
                    values = measure(server, self._seed)
                except UserError as error:
                    if server.name == OURS_NAME:
                        raise
                    self._missing[server.name] = str(error)
                    continue
                for comparison, value in zip(into, values, strict=True):
                    comparison.add(server.name, value)


def _repeat_rows(ours: Server, setting: str, sizes: Sizes) -> Iterator[Row]:
    _announce(f"{setting}: repeated system prompt")
    first, later = requests.repeated_prompt(ours, sizes, seed=500_000)
    setting, share = f"{setting}, system prompt of {requests.SYSTEM_WORDS} words", later / first
    yield Row("first token, first time", setting, f"{first:.1f}", ours.clock.milliseconds)
    yield Row("· repeated", setting, f"{later:.1f}", ours.clock.milliseconds)
    yield Row("· repeated to first", setting, f"{share:.2f}", "times", promise("at most 0.2", share <= 0.2))


def _cpu_rows(ours: Server, setting: str, sizes: Sizes) -> Iterator[Row]:
    """With one thread, ONNX Runtime works in the thread that calls it alone."""
    _announce(f"{setting}: CPU outside ONNX Runtime")
    before = ours.get(COUNTS)
    requests.many_clients(ours, sizes, SLOTS, seed=600_000)
    after = ours.get(COUNTS)
    inside, whole = (after[name] - before[name] for name in ("onnxruntime_s", "cpu_s"))
    share = 1 - inside / whole
    yield Row("server's CPU outside ONNX Runtime", f"{setting}, {SLOTS} streams", percent(share), "%",
              promise("at most 10", share <= 0.1))  # fmt: skip


def _refusal_rows(ours: Server, setting: str, sizes: Sizes) -> Iterator[Row]:
    _announce(f"{setting}: refused requests")

    def spent() -> float:
        counts = ours.get(COUNTS)
        return float(counts["cpu_s"] - counts["engine_s"])

    cost = requests.refusal(ours, sizes, spent, seed=700_000)
    yield Row("a refused request (429)", f"{setting}, outside the engine's thread", f"{cost:.2f}", "CPU ms",
              promise("at most 0.3", cost <= 0.3))  # fmt: skip


def _draft_rows(ours: Server, plain: Server, setting: str, sizes: Sizes, rounds: int) -> Iterator[Row]:
    setting = f"{setting}, form and quotation"
    found = Comparison("decision with drafts", setting, ours.clock.milliseconds, less=True)
    before = ours.get(COUNTS)
    ratios = []
    for number in range(rounds):
        _announce(f"{setting}: with and without drafts, round {number + 1}")
        times = [requests.quoting_decisions(server, sizes, 10_000 + 100 * number) for server in (ours, plain)]
        ratios.append(times[1] / times[0])
        for server, milliseconds in zip((ours, plain), times, strict=True):
            found.add(server.name if server is ours else "without", milliseconds)
    after = ours.get(COUNTS)
    yield from found.rows()
    ratio, tokens = statistics.median(ratios), after["tokens"] - before["tokens"]
    yield Row("· ratio to without", setting, f"{ratio:.2f}", "times", promise("at least 1.5", ratio >= 1.5))
    calls = tokens / max(1.0, after["steps"] - before["steps"])
    yield Row("· tokens a model call", setting, f"{calls:.2f}", "tokens", promise("at least 2", calls >= 2))


def _overload_rows(ours: Server, setting: str, sizes: Sizes) -> Iterator[Row]:
    found = []
    for number, clients in enumerate(sizes.overload):
        _announce(f"{setting}: {clients} clients that ask again at once")
        goodput, ends = requests.overload(ours, sizes, clients, seed=1_000_000 * (number + 1))
        found.append(goodput)
        ended = ", ".join(f"{count} {end}" for end, count in ends.most_common())
        others = sum(count for end, count in ends.items() if end not in ("whole", "429"))
        asked = f"{setting}; requests ended: {ended}"
        held = promise("whole or 429 only", others == 0)
        yield Row(f"goodput, {clients} clients", asked, f"{goodput:.1f}", ours.clock.rate, held)
    share = found[1] / found[0] if found[0] else 0.0
    what = f"· {sizes.overload[1]} to {sizes.overload[0]} clients"
    yield Row(what, setting, f"{share:.2f}", "times", promise("at least 0.9", share >= 0.9))


def _announce(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
