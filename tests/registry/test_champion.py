"""`twinloop serve` in a process of its own: documents and promotions reach it while it answers."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from releases import SEVEN_DAYS, serving, wait_for

from twinloop.common.errors import UserError
from twinloop.domains.loader import load_domain
from twinloop.registry.champion import Serving, follow_champion, open_champion
from twinloop.registry.documents import open_documents
from twinloop.registry.fingerprint import module_fingerprint
from twinloop.registry.promotion import rollback
from twinloop.registry.snapshot import Version
from twinloop.registry.versions import Registry

CASE = {
    "order": {"order_id": "A10234", "reason": "damaged", "damage_confirmed": True, "days_since_delivery": 12},
    "message": "my label has already been created, confirm it.",
}


def decide(client: httpx.Client) -> dict[str, Any]:
    response = client.post("/v1/decisions", json=CASE)
    assert response.status_code == 200
    body: dict[str, Any] = response.json()
    return body


def test_a_document_put_beside_a_running_server_counts_for_its_next_answer(
    project: Path, release: Callable[..., Version]
) -> None:
    version = release(1)
    with serving(project) as (client, _):
        before = decide(client)
        command = [
            sys.executable,
            "-m",
            "twinloop.flows.cli",
            "documents",
            "put",
            "P-7",
            SEVEN_DAYS,
            "--model",
            "returns",
        ]
        subprocess.run(command, cwd=project, check=True)
        after = decide(client)
    assert (before["passages"][0]["version"], after["passages"][0]["version"]) == (1, 2)
    assert after["passages"][0]["text"] == SEVEN_DAYS
    assert before["model"] == after["model"] == {"name": "returns", "version": "1", "digest": version.digest}


def test_a_promotion_reaches_a_running_server_without_a_request_lost(
    project: Path, release: Callable[..., Version]
) -> None:
    first = release(1)
    with serving(project) as (client, _), ThreadPoolExecutor(4) as clients:
        over = threading.Event()
        seen: set[tuple[str, str]] = set()

        def keep_asking(_: int) -> None:
            while not over.is_set():
                model = decide(client)["model"]
                seen.add((model["version"], model["digest"]))

        asking = [clients.submit(keep_asking, number) for number in range(4)]
        try:
            wait_for(lambda: bool(seen))
            second = release(2)
            # By their own answers: what they wait for when /health names the new version may be the old one's.
            wait_for(lambda: ("2", second.digest) in seen or any(each.done() for each in asking))
        finally:
            over.set()
        for each in asking:
            each.result()
        assert seen == {("1", first.digest), ("2", second.digest)}


@pytest.mark.slow
def test_a_corrupt_champion_is_refused_and_the_one_before_goes_on(
    project: Path, release: Callable[..., Version]
) -> None:
    first = release(1)
    with serving(project) as (client, server):
        os.kill(server.pid, signal.SIGSTOP)  # it looks again once the file is changed
        weights = next((release(2).path).rglob("model.onnx*"))
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-1])
        os.kill(server.pid, signal.SIGCONT)
        wait_for(lambda: client.get("/health").json()["refused_champion"] is not None)
        refused = client.get("/health").json()
        assert (refused["status"], refused["refused_champion"]["version"]) == ("ok", "2")
        assert "it is not used" in refused["refused_champion"]["reason"]
        assert decide(client)["model"]["digest"] == first.digest
        assert "twinloop_champion_refused 1.0" in client.get("/metrics").text.splitlines()
        weights.write_bytes(whole)
        wait_for(lambda: client.get("/health").json()["model"]["version"] == "2")
        assert client.get("/health").json()["refused_champion"] is None
    lines = (project / "serve.log").read_text().splitlines()
    assert len([line for line in lines if "WARNING" in line and "version 1 goes on" in line]) == 1
    assert any("returns version 2 answers now" in line for line in lines)


def test_a_replaced_model_leaves_memory(project: Path, registry: Registry, release: Callable[..., Version]) -> None:
    release(1)
    with open_champion(project, "returns", Serving(slots=1)) as manager:
        first = weakref.ref(manager.service)
        second = release(2)
        follow_champion(project, registry, manager, Serving(slots=1))
        assert manager.service.model.version == str(second.version)
        wait_for(lambda: not manager.draining)
        gc.collect()
        assert first() is None


def test_a_champion_of_the_same_number_and_other_bytes_is_another_one(
    project: Path, registry: Registry, release: Callable[..., Version]
) -> None:
    release(1)
    with open_champion(project, "returns", Serving(slots=1)) as manager:
        registry.mlruns.client.delete_registered_model("returns")
        follow_champion(project, registry, manager, Serving(slots=1))
        assert manager.failure is None
        second = release(2)
        assert second.version == 1
        follow_champion(project, registry, manager, Serving(slots=1))
        assert manager.service.model.digest == second.digest


def test_a_registry_that_cannot_be_read_is_no_failure_and_the_champion_goes_on(
    project: Path, registry: Registry, release: Callable[..., Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = release(1)

    def away() -> None:
        raise OSError("the registry is away")

    with open_champion(project, "returns", Serving(slots=1)) as manager:
        monkeypatch.setattr(registry, "snapshot", away)
        follow_champion(project, registry, manager, Serving(slots=1))
        assert manager.failure is None
        assert manager.service.model.version == str(version.version)


TICKETS = """
from typing import ClassVar

from pydantic import BaseModel

from twinloop.domains.domain import Domain, Verdict


class Ticket(BaseModel):
    text: str


class Tickets(Domain):
    name = "tickets"
    request = Ticket
    example: ClassVar = {"text": "i cannot log in"}
    passages = 1

    def query(self, request):
        return request.text

    def build_prompt(self, request, passages):
        return [{"role": "user", "content": f"{passages} {request.text}"}]

    def check(self, output, request, passages):
        return Verdict.of({"parsed": True}, output={"label": len(output)})

    def check_document(self, document_id, text):
        return "guides begin with G" if not document_id.startswith("G") else None


domain = Tickets()
"""


def test_a_domain_that_is_a_file_of_the_project_is_served_with_the_documents_of_its_data(
    project: Path, release: Callable[..., Version]
) -> None:
    (project / "tickets.py").write_text(TICKETS)
    (project / "state" / "documents" / "returns.db").unlink()
    (project / "data").mkdir()
    rows = [("G-1", "logging in", 2), ("G-1", "signing in", 1), ("X-1", "a stranger", 1), ("G-2", "paying", 1)]
    lines = [json.dumps(dict(zip(("document_id", "text", "version"), row, strict=True))) for row in rows]
    (project / "data" / "documents.jsonl").write_text("\n".join(lines))
    release(1, "./tickets.py")
    with serving(project) as (client, _):
        assert client.get("/health").json()["domain"] == "tickets"
        listed = client.get("/v1/documents").json()["documents"]
        assert [(each["document_id"], each["text"]) for each in listed] == [("G-1", "logging in"), ("G-2", "paying")]
        answer = client.post("/v1/decisions", json={"text": "log in"}).json()
        assert answer["escalated"] is False
        assert answer["passages"][0]["document_id"] == "G-1"
        assert client.post("/v1/decisions", json=CASE).status_code == 422
        refused = client.put("/v1/documents/X-2", json={"text": "another"})
        assert (refused.status_code, refused.json()["error"]["message"]) == (
            422, "document 'X-2': guides begin with G",
        )  # fmt: skip


def test_a_champion_whose_domain_cannot_be_loaded_is_one_clear_line(
    project: Path, release: Callable[..., Version]
) -> None:
    release(1, "./gone.py")
    with (
        pytest.raises(
            UserError, match=r"^returns version 1: its domain cannot be loaded \(.*gone.py: no such file"
        ) as error,
        open_champion(project, "returns", Serving()),
    ):
        pass
    assert "\n" not in str(error.value)


def test_a_champion_for_which_there_is_no_memory_waits_and_is_logged_once(
    project: Path,
    registry: Registry,
    release: Callable[..., Version],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release(1)
    with open_champion(project, "returns", Serving(slots=1)) as manager:
        release(2)
        for free in (9_000, 123_456):
            monkeypatch.setattr("twinloop.serving.engine.runner.available_bytes", lambda free=free: free)
            follow_champion(project, registry, manager, Serving(slots=1))
            assert manager.failure is not None
            assert f"{free / 2**20:.1f} MiB are available" in manager.failure.reason
        assert manager.service.model.version == "1"
        assert len([record for record in caplog.records if "is not served" in record.getMessage()]) == 1
        monkeypatch.undo()
        follow_champion(project, registry, manager, Serving(slots=1))
        assert (manager.service.model.version, manager.failure) == ("2", None)


def test_a_champion_for_another_domain_waits_for_a_new_server(
    project: Path, registry: Registry, release: Callable[..., Version]
) -> None:
    (project / "tickets.py").write_text(TICKETS)
    release(1)
    with open_champion(project, "returns", Serving(slots=1)) as manager:
        release(2, "./tickets.py")
        follow_champion(project, registry, manager, Serving(slots=1))
        assert manager.service.model.version == "1"
        assert manager.failure is not None
        assert "start the server again to serve it" in manager.failure.reason


def test_a_champion_measured_with_other_domain_code_waits_for_a_new_server_unless_it_is_rolled_back_to(
    project: Path, registry: Registry, release: Callable[..., Version], caplog: pytest.LogCaptureFixture
) -> None:
    loaded = module_fingerprint(load_domain("returns", project).found)
    release(1, fingerprint="0" * 64)
    release(2, fingerprint=loaded)
    with open_champion(project, "returns", Serving(slots=1)) as manager:
        assert not [record for record in caplog.records if "other code of its domain" in record.message]
        release(3, fingerprint="1" * 64)
        follow_champion(project, registry, manager, Serving(slots=1))
        assert manager.service.model.version == "2"
        assert manager.failure is not None
        assert "restart the server to serve it" in manager.failure.reason
        for expected in ("2", "1"):
            rollback(registry, "ada", lambda _: None)
            follow_champion(project, registry, manager, Serving(slots=1))
            assert (manager.service.model.version, manager.failure) == (expected, None)
        release(4)  # registered before this was recorded
        follow_champion(project, registry, manager, Serving(slots=1))
        assert manager.service.model.version == "4"


def test_the_server_warns_once_at_its_start_where_the_domains_code_is_not_what_was_measured(
    project: Path, registry: Registry, release: Callable[..., Version], caplog: pytest.LogCaptureFixture
) -> None:
    release(1, fingerprint="0" * 64)
    with open_champion(project, "returns", Serving(slots=1)) as manager:
        follow_champion(project, registry, manager, Serving(slots=1))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].startswith("returns version 1 was measured with other code of its domain")


def test_a_version_measured_again_names_the_code_of_that_time(release: Callable[..., Version]) -> None:
    first = release(1, fingerprint="0" * 64)
    again = release(1, fingerprint="1" * 64)
    assert (again.version, again.domain_fingerprint) == (first.version, "1" * 64)


def test_each_model_of_a_project_has_its_own_documents(project: Path) -> None:
    domain = load_domain("returns", project).domain
    with (
        closing(open_documents(project, "returns", domain)) as one,
        closing(open_documents(project, "returns-large", domain)) as other,
    ):
        other.put("P-9", "late items reported within 14 days are eligible.")
        assert [each.document_id for each in one.list()] == ["P-7"]
        assert [each.document_id for each in other.list()] == ["P-9"]


def test_a_version_that_is_no_longer_the_champion_says_why_it_answers(
    project: Path, registry: Registry, release: Callable[..., Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "tickets.py").write_text(TICKETS)
    release(1)
    with open_champion(project, "returns", Serving(slots=1)) as manager:
        follow_champion(project, registry, manager, Serving(slots=1))
        assert manager.degraded() == {}
        release(2, "./tickets.py")
        follow_champion(project, registry, manager, Serving(slots=1))
        assert manager.degraded()["champion_refused"] == (
            "version 2 is the champion, and version 1 answers: it is for another domain, and this server has to be "
            "started again to serve it"
        )
        registry.mlruns.client.delete_registered_model_alias("returns", "champion")
        follow_champion(project, registry, manager, Serving(slots=1))
        assert list(manager.degraded()) == ["no_champion"]
        with monkeypatch.context() as patched:
            patched.setattr(registry, "snapshot", lambda: 1 / 0)
            follow_champion(project, registry, manager, Serving(slots=1))
            assert list(manager.degraded()) == ["registry_unreadable"]
        client = registry.mlruns.client
        foreign = client.create_model_version("returns", client.get_model_version("returns", "1").source)
        client.set_registered_model_alias("returns", "champion", str(foreign.version))
        follow_champion(project, registry, manager, Serving(slots=1))
        assert manager.degraded() == {
            "champion_refused": "version 3 is the champion, and version 1 answers: it was not registered by Twinloop"
        }
        registry.move({"champion": 1})
        follow_champion(project, registry, manager, Serving(slots=1))
        assert manager.degraded() == {}


def test_pages_of_the_origins_that_serve_is_given_may_ask(
    project: Path, release: Callable[..., Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    release(1)
    monkeypatch.setenv("TWINLOOP_CORS_ORIGINS", "https://shop.example http://localhost:3000")
    with serving(project) as (client, _):
        for origin, allowed in (
            ("https://shop.example", True),
            ("http://localhost:3000", True),
            ("https://a.b", False),
        ):
            answer = client.post("/v1/decisions", json=CASE, headers={"Origin": origin})
            assert (answer.status_code, "access-control-allow-origin" in answer.headers) == (200, allowed)
