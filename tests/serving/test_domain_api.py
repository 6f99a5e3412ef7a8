"""The HTTP interface of other domains: their routes, their words, their fields."""

import hashlib
import json
import re
import threading

import pytest
from pydantic import BaseModel, Field
from served import CASE, GOOD, HELLO, make_app, running

from twinloop.domains.domain import Domain, Verdict
from twinloop.domains.returns.domain import Returns
from twinloop.serving.metrics import MOST_NAMES

# --- other domains ----------------------------------------------------------------------------------------------------


class Sender(BaseModel):
    year: int = Field(ge=2000, description="the year in which the account was made")


class Ticket(BaseModel):
    text: str = Field(max_length=40, description="the ticket's words")
    sender: Sender | None = None
    body: list[Sender] = []


class Tickets(Domain):
    """A label for a ticket, without documents."""

    name = "tickets"
    request = Ticket

    def build_prompt(self, request, passages):
        return [{"role": "user", "content": request.text}]

    def check(self, output, request, passages):
        return Verdict.of({"parsed": output in ("late", "damaged")}, output=output)

    def answer_schema(self):
        return {"type": "string", "enum": ["late", "damaged"]}

    def outcome(self, output):
        return output


class Chat(Domain):
    name = "chat"


@pytest.fixture
def tickets(tmp_path, script, tokenizer):
    script.script = "late"
    with running(make_app(tmp_path, script, tokenizer, domain=Tickets())) as client:
        yield client


def test_a_domain_of_labels_is_served_and_described(tickets):
    answer = tickets.post("/v1/decisions", json={"text": "where is it?"}).json()
    assert (answer["decision"], answer["escalated"], answer["passages"]) == ("late", False, [])
    assert 'twinloop_decisions_total{outcome="late"} 1.0' in tickets.get("/metrics").text.splitlines()
    schemas = tickets.get("/openapi.json").json()["components"]["schemas"]
    assert schemas["Ticket"]["properties"]["text"]["description"] == "the ticket's words"
    assert schemas["DecisionResponse"]["properties"]["decision"]["anyOf"][0]["enum"] == ["late", "damaged"]


class Nested(Tickets):
    def answer_schema(self):
        return Answer.model_json_schema()


class Answer(BaseModel):
    senders: list[Sender]
    replies: list["Answer"] = []


def test_every_reference_of_the_description_names_what_it_holds(tmp_path, script, tokenizer):
    with running(make_app(tmp_path, script, tokenizer, domain=Nested())) as client:
        described = client.get("/openapi.json").json()
    references = set(re.findall(r'"\$ref": "([^"]*)"', json.dumps(described)))
    assert len(references) > 2
    for reference in references:
        found = described
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
    assert set(described["components"]["schemas"]["Decision.Answer"]["properties"]) == {"senders", "replies"}


class Unnamed(Tickets):
    def outcome(self, output):
        raise KeyError(output)


class Unsendable(Tickets):
    def check(self, output, request, passages):
        return Verdict.of({"parsed": True}, output={"label": object()})


@pytest.mark.parametrize(("domain", "error"), [(Unnamed(), "KeyError"), (Unsendable(), "PydanticSerializationError")])
def test_a_decision_that_cannot_be_named_or_sent_is_escalated(tmp_path, script, tokenizer, domain, error):
    script.script = "late"
    with running(make_app(tmp_path, script, tokenizer, domain=domain)) as client:
        answered = client.post("/v1/decisions", json={"text": "where is it?"})
        assert answered.status_code == 200
        assert (answered.json()["decision"], answered.json()["escalated"]) == (None, True)
        assert answered.json()["reasons"][0]["reason"] == f"the answer could not be checked ({error})"
        assert 'twinloop_decisions_total{outcome="escalated"} 1.0' in client.get("/metrics").text.splitlines()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "text: is required"),
        ({"text": "x" * 41}, "text: string should have at most 40 characters (the ticket's words)"),
        ({"text": "x", "sender": {}}, "sender.year: is required"),
        ({"text": "x", "sender": {"year": 1}}, "equal to 2000 (the year in which the account was made)"),
        (
            {"text": "x", "body": [{"year": 2001}, {"year": 1}]},
            "body.1.year: should be greater than or equal to 2000 (the",
        ),
    ],
)
def test_what_is_wrong_with_a_request_is_said_in_the_domains_words(tickets, body, said):
    refused = tickets.post("/v1/decisions", json=body)
    assert refused.status_code == 422
    assert said in refused.json()["error"]["message"]


def test_what_a_domain_does_not_serve_is_404_and_names_what_it_serves(tickets, tmp_path, script, tokenizer):
    refused = tickets.post("/v1/chat/completions", json={"messages": HELLO})
    assert refused.status_code == 404
    assert "domain is tickets; it answers POST /v1/decisions" in refused.json()["error"]["message"]
    with running(make_app(tmp_path, script, tokenizer, domain=Chat())) as client:
        refused = client.post("/v1/decisions", json=CASE)
        assert refused.status_code == 404
        assert "domain is chat; it answers POST /v1/chat/completions" in refused.json()["error"]["message"]
        assert client.post("/v1/chat/completions", json={"messages": HELLO}).status_code == 200
        assert client.get("/v1/models/returns").json()["routes"] == ["/v1/chat/completions", "/v1/completions"]


def test_health_and_models_say_what_the_model_is_for(tickets):
    assert tickets.get("/health").json()["domain"] == "tickets"
    [model] = tickets.get("/v1/models").json()["data"]
    assert (model["domain"], model["routes"]) == ("tickets", ["/v1/decisions"])


def test_the_returns_domain_serves_no_chat(tmp_path, script, tokenizer):
    with running(make_app(tmp_path, script, tokenizer, domain=Returns())) as client:
        assert client.post("/v1/chat/completions", json={"messages": HELLO}).status_code == 404
        assert client.post("/v1/decisions", json=CASE).json()["decision"] == json.loads(GOOD)


def test_outcomes_named_by_what_was_asked_do_not_fill_the_metrics(tmp_path, script, tokenizer):
    class Careless(Returns):
        def outcome(self, output):
            return f"answer {next(numbers)}"

    numbers = iter(range(MOST_NAMES + 50))
    with running(make_app(tmp_path, script, tokenizer, domain=Careless())) as client:
        for _ in range(MOST_NAMES + 50):
            client.post("/v1/decisions", json=CASE)
        lines = client.get("/metrics").text.splitlines()
    counted = [line for line in lines if line.startswith("twinloop_decisions_total")]
    assert len(counted) == MOST_NAMES + 1
    assert 'twinloop_decisions_total{outcome="other"} 50.0' in counted


def test_ids_of_documents_may_hold_slashes(tickets):
    assert tickets.put("/v1/documents/guide/1.2%20a", json={"text": "any text"}).json()["document_id"] == "guide/1.2 a"
    [version] = tickets.get("/v1/documents/guide/1.2%20a").json()["versions"]
    assert (version["version"], version["text"]) == (1, "any text")
    assert version["recorded_at"]


def test_two_applications_count_for_themselves(tickets, scripted):
    tickets.post("/v1/decisions", json={"text": "where is it?"})
    assert "twinloop_decisions_total" not in [line.split("{")[0] for line in scripted.get("/metrics").text.splitlines()]
    assert "process_cpu_seconds_total" not in scripted.get("/metrics").text


def test_the_digest_in_a_list_of_documents_is_that_of_the_list(tickets):
    def put_many():
        for number in range(60):
            tickets.put(f"/v1/documents/Q-{number}", json={"text": f"text {number}"})

    writer = threading.Thread(target=put_many)
    writer.start()
    lists = []
    while writer.is_alive():
        lists.append(tickets.get("/v1/documents").json())
    writer.join()
    assert len({listed["digest"] for listed in lists}) > 1
    for listed in lists:  # in the order in which they were put
        digest = hashlib.sha256()
        for each in listed["documents"]:
            digest.update(json.dumps([each["document_id"], each["version"], each["text"]]).encode() + b"\n")
        assert listed["digest"] == digest.hexdigest()
