"""Answers that follow a schema: through the engine with others beside them, and over HTTP as OpenAI's clients ask."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import jsonschema_rs
import numpy as np
import onnxruntime as ort
import openai
import pytest
from pydantic import BaseModel
from schemas import schema_of
from served import HELLO, make_app, running, small_tokenizer, wait_until
from test_chat_api import chunks_of

from twinloop.models.config import DecoderConfig
from twinloop.models.shapes import weight_shapes
from twinloop.serving.engine import Engine, slot_samplers
from twinloop.serving.engine.grammar import Grammar, GrammarError, Grammars
from twinloop.serving.engine.sampling import ConstraintError, SamplingParams
from twinloop.serving.engine.scheduler import Scheduler

PROMPT = [3, 20, 21, 4]
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"enum": ["a", "b"]},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["name", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
ENDLESS = {"type": "array", "items": {"type": "integer"}, "minItems": 100_000}


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer)


def small_engine(tokenizer, slots: int, padding: int = 0) -> Engine:
    """A network whose next tokens are nearly equally likely. padding: rows of its vocabulary that are no tokens."""
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size + padding, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=4096,
    )  # fmt: skip
    random = np.random.default_rng(7)
    weights = {
        name: np.ones(shape, np.float32) if "norm" in name else random.normal(0, 0.05, shape).astype(np.float32)
        for name, shape in weight_shapes(config).items()
    }
    initializers = {name: ort.OrtValue.ortvalue_from_numpy(weight) for name, weight in weights.items()}
    return Engine.from_weights(config, initializers, max_length=2048, slots=slots, threads=1)


@pytest.fixture(scope="module")
def scheduler(tokenizer):
    scheduler = Scheduler(small_engine(tokenizer, slots=6), queue_size=200)
    yield scheduler
    scheduler.close(drain=False, timeout_s=20)


@pytest.fixture(scope="module")
def client(tmp_path_factory, scheduler, tokenizer):
    with running(make_app(tmp_path_factory.mktemp("structured"), scheduler, tokenizer)) as client:
        yield client


def params_of(tokenizer, constraint=None, seed: int = 0, **settings) -> SamplingParams:
    settings = {"max_tokens": 2000, "temperature": 1.0, "seed": seed} | settings
    return SamplingParams(stop=(tokenizer.stop_id,), constraint=constraint, **settings)


def answer_schemas(schemas, scheduler, tokenizer, grammars) -> tuple[int, list[str]]:
    """Ask for an answer to each schema; its number is the seed. Returns how many were answered, each to a valid end,
    and why the others were refused."""
    answers, refused = [], []
    for seed, schema in schemas.items():
        try:
            grammar = grammars.json_schema(schema)
        except GrammarError as error:
            refused.append(str(error))
        else:
            answers.append((schema, scheduler.submit(PROMPT, params_of(tokenizer, grammar, seed))))
    for schema, stream in answers:
        text = tokenizer.decode(list(stream))
        assert stream.finish_reason == "stop", (schema, text)
        checked = text.replace(":60", ":59")  # llguidance allows a leap second in any minute
        assert jsonschema_rs.is_valid(schema, json.loads(checked), validate_formats=True), (schema, text)
    return len(answers), refused


def test_schemas_of_many_forms_are_answered_to_a_valid_end_or_refused(scheduler, tokenizer, grammars):
    schemas = {seed: schema_of(seed) for seed in range(160)}
    answered, refused = answer_schemas(schemas, scheduler, tokenizer, grammars)
    assert answered >= 150
    assert all(refused)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_seed_gives_the_same_text_whoever_else_is_answered(scheduler, tokenizer, grammars, temperature):
    def ask(seed: int):
        grammar = grammars.json_schema(schema_of(seed))
        settings = {"max_tokens": 150, "temperature": temperature}
        return scheduler.submit(PROMPT, params_of(tokenizer, grammar, seed, **settings))

    alone = {seed: list(ask(seed)) for seed in range(12)}
    others = [scheduler.submit(PROMPT, params_of(tokenizer, seed=seed, max_tokens=300)) for seed in range(3)]
    together = {seed: ask(seed) for seed in range(12)}
    assert {seed: list(stream) for seed, stream in together.items()} == alone
    assert all(list(stream) for stream in others)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.7}])
def test_answers_without_a_constraint_are_the_same_beside_those_with_one(scheduler, tokenizer, grammars, settings):
    def ask():
        return [
            scheduler.submit([3, 20 + seed], params_of(tokenizer, None, seed, max_tokens=80, **settings))
            for seed in range(4)
        ]

    def read(streams):
        return [(list(stream), stream.logprobs if settings["temperature"] else None) for stream in streams]

    alone = read(ask())
    beside = scheduler.submit([3, 20], params_of(tokenizer, grammars.json_schema(ENDLESS), max_tokens=200))
    assert read(ask()) == alone
    assert len(list(beside)) == 200


def test_a_group_of_completions_keeps_to_its_form_in_any_slots(tokenizer, grammars):
    params = params_of(tokenizer, grammars.json_schema(TREE), seed=5)
    groups = [
        small_engine(tokenizer, slots, padding=24).generate([PROMPT, [3, 30, 4], PROMPT], params, group=4)
        for slots in (1, 3, 5)
    ]
    texts = [[completion.tokens for completion in group] for group in groups]
    assert texts[0] == texts[1] == texts[2]
    assert len(set(map(tuple, texts[0]))) > 2
    for completion in groups[0]:
        assert completion.finish_reason == "stop"
        jsonschema_rs.validate(TREE, json.loads(tokenizer.decode(completion.tokens)))


def test_a_prompt_that_is_shared_is_not_changed_by_a_constraint(tokenizer, grammars):
    engine = small_engine(tokenizer, slots=2)
    free = params_of(tokenizer, seed=1, max_tokens=20)
    before = engine.generate([PROMPT], free)
    engine.generate([PROMPT], replace(free, constraint=grammars.json_schema(TREE)))
    assert engine.generate([PROMPT], free) == before


def test_an_answer_is_cut_by_its_limit_and_says_so(scheduler, tokenizer, grammars):
    stream = scheduler.submit(PROMPT, params_of(tokenizer, grammars.json_schema(ENDLESS), max_tokens=30))
    assert len(list(stream)) == 30
    assert stream.finish_reason == "length"


def test_a_cancelled_answer_frees_its_slot_for_one_without_a_constraint(tokenizer, grammars):
    scheduler = Scheduler(small_engine(tokenizer, slots=1))
    stream = scheduler.submit(PROMPT, params_of(tokenizer, grammars.json_schema(ENDLESS)))
    next(iter(stream))
    stream.cancel()
    list(stream)
    assert stream.finish_reason == "cancelled"
    free = params_of(tokenizer, seed=3, max_tokens=40)
    (alone,) = small_engine(tokenizer, slots=1).generate([PROMPT], free)
    assert list(scheduler.submit(PROMPT, free)) == alone.tokens
    scheduler.close()


class Fails:
    """A constraint that allows everything and fails after so many tokens."""

    def __init__(self, after: int):
        self.after = after

    def start(self):
        return Fails(self.after)

    def allowed(self):
        if self.after == 0:
            raise ConstraintError("too complex")
        return np.full(1, 255, np.uint8)

    def forced(self):
        return []

    def accept(self, token):
        self.after -= 1


@pytest.fixture(params=["before the step", "beside it"])
def masks(request, monkeypatch):
    """When masks are computed, whatever the size of the vocabulary."""
    monkeypatch.setattr(slot_samplers, "_BESIDE", 2**62 if request.param == "before the step" else 1)


@pytest.mark.usefixtures("masks")
@pytest.mark.parametrize("after", [0, 5])
def test_a_constraint_that_fails_ends_its_answer_alone(scheduler, tokenizer, after):
    free = params_of(tokenizer, seed=3, max_tokens=60)
    (alone,) = small_engine(tokenizer, slots=1).generate([PROMPT], free)
    streams = [scheduler.submit(PROMPT, free) for _ in range(2)]
    failing = scheduler.submit(PROMPT, replace(free, constraint=Fails(after), stop=()))
    with pytest.raises(ConstraintError, match="too complex"):
        list(failing)
    assert len(failing.logprobs) == after
    assert [list(stream) for stream in streams] == [alone.tokens] * 2
    wait_until(lambda: scheduler.active == 0)


def test_masks_that_are_computed_beside_the_step_are_those_of_before(tokenizer, grammars, monkeypatch):
    params = params_of(tokenizer, grammars.json_schema(TREE), temperature=0.7)
    engine = small_engine(tokenizer, slots=4)
    texts = []
    for beside in (2**62, 1):
        monkeypatch.setattr(slot_samplers, "_BESIDE", beside)
        texts.append([tokenizer.decode(each.tokens) for each in engine.generate([PROMPT] * 6, params)])
    assert texts[0] == texts[1]
    assert all(jsonschema_rs.is_valid(TREE, json.loads(text)) for text in texts[0])


# --- over HTTP --------------------------------------------------------------------------------------------------------


def form_of(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


def ask(client, response_format, **settings):
    settings = {"messages": HELLO, "max_tokens": 800, "seed": 4, **settings}
    return client.post("/v1/chat/completions", json={**settings, "response_format": response_format})


@pytest.mark.parametrize("form", [form_of(TREE, strict=True), form_of(schema_of(5)), form_of(schema_of(11))])
def test_a_schema_is_followed_streamed_and_whole(client, form):
    (choice,) = ask(client, form).json()["choices"]
    assert choice["finish_reason"] == "stop"
    jsonschema_rs.validate(form["json_schema"]["schema"], json.loads(choice["message"]["content"]))
    *chunks, last = chunks_of(ask(client, form, stream=True))
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == choice["message"]["content"]
    assert last["choices"][0]["finish_reason"] == "stop"


def test_json_object_gives_an_object(client):
    finished = 0
    for seed in range(12):
        (choice,) = ask(client, {"type": "json_object"}, seed=seed).json()["choices"]
        assert choice["message"]["content"].startswith("{")
        if choice["finish_reason"] == "stop":
            finished += 1
            assert isinstance(json.loads(choice["message"]["content"]), dict)
    assert finished >= 6


def test_a_schema_may_be_left_out_and_its_name_may_not(client):
    content = ask(client, {"type": "json_schema", "json_schema": {"name": "any"}}).json()["choices"][0]["message"]
    assert content["content"].startswith("{")
    refused = ask(client, {"type": "json_schema", "json_schema": {"schema": {}}})
    assert refused.status_code == 400
    assert "name" in refused.json()["error"]["message"]


def test_an_answer_too_long_for_its_limit_ends_with_length(client):
    (choice,) = ask(client, form_of(ENDLESS), max_tokens=20).json()["choices"]
    assert choice["finish_reason"] == "length"
    (choice,) = ask(client, form_of(ENDLESS), max_tokens=None).json()["choices"]
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("schema", "said"),
    [({"type": "array", "uniqueItems": True}, "uniqueItems"), ({"type": "strin"}, "strin"), ({"$ref": "#/x"}, "/x")],
)
def test_a_schema_that_cannot_be_enforced_is_refused_before_anything_is_generated(
    client, scheduler, schema, said, stream
):
    before = scheduler.metrics().totals
    response = ask(client, form_of(schema), stream=stream)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (400, "response_format", "invalid_request_error")
    assert error["message"].startswith("response_format: ")
    assert said in error["message"]
    assert scheduler.metrics().totals == before
    assert (scheduler.queued, scheduler.active) == (0, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_form_that_fails_in_the_middle_is_the_requests_error(client, monkeypatch, stream):
    monkeypatch.setattr(Grammar, "start", lambda self: Fails(3))
    response = ask(client, form_of(TREE), stream=stream)
    assert response.status_code == (200 if stream else 400)
    assert "response_format: too complex" in response.text
    assert "[DONE]" not in response.text


def test_text_is_no_constraint(client):
    plain = client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 30, "seed": 4})
    assert ask(client, {"type": "text"}, max_tokens=30).json()["choices"] == plain.json()["choices"]


OUTPUTS = {
    "regex": ({"regex": "order A[0-9]{5}( late)?"}, r"order A[0-9]{5}( late)?"),
    "choice": ({"choice": ["ship it", 'say "no"', "größe"]}, r'ship it|say "no"|größe'),
    "grammar": ({"grammar": 'start: "<" word ("," word)* ">"\nword: /[ab]{1,3}/'}, r"<[ab]{1,3}(,[ab]{1,3})*>"),
    "json": ({"json": {"type": "integer", "minimum": 3, "maximum": 12}}, r"[3-9]|1[012]"),
    "json_object": ({"json_object": True}, r"(?s)\{.*\}"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_vllms_structured_outputs_hold_chats_and_texts_to_their_form(client, kind):
    outputs, pattern = OUTPUTS[kind]
    official = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    more = {"model": "returns", "extra_body": {"structured_outputs": outputs}, "max_tokens": 2000, "n": 2}
    chat = official.chat.completions.create(messages=HELLO, seed=1, **more)
    text = official.completions.create(prompt="the answer is ", seed=2, **more)
    for answer in [*(choice.message.content for choice in chat.choices), *(choice.text for choice in text.choices)]:
        assert re.fullmatch(pattern, answer), answer
    assert {choice.finish_reason for choice in [*chat.choices, *text.choices]} == {"stop"}


def test_a_text_follows_a_schema_as_a_chat_does(client):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    body = {"prompt": "{", "response_format": form, "max_tokens": 2000, "seed": 4}
    (choice,) = client.post("/v1/completions", json=body).json()["choices"]
    assert jsonschema_rs.is_valid(schema, json.loads(choice["text"]))


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ({}, "must have one of"),
        ({"regex": "a", "choice": ["b"]}, "must have one of"),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"grammar": "start: nothing"}, "unknown name"),
        ({"grammar": 'start: % json {"type": "integer", "maximum": -9223372036854775806}'}, "is not taken"),
        ({"grammar": '%llguidance {}\nstart: "a"'}, "is not taken"),
        ({"grammar": "start: " + "a" * 9000}, "may have 8,000"),
        ({"json": {"type": "string", "format": "made-up"}}, "made-up"),
        ({"guided": "a"}, "is not a field"),
    ],
)
def test_structured_outputs_that_cannot_be_kept_to_are_refused(client, outputs, said):
    body = {"messages": HELLO, "structured_outputs": outputs}
    response = client.post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["message"].startswith("structured_outputs")
    assert said in error["message"]


@pytest.mark.parametrize(
    ("other", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"ignore_eos": True}, "ignore_eos"),
    ],
)
def test_what_cannot_be_kept_beside_structured_outputs_is_refused(client, other, param):
    body = {"messages": HELLO, "structured_outputs": {"regex": "a"}, **other}
    response = client.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_thousands_of_choices_and_every_character_of_theirs_are_taken(client):
    texts = [f'order {number}\x7f\x00"\\' for number in range(5000)]
    body = {"messages": HELLO, "structured_outputs": {"choice": texts}, "max_tokens": 100}
    answer = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    assert answer in texts


def test_the_official_client_parses_answers(client):
    class Item(BaseModel):
        policy_id: str | None
        days: int
        eligible: bool

    class Order(BaseModel):
        items: list[Item]
        best: Item

    official = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    completion = official.chat.completions.parse(model="returns", messages=HELLO, response_format=Order, seed=8)
    assert isinstance(completion.choices[0].message.parsed, Order)
    with pytest.raises(openai.LengthFinishReasonError):
        official.chat.completions.parse(model="returns", messages=HELLO, response_format=Order, seed=8, max_tokens=3)
    with official.chat.completions.stream(model="returns", messages=HELLO, response_format=Order, seed=8) as stream:
        stream.until_done()
        streamed = stream.get_final_completion()
    assert streamed.choices[0].message.parsed == completion.choices[0].message.parsed
    text = official.chat.completions.create(
        model="returns", messages=HELLO, response_format={"type": "json_object"}, seed=2
    )
    assert text.choices[0].message.content.startswith("{")
