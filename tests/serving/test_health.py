"""/health, /metrics and /v1/models say what the model is for, and what is not as it should be while it answers."""

import pytest
from served import DOMAIN, HELLO, MODEL, POLICIES, ScriptedScheduler, make_store, running

from twinloop.domains.chat import Chat
from twinloop.domains.classification import Classification
from twinloop.domains.domain import Domain
from twinloop.domains.reasoning import Reasoning
from twinloop.domains.returns.domain import Returns
from twinloop.serving.api import create_app
from twinloop.serving.decisions import DecisionService
from twinloop.serving.knowledge.history import contents_digest
from twinloop.serving.model_manager import ModelManager, ServeFailure

DECISIONS, CHAT, TEXT = "/v1/decisions", "/v1/chat/completions", "/v1/completions"


class Greeter(Domain):
    """Greets whoever comes,
    by their name.

    This is not shown.
    """

    name = "greeter"


class Named(Greeter):
    description = "Greets people."


def serve(folder, tokenizer, domain, measured=None):
    """A manager of this domain's service, and its application."""
    store = make_store(folder, domain) if domain.passages else make_store(folder, DOMAIN)
    service = DecisionService(ScriptedScheduler(tokenizer), tokenizer, store, MODEL, domain, None, measured)
    manager = ModelManager(service)
    return manager, create_app(manager)


@pytest.mark.parametrize(
    ("domain", "routes", "said"),
    [
        (Returns(), [DECISIONS], "Orders, return policies"),
        (Classification(labels=["a", "b"]), [DECISIONS], "Texts and their labels"),
        (Reasoning(), [DECISIONS], "Worked answers"),
        (Chat(), [CHAT, TEXT], "An assistant"),
        (DOMAIN, [DECISIONS, CHAT, TEXT], "The returns domain, with chat"),
        (Greeter(), [CHAT, TEXT], "Greets whoever comes, by their name."),
        (Named(), [CHAT, TEXT], "Greets people."),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_model_says_what_it_is_for_and_is_asked_only_there(tmp_path, tokenizer, domain, routes, said):
    _, app = serve(tmp_path, tokenizer, domain)
    with running(app) as client:
        health, model = client.get("/health").json(), client.get("/v1/models").json()["data"][0]
        purpose = health["purpose"]
        assert (health["domain"], model["domain"]) == (domain.name, domain.name)
        assert purpose == {name: model[name] for name in ("description", "routes", "prompt")}
        assert purpose["routes"] == routes
        assert purpose["description"].startswith(said)
        assert "not shown" not in purpose["description"]
        assert ("messages of a chat" in purpose["prompt"]) == (CHAT in routes)
        for path in {DECISIONS, CHAT, TEXT} - set(routes):
            for answer in (client.post(path, json={"messages": HELLO}), client.post(path), client.get(path)):
                assert answer.status_code == 404
                assert answer.json()["error"]["message"].endswith(f"it answers POST {' and POST '.join(routes)}")
            assert path not in client.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        ({"failure": ServeFailure("4", "/secret: corrupt")}, "champion_refused", "version 4 is the champion, and vers"),
        ({"unknown_champion": "no_champion"}, "no_champion", "no version is the champion any more; version 3 goes on"),
        ({"unknown_champion": "registry_unreadable"}, "registry_unreadable", "the registry cannot be read"),
    ],
)
def test_a_version_that_is_no_longer_the_champion_says_so_and_answers(tmp_path, tokenizer, change, reason, said):
    manager, app = serve(tmp_path, tokenizer, Returns(), contents_digest(POLICIES))
    with running(app) as client:
        assert client.get("/health").json()["degraded"] == {}
        assert "twinloop_degraded{reason=" + f'"{reason}"' + "} 0.0" in client.get("/metrics").text.splitlines()
        for name, value in change.items():
            setattr(manager, name, value)
        health = client.get("/health")
        assert (health.status_code, health.json()["status"]) == (200, "ok")
        assert list(health.json()["degraded"]) == [reason]
        assert health.json()["degraded"][reason].startswith(said)
        assert "secret" not in health.text
        assert "twinloop_degraded{reason=" + f'"{reason}"' + "} 1.0" in client.get("/metrics").text.splitlines()


def test_documents_that_are_not_those_of_the_training_say_so_until_they_are(tmp_path, tokenizer):
    _, app = serve(tmp_path, tokenizer, Returns(), contents_digest(POLICIES))
    with running(app) as client:
        assert client.get("/health").json()["index"]["contents"] == contents_digest(POLICIES)
        old = client.get("/v1/documents/P-7").json()["versions"][0]["text"]
        for text, differs in ((old.replace("30", "7"), True), (old, False)):
            assert client.put("/v1/documents/P-7", json={"text": text}).status_code == 200
            health = client.get("/health").json()
            assert ("documents_differ" in health["degraded"]) is differs
            assert health["index"]["measured_with"] == contents_digest(POLICIES)
            gauge = "twinloop_degraded{reason=" + f'"documents_differ"}} {float(differs)}'
            assert gauge in client.get("/metrics").text.splitlines()


def test_where_it_was_not_recorded_with_which_documents_a_model_was_trained_nothing_is_claimed(tmp_path, tokenizer):
    _, app = serve(tmp_path, tokenizer, Returns())
    with running(app) as client:
        health = client.get("/health").json()
        assert (health["degraded"], health["index"]["measured_with"]) == ({}, None)
