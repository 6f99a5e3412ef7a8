"""Several real server processes at one address: what they count together, and what happens when one of them dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from served import CASE, GOOD, HELLO, wait_until

from twinloop.serving import supervisor
from twinloop.serving.keys import KeyStore
from twinloop.serving.listener import listen
from twinloop.serving.metric_sums import kept, sum_of

SUPERVISOR = """
import logging, sys
from twinloop.serving.listener import address_of, listen
from twinloop.serving.supervisor import Supervisor
folder, count, delay_s, stop_within_s = sys.argv[1:]
logging.basicConfig()
command = [sys.executable, "tests/serving/scripted_worker.py", folder, delay_s]
with listen("127.0.0.1", 0) as listener:
    supervisor = Supervisor(lambda place: [*command, place], listener, int(count), stop_within_s=float(stop_within_s))
    code = supervisor.run(lambda note: print(address_of("127.0.0.1", listener), note, sep="|", flush=True))
sys.exit(code)
"""


class Server:
    """A supervisor with its processes, its address and its log."""

    def __init__(self, folder: Path, *, count: int = 2, delay_s: float = 0.0, stop_within_s: float = 15.0):
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SUPERVISOR, str(folder), str(count), str(delay_s), str(stop_within_s)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        self.url, _, self.note = self.process.stdout.readline().strip().partition("|")

    def ask(self, method: str, path: str, body: Any = None, key: str | None = None) -> httpx.Response:
        """On a connection of its own, which any of the processes may accept."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.request(method, self.url + path, json=body, headers=headers, timeout=60, trust_env=False)

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def pid(self) -> int:
        return int(self.ask("GET", "/pid").text)

    def count(self, name: str) -> float:
        """Over all values of its labels."""
        lines = self.ask("GET", "/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}[{{ ]", line))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    running: list[Server] = []

    def begin(**settings: Any) -> Server:
        running.append(Server(tmp_path, **settings))
        return running[-1]

    yield begin
    for each in running:
        each.process.terminate()
        each.process.wait(60)


def many(work: Any, count: int = 24) -> list[Any]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda _: work(), range(count)))


def test_all_answer_at_one_address_and_count_together(start) -> None:
    server = start()
    assert server.note == "2 of 2"  # the first one is started alone, and knows that two will need memory
    pids = {each.pid for each in server.workers()}
    assert len(pids) == 2
    wait_until(lambda: server.pid() == min(pids), 60)
    wait_until(lambda: server.pid() == max(pids), 60)
    answers = many(lambda: server.ask("POST", "/v1/decisions", CASE))
    assert {answer.status_code for answer in answers} == {200}
    decisions = 'twinloop_requests_total{route="/v1/decisions",status="200"} 24.0'
    for _ in range(6):  # whichever of them is asked
        assert decisions in server.ask("GET", "/metrics").text.splitlines()
        load = server.ask("GET", "/v1/load").json()
        assert (load["requests"], load["slots"], load["capacity"]) == (24, 8, 8)
    assert server.count("twinloop_workers") == 2
    assert server.count("twinloop_workers_replaced_total") == 0
    assert server.count("twinloop:e2e_request_latency_seconds_count") == 24


def test_a_process_that_dies_is_replaced_and_nothing_that_was_counted_is_lost(start) -> None:
    server = start()
    many(lambda: server.ask("POST", "/v1/decisions", CASE))
    assert server.count("twinloop_decisions_total") == 24
    killed = server.pid()
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: server.count("twinloop_workers_replaced_total") == 1, 60)
    assert server.ask("POST", "/v1/decisions", CASE).status_code == 200  # the other one answers meanwhile
    wait_until(lambda: server.count("twinloop_workers") == 2, 60)
    assert server.count("twinloop_decisions_total") == 25
    pids = {each.pid for each in server.workers()}
    assert len(pids) == 2
    assert killed not in pids
    log = server.log.read_text()
    assert re.search(rf"server process \d \(pid {killed}\) has ended \(SIGKILL\); another one takes its place", log)
    assert len(re.findall("answers now", log)) == 1


def test_a_process_that_cannot_start_is_tried_again(start, tmp_path: Path) -> None:
    server = start()
    (tmp_path / "broken").touch()
    os.kill(server.pid(), signal.SIGKILL)
    wait_until(lambda: server.log.read_text().count("this cannot be served") >= 2, 60)
    assert server.count("twinloop_workers") == 1
    assert server.ask("POST", "/v1/decisions", CASE).status_code == 200
    (tmp_path / "broken").unlink()
    wait_until(lambda: server.count("twinloop_workers") == 2, 60)


def test_what_speaks_against_serving_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    server = Server(tmp_path, count=3)
    assert (server.process.wait(60), server.url) == (1, "")
    assert server.log.read_text().splitlines() == ["this cannot be served"]


def test_a_supervisor_rests_while_its_first_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, wait = [], supervisor.wait
    monkeypatch.setattr(supervisor, "wait", lambda pipes, timeout: (waits.append(timeout), wait(pipes, timeout))[1])
    never_ready = [sys.executable, "-c", "import time; time.sleep(0.5)"]
    with listen("127.0.0.1", 0) as listener:
        code = supervisor.Supervisor(lambda _: never_ready, listener, 2, stop_within_s=3).run(print)
    assert code == 1
    assert len(waits) <= 5


def test_a_process_that_is_stopped_holds_nobody_up(start) -> None:
    server = start()
    many(lambda: server.ask("POST", "/v1/decisions", CASE))
    assert server.count("twinloop_decisions_total") == 24
    stopped = server.workers()[0]
    stopped.suspend()
    try:
        other = server.workers()[1].pid
        for _ in range(3):
            # A connection that the stopped one was woken for is left to the other.
            assert server.count("twinloop_decisions_total") == 24
            assert server.pid() == other
    finally:
        stopped.resume()
    assert server.count("twinloop_workers") == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_every_process(start, number: int) -> None:
    server = start(delay_s=0.03)
    body = {"messages": HELLO, "stream": True}
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(server.ask, "POST", "/v1/chat/completions", body) for _ in range(8)]
        wait_until(lambda: server.ask("GET", "/v1/load").json()["requests"] == 8, 60)
        server.process.send_signal(number)
        time.sleep(0.2)
        workers = server.workers()
        late = [server.ask("POST", "/v1/decisions", CASE) for _ in range(4)]
        answers = [stream.result() for stream in streams]
    assert server.process.wait(60) == 0
    assert not any(each.is_running() for each in workers)
    for answer in answers:
        assert "".join(re.findall(r'"content": "((?:[^"\\]|\\.)*)"', answer.text)).replace('\\"', '"') == GOOD
        assert "[DONE]" in answer.text
    assert {(answer.status_code, answer.headers["retry-after"]) for answer in late} == {(503, "1")}
    assert "Traceback" not in server.log.read_text()


def test_a_server_that_has_drained_takes_no_connection_that_it_would_leave_waiting(start) -> None:
    server = start()

    def outcome() -> str:
        try:
            return str(server.ask("GET", "/v1/load").status_code)
        except httpx.ConnectError:
            return "refused"
        except httpx.TransportError:
            return "left"  # accepted by nobody, and reset when the last process ended

    with ThreadPoolExecutor(200) as pool:
        server.process.terminate()
        asked = []
        while server.process.poll() is None:
            asked.append(pool.submit(outcome))
            time.sleep(0.02)
        outcomes = [each.result() for each in asked]
    assert server.process.returncode == 0
    assert set(outcomes) <= {"200", "503", "refused", "left"}
    assert outcomes.count("left") <= 3, outcomes  # those that come as the last process closes


def test_processes_that_hang_are_killed_after_a_signal(start) -> None:
    server = start(stop_within_s=1.0)
    workers = server.workers()
    for each in workers:
        each.suspend()
    server.process.terminate()
    assert server.process.wait(60) == 0
    assert not any(each.is_running() for each in workers)
    assert server.log.read_text().count("has not ended within 1 s: it is killed") == 2


def test_processes_end_with_a_supervisor_that_is_killed(start) -> None:
    server = start()
    workers = server.workers()
    server.process.kill()
    server.process.wait()
    wait_until(lambda: not any(each.is_running() for each in workers), 60)


def test_the_limit_of_a_key_is_that_of_all_processes(start, tmp_path: Path) -> None:
    key = KeyStore(tmp_path / "keys.json").create("shop", requests_per_minute=6)
    wide = KeyStore(tmp_path / "keys.json").create("wide")
    server = start()
    pids = {each.pid for each in server.workers()}
    wait_until(lambda: {int(server.ask("GET", "/pid", key=wide).text) for _ in range(4)} == pids, 60)
    began = time.monotonic()
    statuses = [answer.status_code for answer in many(lambda: server.ask("GET", "/v1/models", key=key))]
    seconds = time.monotonic() - began
    assert 6 <= statuses.count(200) <= 6 + seconds / 10
    assert statuses.count(200) + statuses.count(429) == 24


def report(requests: int, seconds: list[float], busy: float, share: float, refused: float) -> Any:
    registry = CollectorRegistry()
    counter = Counter("requests", "", ["status"], registry=registry)
    counter.labels("200").inc(requests)
    if requests > 5:
        counter.labels("429").inc()
    histogram = Histogram("seconds", "", buckets=(1, 2), registry=registry)
    for each in seconds:
        histogram.observe(each)
    Gauge("busy", "", registry=registry).set(busy)
    Gauge("twinloop:kv_cache_usage_perc", "", registry=registry).set(share)
    Gauge("twinloop_champion_refused", "", registry=registry).set(refused)
    return list(registry.collect())


def test_counts_are_added_shares_averaged_and_what_is_common_is_the_largest() -> None:
    reports = [report(3, [0.5], 2, 0.25, 0), report(7, [1.5, 3], 1, 0.75, 1)]
    samples = {
        (sample.name, *sample.labels.values()): sample.value for family in sum_of(reports) for sample in family.samples
    }
    expected = {
        ("requests_total", "200"): 10, ("requests_total", "429"): 1,
        ("seconds_bucket", "1.0"): 1, ("seconds_bucket", "2.0"): 2, ("seconds_bucket", "+Inf"): 3,
        ("seconds_count",): 3, ("seconds_sum",): 5,
        ("busy",): 3, ("twinloop:kv_cache_usage_perc",): 0.5, ("twinloop_champion_refused",): 1,
    }  # fmt: skip
    assert {name: value for name, value in samples.items() if not name[0].endswith("_created")} == expected
    assert {family.name for family in kept(reports[0])} == {"requests", "seconds"}
