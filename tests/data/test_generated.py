"""What the generated data promises: the same from one seed, held-out is held out, pairs differ, edges are dense."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from twinloop.common.strict_yaml import parse_yaml
from twinloop.domains.returns import domain
from twinloop.domains.returns.case_maker import GeneratorParams
from twinloop.domains.returns.generator import generate
from twinloop.domains.returns.mutations import good_answer
from twinloop.domains.returns.prompt import Order, is_eligible
from twinloop.domains.returns.verifier import Facts, verify
from twinloop.evaluation.audit import audit_verifier

PROJECT = Path(__file__).parents[2]
COUNT = 300
COUNTS = {name: COUNT for name, field in GeneratorParams.model_fields.items() if field.is_required()}
TRAIN = ("chat", "preferences", "prompts")

Rows = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="session", params=["house_style", "free"])
def params(request: pytest.FixtureRequest) -> GeneratorParams:
    return GeneratorParams(**COUNTS, phrasing=request.param)


@pytest.fixture(scope="session")
def folder(params: GeneratorParams, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    generate(params, folder)
    return folder


@pytest.fixture(scope="session")
def rows(folder: Path) -> Rows:
    return {path.stem: [json.loads(line) for line in path.open()] for path in folder.glob("*.jsonl")}


def facts_of(rows: Rows, *names: str) -> list[Facts]:
    return [Facts.from_record(row["facts"]) for name in names for row in rows[name]]


def pair(record: dict[str, Any]) -> tuple[int, int]:
    return record["facts"]["policy"]["window_days"], record["facts"]["order"]["days_since_delivery"]


def test_the_settings_of_params_yaml_are_the_generators() -> None:
    GeneratorParams(**parse_yaml((PROJECT / "params.yaml").read_text())["generate"])


def test_one_seed_gives_the_same_bytes_and_another_does_not(
    params: GeneratorParams, folder: Path, tmp_path: Path
) -> None:
    generate(params, tmp_path / "again")
    generate(params.model_copy(update={"seed": 2}), tmp_path / "other")
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
        if path.stem != "documents":
            assert path.read_bytes() != (tmp_path / "other" / path.name).read_bytes()


def test_more_of_one_kind_leaves_the_other_files_as_they_are(
    params: GeneratorParams, folder: Path, tmp_path: Path
) -> None:
    generate(params.model_copy(update={"chat": COUNT + 10}), tmp_path)
    changed = {p.stem for p in folder.iterdir() if p.read_bytes() != (tmp_path / p.name).read_bytes()}
    assert changed == {"chat"}


def test_no_order_id_of_a_case_is_in_training(rows: Rows) -> None:
    held_out = {facts.order.order_id for facts in facts_of(rows, "cases")}
    assert not held_out & {facts.order.order_id for facts in facts_of(rows, *TRAIN)}
    corpus_ids = {word for row in rows["corpus"] for word in re.findall(r"\b[A-Z]\d{4,6}\b", row["text"])}
    assert corpus_ids
    assert not held_out & corpus_ids


def test_no_policy_id_that_a_case_turns_on_is_in_training(rows: Rows) -> None:
    held_out = {facts.policy.policy_id for facts in facts_of(rows, "cases")}
    assert not held_out & {p.policy_id for facts in facts_of(rows, *TRAIN) for p in facts.passages}
    assert not held_out & {word for row in rows["corpus"] for word in re.findall(r"\bP-\d+\b", row["text"])}


def test_ids_of_one_digit_are_no_rarity_in_training(rows: Rows) -> None:
    """They are 7 of 82, and the golden cases cite one."""
    ids = [record["facts"]["policy"]["policy_id"] for record in rows["prompts"]]
    assert 0.2 < sum(len(policy_id) == len("P-7") for policy_id in ids) / len(ids) < 0.35


def test_no_pair_of_window_and_days_of_a_case_is_in_training(rows: Rows) -> None:
    held_out = {pair(case) for case in rows["cases"]}
    assert not held_out & {pair(row) for name in TRAIN for row in rows[name]}
    compared = r'"window_days": +(\d+), "days": +(\d+)'
    corpus = {(int(w), int(d)) for row in rows["corpus"] for w, d in re.findall(compared, row["text"])}
    assert len(corpus) > COUNT
    assert not held_out & corpus


def test_no_message_and_no_policy_sentence_of_a_random_case_is_in_training(rows: Rows) -> None:
    def without_facts(text: str) -> str:
        return re.sub(r"\d+", "N", re.sub(r"\b(damaged|defective|late|wrong|unwanted|incomplete)\b", "R", text))

    def sentences(facts: list[Facts]) -> set[str]:
        return {without_facts(p.text) for f in facts for p in f.passages}

    def messages(names: tuple[str, ...], kinds: set[str] | None = None) -> set[str]:
        chosen = [row for name in names for row in rows[name] if kinds is None or row["kind"] in kinds]
        said = {(row.get("prompt") or row["messages"])[0]["content"].splitlines()[0] for row in chosen}
        return {re.sub(r"\b[A-Z]?\d+\b", "N", text) for text in said}

    random_kinds = {"held_out", "contrast", "injection"}
    random_cases = [Facts.from_record(c["facts"]) for c in rows["cases"] if c["kind"] in random_kinds]
    assert not sentences(random_cases) & sentences(facts_of(rows, *TRAIN))
    documents = "\n".join(without_facts(row["text"]) for name in ("corpus", "exercises") for row in rows[name])
    assert not [sentence for sentence in sentences(random_cases) if sentence in documents]
    assert not messages(("cases",), random_kinds) & messages(TRAIN)


def test_contrast_pairs_differ_in_the_policys_days_alone_and_in_the_verdict(rows: Rows) -> None:
    pairs = defaultdict(list)
    for case in rows["cases"]:
        if case["kind"] == "contrast":
            pairs[case["pair_id"]].append(case)
    assert len(pairs) == COUNT
    for one, other in pairs.values():
        windows = [case["facts"]["policy"]["window_days"] for case in (one, other)]
        assert windows[0] != windows[1]
        [a], [b] = one["prompt"], other["prompt"]
        assert a["content"].replace(f"within {windows[0]} days", f"within {windows[1]} days") in (
            b["content"],
            # a distractor may grant as many days as the other side does
            b["content"].replace(f"within {windows[0]} days", f"within {windows[1]} days"),
        )
        assert one["facts"]["order"] == other["facts"]["order"]
        assert one["expected"]["eligible"] != other["expected"]["eligible"]


def test_cases_are_dense_around_the_edge_of_the_window(rows: Rows) -> None:
    distances = [days - window for window, days in map(pair, rows["cases"])]
    assert sum(abs(d) <= 3 for d in distances) > 0.25 * len(distances)
    assert {-1, 0, 1} <= set(distances)


def test_training_is_dense_up_to_a_month_from_the_edge(rows: Rows) -> None:
    """What was only dense within five days of it was guessed at ten."""
    distances = [abs(days - window) for name in TRAIN for window, days in map(pair, rows[name])]
    assert sum(distance <= 1 for distance in distances) > 0.15 * len(distances)
    for low, high in ((2, 7), (8, 30)):
        assert sum(low <= distance <= high for distance in distances) > 0.1 * len(distances), (low, high)


def test_an_archived_answer_has_the_fields_of_todays(rows: Rows) -> None:
    """Where the archive's answers ended a field earlier, tuning made short ones go on after their last field."""
    archived = [row["text"].splitlines()[-1] for row in rows["corpus"] if row["text"].startswith("customer: ")]
    assert len(archived) == COUNT
    fields = list(json.loads(good_answer(facts_of(rows, "cases")[0])))
    for answer in map(json.loads, archived):
        assert list(answer) == fields
        assert answer["label_created"] is False


@pytest.mark.parametrize(("name", "least", "most"), [("corpus", 0.35, 0.65), ("exercises", 0.2, 0.5)])
def test_a_ledgers_verdict_follows_its_order_where_it_has_one(rows: Rows, name: str, least: float, most: float) -> None:
    """Half of the ledgers, and a third of the exercises, name orders; among these are confirmations that decide."""
    order = r"order: \S+ \| reason: (\w+) \| damage confirmed: (yes|no) \| days: (\d+)"
    entry = r'"window_days": +(\d+), "days": +(\d+), "eligible": (true|false)'
    ledgers = [row["text"] for row in rows[name] if re.match(rf"{order}\n{entry}|{entry}", row["text"])]
    assert len(ledgers) == COUNT
    with_orders = [text for text in ledgers if text.startswith("order: ")]
    assert least < len(with_orders) / len(ledgers) < most
    by_confirmation = 0
    for text in with_orders:
        entries = re.findall(f"{order}\n{entry}", text)
        assert len(entries) == text.count("order: ")
        for reason, confirmed, days, window, compared, verdict in entries:
            assert days == compared
            facts = {"order_id": "A10000", "reason": reason, "days_since_delivery": int(days)}
            asked = Order(**facts, damage_confirmed=confirmed == "yes")
            assert verdict == str(is_eligible(asked, int(window))).lower()
            by_confirmation += verdict == "false" and int(days) <= int(window)
    assert by_confirmation > len(with_orders) / 10


def test_what_a_case_expects_is_what_the_verifier_accepts(rows: Rows) -> None:
    for case in rows["cases"]:
        facts = Facts.from_record(case["facts"])
        answer = json.loads(good_answer(facts))
        assert verify(good_answer(facts), facts).reward == 1
        assert {name: answer[name] for name in case["expected"]} == case["expected"]


def test_the_verifier_pays_for_right_answers_alone_however_policies_are_phrased(rows: Rows) -> None:
    facts = facts_of(rows, "prompts", "cases")
    report = audit_verifier(domain, facts)
    assert report.passed, report.summary


def test_verdicts_are_balanced(rows: Rows) -> None:
    for name in (*TRAIN, "cases"):
        verdicts = [is_eligible(f.order, pair(r)[0]) for f, r in zip(facts_of(rows, name), rows[name], strict=True)]
        assert 0.3 < sum(verdicts) / len(verdicts) < 0.7, name


def test_demonstrations_are_imperfect_and_preferences_point_the_right_way(rows: Rows) -> None:
    verdicts = [verify(r["messages"][-1]["content"], Facts.from_record(r["facts"])) for r in rows["chat"]]
    assert all(verdict.parsed for verdict in verdicts)
    assert 0.4 < sum(v.reward for v in verdicts) / len(verdicts) < 0.8
    for flaw in ("eligible", "policy_id", "evidence", "no_unperformed_action"):
        assert any(not verdict.checks[flaw] for verdict in verdicts), flaw
    for row in rows["preferences"]:
        facts = Facts.from_record(row["facts"])
        assert (verify(row["chosen"], facts).reward, verify(row["rejected"], facts).reward) == (1, 0)


def test_the_golden_cases_are_there_whatever_the_seed(rows: Rows) -> None:
    golden = [case for case in rows["cases"] if case["kind"] == "golden"]
    orders = {(case["facts"]["order"]["order_id"], case["facts"]["order"]["days_since_delivery"]) for case in golden}
    assert {("A10234", 12), ("A10235", 45), ("A10236", 12), ("A10237", 45), ("A10238", 12)} <= orders
    assert {case["facts"]["policy"]["policy_id"] for case in golden} == {"P-7"}
    windows = {
        case["facts"]["policy"]["window_days"]: case["expected"]["eligible"]
        for case in golden
        if pair(case)[1] == 12 and case["facts"]["order"]["damage_confirmed"]
    }
    assert windows == {30: True, 7: False}


def test_golden_cases_hold_ordinary_windows_of_two_and_three_digits_on_both_sides(rows: Rows) -> None:
    golden = [case for case in rows["cases"] if case["kind"] == "golden"]
    for window in (60, 90, 180, 365):
        assert {case["expected"]["eligible"] for case in golden if pair(case)[0] == window} == {True, False}, window


def test_windows_up_to_a_year_and_days_beyond_it_are_in_training_and_in_cases(rows: Rows) -> None:
    """Numbers of each length, the smallest and the largest among them: what is never seen is not decided well."""
    ledgers = r'"window_days": +(\d+), "days": +(\d+), "eligible"'
    corpus = [(int(w), int(d)) for row in rows["corpus"] for w, d in re.findall(ledgers, row["text"])]
    kinds = {"training": [pair(row) for name in TRAIN for row in rows[name]], "cases": [pair(c) for c in rows["cases"]]}
    for name, pairs in (kinds | {"corpus": corpus}).items():
        windows, days = zip(*pairs, strict=True)
        assert (min(windows), max(windows)) == (1, 365), name
        assert min(days) == 0, name
        assert 390 < max(days) <= 400, name
        assert {7, 14, 30, 60, 90, 180, 365} <= set(windows), name
        for numbers in (windows, days):
            for length in (1, 2, 3):
                assert sum(len(str(n)) == length for n in numbers) > 0.05 * len(numbers), (name, length)


def test_numbers_of_each_length_have_cases_at_the_edge(rows: Rows) -> None:
    for length in (1, 2, 3):
        distances = [days - window for window, days in map(pair, rows["cases"]) if len(str(window)) == length]
        assert {-1, 0, 1} <= set(distances), length
        assert sum(abs(distance) <= 3 for distance in distances) > 0.2 * len(distances), length


def test_a_number_of_any_length_takes_as_much_room_in_an_answer(rows: Rows) -> None:
    """So that what compares their digits finds them at the same distance; the JSON is the same."""
    for facts in facts_of(rows, "cases"):
        answer = good_answer(facts)
        window, days = json.loads(answer)["window_days"], facts.order.days_since_delivery
        assert f'"window_days": {window:>3}, "days": {days:>3}, "eligible": ' in answer
