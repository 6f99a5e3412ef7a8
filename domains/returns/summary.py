"""What a data set holds, in numbers: a small file in git, so that a change of the data shows in review.

`python -m twinloop.domains.returns.summary` reads data/ and writes data_summary.json; `dvc metrics diff` compares two.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twinloop.domains.returns.policies import window_days
from twinloop.domains.returns.verifier import PREDICATES, Facts, verify

EDGE_DAYS = 3
"""So near to the end of the window a case counts as one at its edge."""


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _passing(answers: Iterator[tuple[str, Facts]]) -> dict[str, float]:
    """Share of answers that the verifier accepts, and that hold each predicate."""
    held: Counter[str] = Counter()
    total = 0
    for answer, facts in answers:
        verdict = verify(answer, facts)
        held.update(name for name, holds in verdict.checks.items() if holds)
        held["all"] += verdict.passed
        total += 1
    return {name: round(held[name] / max(1, total), 4) for name in ("all", *PREDICATES)}


def _cases(path: Path) -> dict[str, Any]:
    kinds: Counter[str] = Counter()
    eligible = edge = 0
    for case in _records(path):
        facts = Facts.from_record(case["facts"])
        window = window_days(facts.policy.text)
        assert window is not None, f"case {case['case_id']}: its policy names no window"
        kinds[case["kind"]] += 1
        eligible += case["expected"]["eligible"]
        edge += abs(window - facts.order.days_since_delivery) <= EDGE_DAYS
    total = sum(kinds.values())
    return {
        "kinds": dict(sorted(kinds.items())),
        "eligible": round(eligible / total, 4),
        "edge": round(edge / total, 4),
    }


def summarise(data: Path) -> dict[str, Any]:
    """Records of each file; what the verifier accepts of demonstrations and preferences; the mix of the cases."""
    sft = ((r["messages"][-1]["content"], Facts.from_record(r["facts"])) for r in _records(data / "chat.jsonl"))
    preferences = [
        (r["chosen"], r["rejected"], Facts.from_record(r["facts"])) for r in _records(data / "preferences.jsonl")
    ]
    return {
        "records": {path.stem: sum(1 for _ in path.open("rb")) for path in sorted(data.glob("*.jsonl"))},
        "chat": {"passing": _passing(sft)},
        "preferences": {
            "chosen_passing": _passing((chosen, facts) for chosen, _, facts in preferences)["all"],
            "rejected_passing": _passing((rejected, facts) for _, rejected, facts in preferences)["all"],
        },
        "cases": _cases(data / "cases.jsonl"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("data_summary.json"))
    arguments = parser.parse_args()
    arguments.out.write_text(json.dumps(summarise(arguments.data), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
