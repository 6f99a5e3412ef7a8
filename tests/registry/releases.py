"""Gate reports, champions and their history, as the tests of promotion ask for them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import httpx

from twinloop.evaluation.gate import GateReport, Reason
from twinloop.registry import promotion as promote_module
from twinloop.registry.artifact import Artifact
from twinloop.registry.promotion import LEDGER_HEAD, Promotion, open_ledger
from twinloop.registry.reconcile import ways_back
from twinloop.registry.snapshot import Served, Version
from twinloop.registry.versions import Registry

SEVEN_DAYS = "damaged items reported within 7 days are eligible."
Export = Callable[[str], Version]
Make = Callable[..., Artifact]


def ship(version: Version, decision: Literal["SHIP", "BLOCK"] = "SHIP", rules: str = "r1") -> GateReport:
    reason = Reason(rule="golden_pass_rate", reason="policy regression", owner="SFT data", measured=0.9, limit=1.0)
    reasons = () if decision == "SHIP" else (reason,)
    return GateReport(decision=decision, reasons=reasons, checks=(), candidate=version.digest, rules_digest=rules)


def loads(version: Served) -> None:
    assert (version.path / "model.onnx").exists()


def champions(registry: Registry) -> dict[str, int]:
    return registry.snapshot().aliases


def lines(registry: Registry) -> list[bytes]:
    return open_ledger(registry.mlruns).path.read_bytes().splitlines()


def history(registry: Registry) -> list[Promotion]:
    """Every move of the champion, oldest first."""
    head = registry.snapshot().tags.get(LEDGER_HEAD)
    return [Promotion.of(entry) for entry in open_ledger(registry.mlruns).read(head=head).committed(registry.name)]


def recover(registry: Registry) -> None:
    """What every promotion and rollback does first: finish what a dead process had begun."""
    with promote_module._locked_ledger(registry, "ada"):
        pass


def agrees(registry: Registry) -> None:
    """The ledger is whole, nothing is pending, and its champion is MLflow's."""
    contents = open_ledger(registry.mlruns).read(head=registry.snapshot().tags["ledger_head"])
    assert contents.pending() is None
    assert not contents.torn
    champion = contents.champions(registry.name).current
    assert champion
    assert champion.version == champions(registry)["champion"]


def consistent(registry: Registry) -> None:
    """As `agrees`, and all aliases are where a move leaves them."""
    agrees(registry)
    contents = open_ledger(registry.mlruns).read()
    if contents.entries[-1].event == "commit":  # else somebody moved the champion in MLflow, and perhaps `previous`
        back = [version.version for version in ways_back(registry.snapshot(), contents.champions(registry.name))]
        assert back[:1] == ([champions(registry)["previous"]] if "previous" in champions(registry) else [])
    assert registry.resolve("champion")


@contextmanager
def serving(project: Path, *options: str) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    """`twinloop serve` in a process of its own, and a client of it."""
    log = (project / "serve.log").open("w")
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "twinloop.flows.cli", "serve", "--model", "returns", "--port", "0", "--slots", "2"),
            *options,
        ],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split()[0]
        with httpx.Client(base_url=address, timeout=120, trust_env=False) as client:
            yield client, server
    finally:
        server.terminate()
        assert server.wait(120) == 0
        log.close()


def wait_for(holds: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
