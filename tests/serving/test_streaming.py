"""How the tokens of a stream reach a reader that is faster or slower than the engine."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import replace

import pytest
from served import HELLO, ScriptedStream, make_app, wait_until
from test_scheduler import Gate, small_engine

from twinloop.models.decoder_stream import DecoderStream
from twinloop.serving.engine import Engine
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.engine.scheduler import Scheduler
from twinloop.serving.generation import TextStream
from twinloop.serving.work import Workers

GREEDY = SamplingParams(max_tokens=60)


@pytest.fixture
def scheduler():
    scheduler = Scheduler(small_engine(slots=2), draft_tokens=0)  # each step is a token
    yield scheduler
    scheduler.close(drain=False, timeout_s=10)


def text_of(stream, tokenizer, stop=()):
    return TextStream(stream, tokenizer, started=time.perf_counter(), stop=stop)


def ended(scheduler, params=GREEDY):
    """A stream of which nothing was read until its last token had come."""
    stream = scheduler.submit([1, 2], params)
    wait_until(lambda: stream.finish_reason is not None)
    return stream


def test_a_reader_that_is_late_gets_all_tokens_at_once(scheduler):
    (alone,) = small_engine(slots=2).generate([[1, 2]], GREEDY)
    assert list(ended(scheduler).bursts()) == [alone.tokens]
    assert list(ended(scheduler)) == alone.tokens


def test_a_reader_that_is_fast_gets_the_first_token_while_the_engine_has_no_other(scheduler, tokenizer, monkeypatch):
    gate = Gate(monkeypatch)
    stream = scheduler.submit([1, 2], GREEDY)
    pieces = iter(text_of(stream, tokenizer))
    first = next(pieces)
    assert len(stream.logprobs) == 1  # the second step waits at the gate
    gate.opened.set()
    text = first + "".join(pieces)
    assert text == "".join(text_of(ended(scheduler), tokenizer))


def test_a_late_reader_gets_the_same_text_in_one_piece(scheduler, tokenizer):
    text = text_of(ended(scheduler), tokenizer)
    pieces = list(text)
    assert pieces == [tokenizer.decode(small_engine(slots=2).generate([[1, 2]], GREEDY)[0].tokens)]
    assert (text.completion_tokens, text.finish_reason) == (60, "length")


def test_a_stop_string_ends_a_piece_of_many_tokens_where_it_ends_single_ones(scheduler, tokenizer):
    varied = replace(GREEDY, temperature=1.0, seed=1)
    (whole,) = text_of(ended(scheduler, varied), tokenizer)
    stop = whole[20:23]
    late = text_of(ended(scheduler, varied), tokenizer, [stop])
    assert list(late) == [whole[: whole.index(stop)]]
    assert (late.finish_reason, late.completion_tokens < 60) == ("stop", True)


def test_tokens_that_came_before_an_error_come_first(scheduler, monkeypatch):
    decode, steps = Engine.decode, iter(range(100))

    def fails_in_the_end(engine, *arguments):
        if next(steps) == 5:
            raise RuntimeError("no luck")
        return decode(engine, *arguments)

    monkeypatch.setattr(Engine, "decode", fails_in_the_end)
    bursts = ended(scheduler).bursts()
    assert len(next(bursts)) == 6
    with pytest.raises(RuntimeError, match="no luck"):
        next(bursts)


def call(app, body, send, *more) -> None:
    """Ask for a chat completion; what the server says goes to `send`, and `more` are messages after the request."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions", "query_string": b"", "root_path": "",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip

    async def respond() -> None:
        asked = asyncio.Queue()
        for message in ({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}, *more):
            asked.put_nowait(message)
        await app(scope, asked.get, send)

    asyncio.run(respond())


def streamed_to(app, body, pause_s: float) -> list[str]:
    """The contents of an answer's chunks, to a client that takes so long for each."""
    events: list[str] = []

    async def send(message):
        events.extend(message.get("body", b"").decode().split("\n\n"))
        await asyncio.sleep(pause_s)

    call(app, body, send)
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert choices[-1]["finish_reason"] == "length"
    return [choice["delta"]["content"] for choice in choices if choice["delta"].get("content")]


def test_a_slow_client_gets_fewer_chunks_than_tokens_and_the_same_text(tmp_path, engine_scheduler, tokenizer):
    body = {"messages": HELLO, "max_tokens": 100, "temperature": 0, "stream": True}
    app = make_app(tmp_path, engine_scheduler, tokenizer)
    slow = streamed_to(app, body, pause_s=0.1)
    assert 1 <= len(slow) < 50
    assert "".join(slow) == "".join(streamed_to(app, body, pause_s=0))


def test_what_breaks_in_the_middle_of_a_stream_is_in_the_log(tmp_path, script, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(DecoderStream, "push", lambda decoder, token: 1 // 0)
    events: list[bytes] = []

    async def send(message):
        events.append(message.get("body", b""))

    call(make_app(tmp_path, script, tokenizer), {"messages": HELLO, "stream": True}, send)
    last = json.loads(b"".join(events).decode().split("\n\n")[-2].removeprefix("data: "))
    assert last["error"]["type"] == "server_error"
    [logged] = [record for record in caplog.records if record.exc_info]
    assert logged.exc_info[0] is ZeroDivisionError


def test_a_client_that_leaves_before_the_first_chunk_frees_its_slot(tmp_path, script, tokenizer):
    script.delay_s = 0.01

    async def send(message):
        await asyncio.sleep(0.2)  # the first chunk is never asked for

    body = {"messages": HELLO, "stream": True}
    call(make_app(tmp_path, script, tokenizer), body, send, {"type": "http.disconnect"})
    assert script.streams[0].cancelled.is_set()


@pytest.mark.parametrize("end", ["stop token", "length"])
def test_a_character_that_an_answer_leaves_unfinished_is_shown_as_decoding_shows_it(tokenizer, end):
    ids = [tokenizer.token_bytes.index(b"\xc3"), *([tokenizer.stop_id] if end == "stop token" else [])]
    stream = ScriptedStream([1], SamplingParams(stop=tokenizer.stop_ids), ids, 0.0)
    assert "".join(text_of(stream, tokenizer)) == tokenizer.decode(ids) == "\N{REPLACEMENT CHARACTER}"


def test_no_answer_that_is_waited_for_waits_for_a_thread():
    """A scheduler may hold more of them than a limit of threads would let wait."""
    answers = 1200
    all_wait = threading.Barrier(answers)

    async def wait():
        workers = Workers()
        await asyncio.gather(*(workers.run(all_wait.wait, 60) for _ in range(answers)))

    asyncio.run(wait())
