"""A server under load and at its end: refusals that cost nothing, deadlines, clients that leave, and the drain."""

import json
import signal
import socket

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import CASE, GOOD, HELLO, MODEL, ScriptedScheduler, make_app, running, wait_until
from test_clients import ServerProcess, read_all, request_of
from test_scheduler import Gate

from twinloop.serving.metrics import ASKED

BODIES = {
    "/v1/decisions": CASE,
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "a", "max_tokens": 300},
}
WRITING = sorted(set(ASKED) - {"/v1/classify"})
"""What is asked of a model that writes text."""
LONG = {"max_tokens": 300, "temperature": 1.0, "ignore_eos": True}


# --- admission --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WRITING)
def test_a_full_queue_refuses_before_the_body_is_there(scripted, script, path):
    script.full = True
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    with socket.create_connection(("127.0.0.1", scripted.base_url.port), timeout=20) as connection:
        connection.sendall(head.encode())
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 429")
    assert b"retry-after: 1" in answer.lower()
    assert scripted.post(path, json=BODIES[path]).json()["error"]["code"] == "queue_full"
    load = scripted.get("/v1/load").json()
    assert (load["requests"], load["refused"]) == (2, 2)
    script.full = False
    assert scripted.post(path, json=BODIES[path]).status_code == 200


# --- deadlines --------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow(tmp_path, tokenizer):
    """A server that gives a request 0.5 s, and a model that needs longer; its scheduler."""
    scheduler = ScriptedScheduler(tokenizer, delay_s=0.1)
    with running(make_app(tmp_path, scheduler, tokenizer, deadline_s=0.5)) as client:
        yield client, scheduler


@pytest.mark.parametrize("path", WRITING)
def test_a_request_that_takes_too_long_is_given_up(slow, path):
    client, scheduler = slow
    answer = client.post(path, json=BODIES[path])
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (504, "server_error", "deadline_exceeded")
    assert scheduler.streams[-1].cancelled.is_set()
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_that_takes_too_long_ends_with_the_reason(slow, n):
    client, scheduler = slow
    answer = client.post("/v1/chat/completions", json={"messages": HELLO, "stream": True, "n": n})
    first, *_, last = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert last["error"]["code"] == "deadline_exceeded"
    assert [stream.cancelled.is_set() for stream in scheduler.streams] == [True] * n


def test_a_body_that_comes_too_slowly_is_given_up(slow):
    client, scheduler = slow
    whole = request_of(("/v1/chat/completions", json.dumps({"messages": HELLO}).encode()))
    with socket.create_connection(("127.0.0.1", client.base_url.port), timeout=20) as connection:
        connection.sendall(whole[:-5])
        assert read_all(connection).startswith(b"HTTP/1.1 504")
    assert not scheduler.streams


# --- clients that leave -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_client_that_leaves_frees_its_slot_long_before_its_answer_would_end(client, engine_scheduler, path):
    before = engine_scheduler.metrics().totals
    body = BODIES[path] | LONG
    with socket.create_connection(("127.0.0.1", client.base_url.port), timeout=20) as connection:
        connection.sendall(request_of((path, json.dumps(body).encode())))
        wait_until(lambda: engine_scheduler.active == 1)
    wait_until(lambda: engine_scheduler.active == 0)
    after = engine_scheduler.metrics().totals
    assert after.cancelled == before.cancelled + 1
    assert after.completion_tokens - before.completion_tokens < 300


def test_an_answer_that_a_stop_string_ends_is_counted_as_finished(client, engine_scheduler):
    before = engine_scheduler.metrics().totals
    body = {"prompt": "a", "stop": ["e", "a", "t", " "], "seed": 1} | LONG
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    wait_until(lambda: engine_scheduler.active == 0)
    after = engine_scheduler.metrics().totals
    assert choice["finish_reason"] == "stop"
    assert after.completion_tokens - before.completion_tokens < 300
    assert (after.finished - before.finished, after.cancelled - before.cancelled) == (1, 0)


# --- the drain --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_stopped_ends_its_streams_refuses_others_and_exits_well(tmp_path, number):
    server = ServerProcess(tmp_path, "0.02", "30")
    stream = server.connect()
    stream.sendall(request_of(("/v1/chat/completions", json.dumps({"messages": HELLO, "stream": True}).encode())))
    wait_until(lambda: b"200 OK" in stream.recv(65536, socket.MSG_PEEK))
    server.process.send_signal(number)
    wait_until(lambda: server.client.get("/health").status_code == 503)
    for path, body in BODIES.items():
        refused = server.client.post(path, json=body)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "server_error"
    received = read_all(stream).decode()
    pieces = [json.loads(line[6:]) for line in received.splitlines() if line.startswith("data: {")]
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == GOOD
    assert "data: [DONE]" in received
    assert server.process.wait(20) == 0
    assert server.process.stdout.read() == "stopped\n"
    assert server.log.read_text() == ""
    server.client.close()


# --- what is measured -------------------------------------------------------------------------------------------------


def measured(client):
    """The samples of /metrics by name; of those with buckets their counts."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name.startswith("twinloop:")]
    assert {sample.labels["model_name"] for sample in samples} == {MODEL.name}
    found = {}
    for sample in samples:
        end = sample.labels.get("finished_reason")
        found[f"{sample.name}{{{end}}}" if end else sample.name] = sample.value
    return found


# What the panels of vLLM's examples/observability (Grafana) ask for, without the prefix.
OF_DASHBOARDS = """
    e2e_request_latency_seconds_bucket inter_token_latency_seconds_bucket time_to_first_token_seconds_bucket
    prompt_tokens_total generation_tokens_total num_requests_running num_requests_waiting kv_cache_usage_perc
    request_prompt_tokens_bucket request_generation_tokens_bucket request_success_total{stop}
    request_queue_time_seconds_sum request_prefill_time_seconds_sum request_decode_time_seconds_sum
    request_inference_time_seconds_sum request_max_num_generation_tokens_sum request_params_max_tokens_sum
    request_params_n_sum prefix_cache_queries_total prefix_cache_hits_total num_preemptions_total
    spec_decode_num_drafts_total spec_decode_num_draft_tokens_total spec_decode_num_accepted_tokens_total
"""


def test_every_panel_of_vllms_dashboards_has_its_metric_before_the_first_request(client):
    assert {f"twinloop:{name}" for name in OF_DASHBOARDS.split()} <= measured(client).keys()


def test_the_engine_is_measured_under_the_names_of_vllms_dashboards(client, engine_scheduler, tokenizer, monkeypatch):
    before = measured(client)
    assert before["twinloop:num_requests_running"] == before["twinloop:num_requests_waiting"] == 0
    assert before["twinloop:kv_cache_usage_perc"] == 0
    two = {"messages": HELLO, "max_tokens": 5, "temperature": 0, "n": 2}
    usage = client.post("/v1/chat/completions", json=two).json()["usage"]
    gate = Gate(monkeypatch)  # the next answer does not end by itself
    (letter,) = tokenizer.encode("a")
    shown = {"messages": HELLO, **LONG, "logit_bias": {letter: 100}, "stream": True}
    with (
        httpx.Client(base_url=client.base_url, trust_env=False) as leaving,
        leaving.stream("POST", "/v1/chat/completions", json=shown) as response,
    ):
        next(line for line in response.iter_lines() if '"content": "a"' in line)
        during = measured(client)
        assert during["twinloop:num_requests_running"] == 1
        assert 0 < during["twinloop:kv_cache_usage_perc"] < 1
    wait_until(lambda: measured(client).get("twinloop:request_success_total{abort}", 0) > 0)
    gate.opened.set()
    after = measured(client)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    ended = sum(grown[f"twinloop:request_success_total{{{end}}}"] for end in ("stop", "length"))
    assert (ended, grown["twinloop:request_success_total{abort}"]) == (2, 1)
    assert grown["twinloop:request_success_total{error}"] == 0
    assert grown["twinloop:e2e_request_latency_seconds_count"] == 2
    assert grown["twinloop:time_to_first_token_seconds_count"] == 3
    assert grown["twinloop:request_queue_time_seconds_count"] == 3
    assert (grown["twinloop:request_params_n_count"], grown["twinloop:request_params_n_sum"]) == (2, 3)
    assert grown["twinloop:request_prompt_tokens_sum"] == 3 * usage["prompt_tokens"]
    assert grown["twinloop:request_generation_tokens_sum"] >= usage["completion_tokens"]
    assert grown["twinloop:request_params_max_tokens_sum"] == 2 * 5 + LONG["max_tokens"]
    parts = [grown[f"twinloop:request_{part}_time_seconds_sum"] for part in ("prefill", "decode", "inference")]
    assert min(parts) > 0
    assert parts[0] + parts[1] == pytest.approx(parts[2])
    assert (
        parts[2] < grown["twinloop:e2e_request_latency_seconds_sum"] + grown["twinloop:inter_token_latency_seconds_sum"]
    )
    assert grown["twinloop:prompt_tokens_total"] >= 2 * usage["prompt_tokens"]
    assert grown["twinloop:generation_tokens_total"] > usage["completion_tokens"]
    assert grown["twinloop:inter_token_latency_seconds_count"] >= usage["completion_tokens"] - 2
    for end in ("count", "sum"):
        former, name = (f"twinloop:{each}_seconds_{end}" for each in ("time_per_output_token", "inter_token_latency"))
        assert after[former] == after[name]
    wait_until(lambda: engine_scheduler.active == 0)
