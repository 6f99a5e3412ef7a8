"""The champion moved through `twinloop serve`: by the registry's rules, and in the ledger as asked for over HTTP."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from releases import history, serving, ship, wait_for

from twinloop.flows.releases import ProjectReleases
from twinloop.registry.artifact import Artifact
from twinloop.registry.gates import record_gate
from twinloop.registry.snapshot import Version
from twinloop.registry.versions import Lineage, Registry

Release = Callable[..., Version]


def served(client) -> str:
    return client.get("/health").json()["model"]["version"]


@pytest.mark.slow
def test_a_champion_is_rolled_back_and_promoted_again_over_http(
    project: Path, registry: Registry, release: Release
) -> None:
    first, second = release(1), release(2)
    with serving(project) as (client, _):
        listed = client.get("/v1/versions").json()
        aliases = {each["version"]: each["aliases"] for each in listed["versions"]}
        assert aliases == {first.version: ["previous"], second.version: ["champion"]}
        assert (listed["served"], listed["served_is_champion"]) == (second.version, True)

        done = client.post("/v1/rollback").json()
        assert (done["action"], done["from_version"], done["to_version"]) == ("rollback", second.version, first.version)
        assert "A10234" in done["smoke_test"]
        assert done["who"].endswith(" over HTTP from 127.0.0.1")
        wait_for(lambda: client.get("/v1/versions").json()["served_is_champion"])
        assert served(client) == str(first.version)

        refused = client.post(f"/v1/versions/{second.version}/promote")
        assert refused.status_code == 409  # taken back, and nothing new is known of it
        assert "after this same gate report" in refused.json()["error"]["message"]

        record_gate(registry, second, ship(second, rules="r2"))
        done = client.post(f"/v1/versions/{second.version}/promote").json()
        assert (done["action"], done["to_version"], done["smoke_test"]) == ("promote", second.version, None)
        wait_for(lambda: served(client) == str(second.version))
        moves = client.get("/v1/moves").json()["moves"]
    recorded = history(registry)
    assert [(move["action"], move["who"]) for move in moves] == [(each.action, each.who) for each in reversed(recorded)]
    assert [each.action for each in recorded] == ["promote", "promote", "rollback", "promote"]


def test_what_may_not_be_promoted_is_refused_without_naming_a_place(
    project: Path, registry: Registry, release: Release, exported: Callable[[str], Version]
) -> None:
    release(1)
    blocked, changed = exported("w1"), exported("w2")
    record_gate(registry, blocked, ship(blocked, "BLOCK"))
    record_gate(registry, changed, ship(changed))
    (changed.path / "model.onnx").write_text("w3")
    with serving(project) as (client, _):
        detail = client.get(f"/v1/versions/{blocked.version}").json()
        assert detail["gate_report"]["reasons"] == [
            {"rule": "golden_pass_rate", "reason": "policy regression", "owner": "SFT data"}
        ]
        assert {origin["kind"] for origin in detail["origins"]} >= {"export", "dataset", "recipe", "code"}
        for version, said in ((blocked, "its gate says BLOCK"), (changed, "it is not used")):
            refused = client.post(f"/v1/versions/{version.version}/promote")
            assert refused.status_code == 409
            message = refused.json()["error"]["message"]
            assert said in message
            assert str(project) not in message
        assert client.post("/v1/versions/99/promote").status_code == 404
        assert client.post("/v1/rollback").status_code == 409
    assert len(history(registry)) == 1


def test_a_recipe_is_named_without_its_place(
    project: Path, registry: Registry, make: Callable[..., Artifact], lineage: Lineage
) -> None:
    for recipe, shown in (("recipes/returns.yaml", "recipes/returns.yaml"), ("/elsewhere/own.yaml", "own.yaml")):
        given = replace(lineage, recipe=str(project / recipe))
        version = registry.register(make("export", recipe).path, given, servable=True)
        detail = ProjectReleases(project, "returns").version(version.version)
        assert detail is not None
        assert [origin.name for origin in detail.origins if origin.kind == "recipe"] == [shown]


def test_a_gate_report_that_was_changed_is_no_report(project: Path, registry: Registry, release: Release) -> None:
    version = release(1)
    [report] = (registry.mlruns.root / "gates").iterdir()
    report.write_text("{}")
    detail = ProjectReleases(project, "returns").version(version.version)
    assert detail is not None
    assert detail.gate_report is not None
    assert detail.gate_report.rules == []
    assert "run the gate again" in (detail.gate_report.problem or "")


READS_AND_MOVES = """
import sys
from pathlib import Path
from twinloop.flows.releases import ProjectReleases
from twinloop.serving.versions_api import MoveRefusedError
releases = ProjectReleases(Path(sys.argv[1]), "returns")
[version] = releases.versions()
assert releases.version(version.version).gate_report.decision == "SHIP"
assert len(releases.moves()) == 1
assert releases.promote(version.version, "over HTTP").to_version == version.version
try:
    releases.roll_back("over HTTP")
except MoveRefusedError as error:
    print(error)
print([name for name in ("mlflow", "prefect", "torch") if name in sys.modules])
"""


def test_the_server_imports_neither_mlflow_nor_prefect_to_read_and_to_move(project: Path, release: Release) -> None:
    release(1)
    done = subprocess.run(
        [sys.executable, "-c", READS_AND_MOVES, str(project)], capture_output=True, text=True, timeout=120, check=True
    )
    refused, imported = done.stdout.splitlines()
    assert "nothing to roll back to" in refused
    assert imported == "[]"
