"""The verifier's audit: before it gives rewards, wrong answers that look right are tried on it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from prefect import task

from twinloop.common.errors import UserError
from twinloop.domains.domain import domain_code
from twinloop.domains.loader import LoadedDomain
from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context, Report

AUDITED_CASES = 500
"""With their wrong answers, some 15,000 outputs in about a second."""


def check_auditable(loaded: LoadedDomain) -> None:
    """Raise UserError where the domain lacks what an audit needs, and so what rewards of a verifier need."""
    from twinloop.evaluation.audit import NEEDED

    if missing := [part for part in NEEDED if not loaded.domain.has(part)]:
        raise UserError(
            f"{loaded.file}: the domain {loaded.domain.name} defines no {', no '.join(missing)}; its verifier "
            "gives the rewards of RL, and cannot be audited without them"
        )


def audit_stage(context: Context, *, data: Artifact) -> Artifact:
    """audit.json. Raises UserError when a single wrong answer would be rewarded: no RL runs on such a verifier."""
    loaded = context.loaded_domain
    check_auditable(loaded)

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        from twinloop.evaluation.audit import audit_verifier
        from twinloop.records.validated import read_records

        facts = []
        for number, record in enumerate(islice(read_records(data.path, "prompts"), AUDITED_CASES), 1):
            with domain_code(loaded.domain, "read_facts", f"prompt {number}"):
                facts.append(loaded.domain.read_facts(record))
        done = audit_verifier(loaded.domain, facts)
        if not done.passed:
            worst = f"; for example {done.misjudged[0].output!r}" if done.misjudged else ""
            raise UserError(f"{loaded.file}: {done.summary}{worst}")
        (out / "audit.json").write_text(done.model_dump_json(indent=1) + "\n")
        return {"gold_answers": done.gold_answers, "refused": sum(done.tried.values()), "kinds": len(done.tried)}

    return context.run(
        "audit", work, settings={}, inputs={"data": data}, modules=("twinloop.tasks.audit",), uses_domain=True
    )


audit = task(name="audit", persist_result=False)(audit_stage)
