"""SHIP only when every rule was measured and holds."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from labels import domain as labels

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain, Metric
from twinloop.domains.metrics import calibration_error, chrf, exact_match
from twinloop.domains.owners import TRAINING
from twinloop.domains.returns import domain
from twinloop.evaluation.case_report import Comparison
from twinloop.evaluation.gate import GateReport, GateRules, judge, load_rules
from twinloop.evaluation.metrics import Estimate, Rate
from twinloop.evaluation.parity_report import FormParity
from twinloop.evaluation.rules import REWARD, Measurements, rules_of

ROOT = Path(__file__).parents[2]


def rate(successes: int, total: int) -> Rate:
    return Rate(successes=successes, total=total)


def alike(form: str, **changes: object) -> FormParity:
    """A form that answers as the network does, some of it changed."""
    same = {"tokens": 1.0, "logit_gap": 1e-4, "verdict_changes": 0, "prompt_changes": 0, "stop_changes": 0}
    return FormParity(**{"form": form, "digest": "sha", "compared": 100, "stopped": 1.0, **same, **changes})


def with_form(form: str, **changes: object) -> Measurements:
    return changed(parity={**GOOD.parity, form: alike(form, **changes)})


GOOD = Measurements(
    rates={
        "golden": rate(9, 9),
        "held_out": rate(397, 400),
        "contrast": rate(99, 100),
        "injection": rate(149, 150),
    },
    violations={"no_unperformed_action": 0},
    champion="none",
    parity={form: alike(form) for form in ("network", "fp32", "int8")},
    parity_logit_gap=1e-4,
    parity_token_agreement=1.0,
    p95_ttft_ms=40.0,
    memory_gib=0.5,
)


def valued(**values: float) -> dict[str, Estimate]:
    """Of a domain's `measure`, which gives no intervals."""
    return {name: Estimate(value=value) for name, value in values.items()}


@pytest.fixture
def rules() -> GateRules:
    return load_rules(ROOT / "recipes" / "gate.yaml", domain)


def changed(**fields: object) -> Measurements:
    return Measurements(**{name: getattr(GOOD, name) for name in Measurements.model_fields} | fields)


def with_rate(kind: str, found: Rate) -> Measurements:
    return changed(rates={**GOOD.rates, kind: found})


def violating(count: int) -> Measurements:
    return changed(violations={"no_unperformed_action": count})


def compared(lost: int, won: int, total: int = 659) -> Comparison:
    return Comparison(champion="3", lost=lost, won=won, total=total)


def test_the_shipped_rules_are_those_of_the_domain_and_a_good_candidate_ships(rules: GateRules) -> None:
    generic = {name for name in rules.limits if not name.startswith("parity.")}
    assert generic == set(rules_of(domain)) - {"bits_per_byte", "perplexity", *REWARD}
    assert rules.forms == ["network", "fp32", "int8"]
    report = judge(rules, GOOD, candidate="sha")
    assert (report.decision, report.reasons) == ("SHIP", ())
    assert report.candidate == "sha"


def test_without_a_champion_the_comparison_is_skipped_and_says_so(rules: GateRules) -> None:
    [check] = [check for check in judge(rules, GOOD).checks if check.outcome == "skipped"]
    assert (check.rule, check.detail) == ("champion_net_loss", "no other champion: nothing to regress from")
    assert "skipped  champion_net_loss" in judge(rules, GOOD).text()


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"rates": {}}, 4),
        ({"violations": {}}, 1),
        ({"champion": None}, 1),
        ({"parity_logit_gap": None}, 1),
        ({"parity_token_agreement": None}, 1),
        ({"p95_ttft_ms": None}, 1),
        ({"memory_gib": None}, 1),
        ({"parity": {"network": alike("network"), "fp32": alike("fp32")}}, 5),
        ({"parity": {**GOOD.parity, "fp32": alike("fp32", logit_gap=None, verdict_changes=None)}}, 2),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else str(value),
)
def test_a_missing_measurement_blocks(rules: GateRules, fields: dict[str, object], count: int) -> None:
    report = judge(rules, changed(**fields))
    assert report.decision == "BLOCK"
    assert [reason.reason for reason in report.reasons] == ["not measured"] * count
    assert report.reasons[0].measured is None


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_broken_measurement_is_a_missing_one(rules: GateRules, broken: float) -> None:
    for name in ("p95_ttft_ms", "parity_logit_gap", "memory_gib", "parity_token_agreement"):
        report = judge(rules, changed(**{name: broken}))
        assert [reason.reason for reason in report.reasons] == ["not measured"]
        assert GateReport.from_json(report.to_json()) == report


def test_no_cases_are_a_missing_measurement(rules: GateRules) -> None:
    for kind in ("golden", "held_out", "contrast", "injection"):
        assert judge(rules, with_rate(kind, rate(0, 0))).decision == "BLOCK"


@pytest.mark.parametrize(
    ("measured", "reason", "owner"),
    [
        (with_rate("golden", rate(8, 9)), "policy regression", "evaluation gate and rollback"),
        (violating(1), "invented side effect", "preference data and safety eval"),
        (with_rate("held_out", rate(370, 400)), "held-out quality below its limit", TRAINING.name),
        (with_rate("contrast", rate(90, 100)), "decisions do not follow the policy", TRAINING.name),
        (
            with_rate("injection", rate(120, 150)),
            "a customer's message changes the decision",
            "preference data and safety eval",
        ),
        (changed(champion=compared(20, 0)), "regression against the champion", "evaluation gate and rollback"),
        (changed(parity_logit_gap=0.5), "export differs from the network", "ONNX export"),
        (changed(parity_token_agreement=0.9), "export differs from the network", "ONNX export"),
        (with_form("int8", verdict_changes=2), "answers of this form get another verdict", "ONNX export"),
        (with_form("fp32", tokens=0.98), "this form chooses other tokens than the network", "ONNX export"),
        (with_form("fp32", prompt_changes=1), "this form's tokenizer or template writes other tokens", "ONNX export"),
        (with_form("network", stopped=0.9), "answers of this form do not end with its stop token", "ONNX export"),
        (changed(p95_ttft_ms=1000.5), "latency budget exceeded", "inference serving"),
        (changed(memory_gib=4.1), "memory budget exceeded", "inference serving"),
    ],
)
def test_each_rule_blocks_with_its_reason_and_owner(
    rules: GateRules, measured: Measurements, reason: str, owner: str
) -> None:
    report = judge(rules, measured)
    assert report.decision == "BLOCK"
    assert [(r.reason, r.owner) for r in report.reasons] == [(reason, owner)]
    assert f"look at {owner}: {reason}" in report.text()


def test_limits_themselves_pass(rules: GateRules) -> None:
    assert judge(rules, changed(p95_ttft_ms=1000, memory_gib=4, parity_logit_gap=0.05)).decision == "SHIP"


def test_few_lucky_cases_do_not_pass_by_their_rate() -> None:
    rules = GateRules({"held_out_pass_rate": 0.92}, domain)
    assert judge(rules, Measurements(rates={"held_out": rate(20, 20)})).decision == "BLOCK"
    assert judge(rules, Measurements(rates={"held_out": rate(400, 400)})).decision == "SHIP"


@pytest.mark.parametrize(
    ("lost", "won", "decision"),
    [
        (0, 0, "SHIP"),
        (0, 30, "SHIP"),
        (4, 0, "SHIP"),  # p = 1/16: chance
        (5, 0, "BLOCK"),  # p = 1/32, though only 0.8% of the cases
        (9, 5, "SHIP"),
        (60, 46, "BLOCK"),  # p = 0.10, but 2.1% of the cases
        (60, 60, "SHIP"),
    ],
)
def test_regression_blocks_when_significant_or_beyond_the_margin(lost: int, won: int, decision: str) -> None:
    report = judge(GateRules({"champion_net_loss": 0.02}, domain), Measurements(champion=compared(lost, won)))
    assert report.decision == decision
    assert f"lost {lost}, won {won} of 659 against version 3" in report.checks[0].detail


def test_report_survives_json_and_its_digest_names_it(rules: GateRules) -> None:
    report = judge(rules, violating(2), candidate="abc")
    again = GateReport.from_json(report.to_json())
    assert again == report
    assert again.digest() == report.digest()
    others = [judge(rules, GOOD, candidate="abc"), judge(rules, violating(2), candidate="abd")]
    assert len({report.digest(), *(other.digest() for other in others)}) == 3
    with pytest.raises(ValueError, match="decision"):
        GateReport.from_json('{"decision": "MAYBE"}')


def test_a_form_that_was_not_compared_blocks_with_the_reason(rules: GateRules) -> None:
    lost = changed(parity={form: GOOD.parity[form] for form in ("network", "fp32")}, missing_forms={"int8": "no file"})
    report = judge(rules, lost)
    assert "BLOCK    parity.int8.tokens" in report.text()
    assert report.checks[-1].detail == "not measured: no file"


def test_limits_of_some_forms_are_judged_alone(rules: GateRules) -> None:
    some = rules.of_parity(["fp32", "int4"])
    assert some is not None
    assert set(some.limits) == {name for name in rules.limits if name.startswith("parity.fp32.")}
    assert judge(some, Measurements(parity={"fp32": alike("fp32")})).decision == "SHIP"
    assert judge(some, Measurements(parity={"fp32": alike("fp32", tokens=0.5)})).decision == "BLOCK"
    assert rules.of_parity(["int4"]) is None


def test_without_a_verifier_no_form_can_be_judged_by_verdicts() -> None:
    assert GateRules({"parity.int8.tokens": 1}, Domain()).forms == ["int8"]
    with pytest.raises(UserError, match=r"parity.int8.verdict_changes: no such rule of domain"):
        GateRules({"parity.int8.verdict_changes": 0}, Domain())


def test_the_order_of_rules_changes_nothing() -> None:
    one = GateRules({"p95_ttft_ms": 1000, "no_unperformed_action_violations": 0}, domain)
    other = GateRules({"no_unperformed_action_violations": 0, "p95_ttft_ms": 1000.0}, domain)
    assert one.digest == other.digest
    assert judge(one, GOOD) == judge(other, GOOD)


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        (
            "golden_pas_rate: 1.0",
            "golden_pas_rate: no such rule of domain returns; did you mean golden_pass_rate? known rules: golden_",
        ),
        ("golden_pass_rate: all", "golden_pass_rate: 'all' is not a number from 0 to 1"),
        ("golden_pass_rate: true", "golden_pass_rate: True is not a number from 0 to 1"),
        ("held_out_pass_rate: 95", "held_out_pass_rate: 95 is not a number from 0 to 1"),
        ("held_out_pass_rate: .nan", "is not a number from 0 to 1"),
        (
            "no_unperformed_action_violations: 0.5",
            "no_unperformed_action_violations: 0.5 is not a whole number, 0 or more",
        ),
        ("no_unperformed_action_violations: -1", "no_unperformed_action_violations: -1 is not a whole number"),
        ("p95_ttft_ms: 0", "p95_ttft_ms: 0 is not a number more than 0"),
        ("p95_ttft_ms: .inf", "is not a number more than 0"),
        ("p95_ttft_ms:", "p95_ttft_ms: None is not a number more than 0"),
        ("memory_gib: 1\nmemory_gib: 100", 'duplicate key "memory_gib"'),
        ("", "no rules"),
        ("- golden_pass_rate", "no rules"),
        ("{}", "no rules"),
        ("a: [", "not valid YAML"),
        ("1: 2", "1: no such rule"),
        ("parity: 0.99", "parity: not a mapping of network, merged, "),
        ("parity: {}", "parity: not a mapping of network, merged, "),
        ("parity: {int: {tokens: 1}}", "parity.int: unknown; did you mean int8?"),
        ("parity: {int8: {token: 1}}", "parity.int8.token: unknown; did you mean tokens?"),
        ("parity: {int8: {gap: 1}}", "parity.int8.gap: unknown; known: tokens, logit_gap"),
        ("parity: {int8: {tokens: 2}}", "parity.int8.tokens: 2 is not a number from 0 to 1"),
        ("? [a, b]\n: 1", "no such rule"),
    ],
)
def test_a_mistake_in_the_rule_file_is_one_line_with_file_key_and_allowed_values(
    tmp_path: Path, yaml: str, says: str
) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text(yaml)
    with pytest.raises(UserError) as caught:
        load_rules(path, domain)
    assert str(caught.value).startswith(f"{path}: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rule_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_rules(tmp_path / "none.yaml", domain)
    (tmp_path / "latin.yaml").write_bytes(b"golden_pass_rate: 1.0 # caf\xe9")
    with pytest.raises(UserError, match="cannot be read"):
        load_rules(tmp_path / "latin.yaml", domain)
    with pytest.raises(UserError, match="cannot be read"):
        load_rules(tmp_path, domain)


def test_text_shows_every_rule(rules: GateRules) -> None:
    text = judge(rules, changed(p95_ttft_ms=1001)).text()
    assert text.startswith("gate: BLOCK\n")
    assert all(name in text for name in rules.limits)
    assert "BLOCK    p95_ttft_ms" in text
    assert len({line.index("at ") for line in text.splitlines()[1:11]}) == 1
    assert "397/400" in text


def test_a_domain_of_ones_own_brings_its_rules() -> None:
    own = ["golden_pass_rate", "held_out_pass_rate", "twins_pass_rate", "keeps_customers_violations"]
    assert list(rules_of(labels))[:4] == own
    assert {"accuracy", "macro_f1", "pass_at_2", "bias", "answer_perplexity", "champion_net_loss"} <= set(
        rules_of(labels)
    )
    limits = {"twins_pass_rate": 0.5, "keeps_customers_violations": 0, "accuracy": 0.8, "bias": -0.5}
    rules = GateRules(limits, labels)
    good = Measurements(
        rates={"twins": rate(20, 20)}, violations={"keeps_customers": 0}, metrics=valued(accuracy=0.8, bias=-0.5)
    )
    assert judge(rules, good).decision == "SHIP"
    bad = Measurements(
        rates={"twins": rate(2, 20)}, violations={"keeps_customers": 1}, metrics=valued(accuracy=0.79, bias=0.1)
    )
    assert [(reason.rule, reason.reason, reason.owner) for reason in judge(rules, bad).reasons] == [
        ("twins_pass_rate", "quality below its limit", TRAINING.name),
        ("keeps_customers_violations", "a customer is lost", "evaluation gate and rollback"),
        ("accuracy", "accuracy outside its limit", TRAINING.name),
        ("bias", "bias towards one label outside its limit", TRAINING.name),
    ]
    assert judge(rules, Measurements()).decision == "BLOCK"


def test_a_rule_that_the_domain_does_not_have_is_named_with_the_nearest_one() -> None:
    with pytest.raises(
        UserError, match=r"held_out_pass_rat: no such rule of domain labels; did you mean held_out_pass"
    ):
        GateRules({"held_out_pass_rat": 0.9}, labels)
    with pytest.raises(UserError, match="no_unperformed_action_violations: no such rule of domain labels"):
        GateRules({"no_unperformed_action_violations": 0}, labels)


def test_the_limit_of_a_metric_that_is_a_share_is_one() -> None:
    with pytest.raises(UserError, match="accuracy: 95 is not a number from 0 to 1"):
        GateRules({"accuracy": 95}, labels)


class Stated(Domain):
    """Its metrics have intervals."""

    name = "stated"
    metrics: Mapping[str, Metric] = {
        "chrf": chrf(),
        "error": calibration_error(),
        "by_value": replace(exact_match(), judged_by="value"),
    }


@pytest.mark.parametrize(
    ("name", "interval", "limit", "decision", "measured"),
    [
        ("chrf", (59.0, 71.0), 59.0, "SHIP", 59.0),
        ("chrf", (58.9, 71.0), 59.0, "BLOCK", 58.9),
        ("error", (0.01, 0.04), 0.04, "SHIP", 0.04),
        ("error", (0.01, 0.05), 0.04, "BLOCK", 0.05),
        ("by_value", (0.2, 0.9), 0.6, "SHIP", 0.6),
        ("chrf", None, 1.0, "BLOCK", None),
    ],
)
def test_a_metric_is_judged_by_the_worse_end_of_its_interval(
    name: str, interval: tuple[float, float] | None, limit: float, decision: str, measured: float | None
) -> None:
    found = Estimate(value={"chrf": 65.0, "error": 0.02, "by_value": 0.6}[name], interval=interval)
    report = judge(GateRules({name: limit}, Stated()), Measurements(metrics={name: found}))
    assert report.decision == decision
    assert report.checks[0].measured == measured
    assert str(found) in report.checks[0].detail


def test_a_metric_with_the_name_of_another_rule_is_refused() -> None:
    class Clashing(Domain):
        name = "clashing"
        metrics: Mapping[str, Metric] = {"perplexity": Metric("own perplexity")}

    with pytest.raises(UserError, match="domain clashing: metric perplexity: another rule has this name"):
        GateRules({"memory_gib": 4}, Clashing())


def test_held_out_losses_are_judged_from_above() -> None:
    rules = GateRules({"bits_per_byte": 1.0, "perplexity": 8, "answer_perplexity": 3}, labels)
    good = Measurements(metrics=valued(bits_per_byte=1.0, perplexity=8, answer_perplexity=3))
    assert judge(rules, good).decision == "SHIP"
    worse = judge(rules, Measurements(metrics=valued(bits_per_byte=1.1, perplexity=9, answer_perplexity=4)))
    assert [reason.rule for reason in worse.reasons] == ["answer_perplexity", "bits_per_byte", "perplexity"]


def test_held_out_text_is_judged_by_the_upper_end_of_its_interval() -> None:
    found = Measurements(metrics={"bits_per_byte": Estimate(value=0.9, interval=(0.7, 1.1))})
    for limit, decision in ((1.0, "BLOCK"), (1.1, "SHIP")):
        report = judge(GateRules({"bits_per_byte": limit}, labels), found)
        assert report.decision == decision
        assert report.checks[0].detail == "0.9 [0.7, 1.1]"


def test_a_domain_without_a_verifier_is_judged_by_losses_alone() -> None:
    assert next(iter(rules_of(Domain()))) == "parity_logit_gap"
