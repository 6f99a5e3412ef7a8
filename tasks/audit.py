"""The verifier's audit: before it pays rewards, wrong answers that look right are tried on it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from twinloop.common.errors import UserError
from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context, Report

AUDITED_CASES = 500
"""With their mutations, some 15,000 outputs in about a second."""


@task(name="audit", cache_policy=NO_CACHE)
def audit(context: Context, *, data: Artifact) -> Artifact:
    """audit.json. Raises UserError when a single wrong answer would be paid: no RL runs on such a verifier."""

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        from twinloop.domains.returns.mutations import good_answer, mutate, shortcuts
        from twinloop.domains.returns.verifier import Facts, verify
        from twinloop.evaluation.audit import audit_verifier
        from twinloop.records.validated import read_records

        records = islice(read_records(data.path, "prompts"), AUDITED_CASES)
        facts = [Facts.from_record(record["facts"]) for record in records]
        found = audit_verifier(verify, [(good_answer(each), each) for each in facts], mutate, shortcuts)
        if not found.passed:
            worst = found.slips[0].output if found.slips else ""
            raise UserError(f"domains/returns/verifier.py: {found.summary}; for example {worst!r}")
        (out / "audit.json").write_text(found.model_dump_json(indent=1) + "\n")
        return {"goods": found.goods, "refused": sum(found.tried.values()), "kinds": len(found.tried)}

    return context.run("audit", work, settings={}, inputs={"data": data}, modules=("twinloop.tasks.audit",))
