"""The worked examples of the documents that Twinloop implements, through its public functions."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from twinloop.domains.domain import Verdict
from twinloop.domains.returns import domain
from twinloop.domains.returns.case_maker import GeneratorParams
from twinloop.domains.returns.claims import claims_action
from twinloop.domains.returns.generator import generate
from twinloop.domains.returns.policies import Policy, window_days
from twinloop.domains.returns.prompt import Order, build_prompt, is_eligible
from twinloop.domains.returns.schemas import audit_answer, audit_target
from twinloop.domains.returns.verifier import Facts, check, verify
from twinloop.evaluation.gate import GateRules, judge
from twinloop.evaluation.metrics import Rate
from twinloop.evaluation.router import route
from twinloop.evaluation.rules import Measurements
from twinloop.models.config import DecoderConfig
from twinloop.models.memory import serving_memory
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.models.template_check import check_template

ROOT = Path(__file__).parents[1]
CASES: dict[str, Any] = json.loads((Path(__file__).parent / "reference_cases.json").read_text())
P7 = Policy("P-7", "damaged items reported within 30 days are eligible.")
P3 = Policy("P-3", "unwanted items within 14 days are eligible.")


def examples(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", CASES[name], ids=lambda case: str(next(iter(case.values())))[:60])


def facts(policy: Policy, *, order_id: str = "A10234", days: int, damage_confirmed: bool = True) -> Facts:
    order = Order(order_id=order_id, reason="damaged", damage_confirmed=damage_confirmed, days_since_delivery=days)
    return Facts(order, policy, (policy, P3))


def judged(output: dict[str, Any], about: Facts) -> Verdict:
    """The verifier's verdict on a decision's core, with the fields beside it as the facts have them."""
    shown = {
        "evidence": about.policy.text,
        "window_days": window_days(about.policy.text),
        "days": about.order.days_since_delivery,
    }
    return verify(json.dumps(shown | output), about)


def test_cache_buffers_and_scales_are_planned_beside_the_weights() -> None:
    config = DecoderConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    )  # fmt: skip
    plan = serving_memory(config, precision="bf16", slots=8, max_length=4096)
    assert plan.weights_bytes == 2 * config.num_parameters
    assert plan.kv_cache_bytes > 0
    assert plan.runtime_bytes > 0
    assert serving_memory(config, precision="int8", slots=8, max_length=4096).scales_bytes > 0


@examples("sft_target_audit")
def test_sft_target_audit(case: dict[str, Any]) -> None:
    verdict = audit_target(case["target"])
    assert verdict.verdict == case["verdict"]
    assert list(verdict.missing) == case.get("missing", [])
    assert audit_answer(json.dumps(case["target"])) == verdict


def test_sft_example_is_kept_and_trained_whole() -> None:
    example = CASES["sft_example"]
    assert audit_target(example["target"]).verdict == "keep"
    messages = [
        {"role": "system", "content": example["instruction"]},
        {"role": "user", "content": json.dumps(example["input"])},
        {"role": "assistant", "content": json.dumps(example["target"])},
    ]
    tokenizer = train_tokenizer([message["content"] for message in messages], 300)
    assert check_template(tokenizer, [messages], max_length=512).passed
    # Its quoted evidence is the policy's own words, and its decision the right one.
    complete = example["target"] | {"label_created": False}
    assert judged(complete, facts(P7, days=example["input"]["days_since_delivery"])).reward == 1


def test_preference_pair_rejects_the_unperformed_action() -> None:
    pair = CASES["preference_pair"]
    assert not claims_action(pair["chosen"])
    assert claims_action(pair["rejected"])
    assert (
        route(f"Response claims an unperformed action: {pair['rejected']}", domain).name
        == "preference data and safety eval"
    )


@pytest.mark.parametrize("case", CASES["verifier"]["cases"], ids=lambda case: json.dumps(case["output"]))
def test_verifier(case: dict[str, Any]) -> None:
    order, policy = CASES["verifier"]["trusted_order"], CASES["verifier"]["policy"]
    assert window_days(P7.text) == policy["window_days"]
    assert policy["policy_id"] == P7.policy_id
    about = facts(P7, days=order["days_since_delivery"], damage_confirmed=order["damage_confirmed"])
    assert judged(case["output"], about).reward == case["reward"]


def test_verifier_asks_for_quoted_evidence_and_well_formed_json() -> None:
    about = facts(P7, days=12)
    good = {"eligible": True, "policy_id": "P-7", "label_created": False}
    assert judged(good, about).reward == 1
    assert judged(good | {"evidence": "all items may come back within 30 days."}, about).reward == 0
    twice = json.dumps(judged(good, about).output)[:-1] + ', "eligible": true}'
    assert verify(twice, about).reward == 0
    assert not verify(twice, about).parsed


def test_context_decides_not_weights() -> None:
    example = CASES["context_not_weights"]
    order = Order(**example["order"])
    prompts, allowed = [], {}
    for name in ("old_policy", "current_policy"):
        policy_id, text = example[name].split(": ", 1)
        policy = Policy(policy_id, text)
        window = window_days(text)
        assert window is not None
        prompts.append(build_prompt(order, "can i send it back?", [policy, P3])[-1]["content"])
        allowed[name] = is_eligible(order, window)
        for eligible in (True, False):
            output = {
                "evidence": text, "policy_id": policy_id, "window_days": window, "days": order.days_since_delivery,
                "eligible": eligible, "label_created": False,
            }  # fmt: skip
            # The server returns only the decision that today's passage gives; the other one it escalates.
            assert check(json.dumps(output), order, [policy, P3]).reward == int(eligible is allowed[name])
    assert allowed == {"old_policy": False, "current_policy": True}
    assert prompts[0].replace("within 7 days", "within 30 days") == prompts[1]


@examples("golden_cases")
def test_golden_cases(case: dict[str, Any]) -> None:
    output = dict(case["output"])
    output["eligible"] = {"eligible": True, "not_eligible": False}[output.pop("decision")]
    about = facts(
        P7, order_id=case["order_id"], days=case["days_since_delivery"], damage_confirmed=case["damage_confirmed"]
    )
    assert judged(output, about).reward == int(case["passes"])


@examples("release_gate")
def test_release_gate(case: dict[str, Any]) -> None:
    limits = {"golden_pass_rate": 1.0, "no_unperformed_action_violations": 0, "p95_ttft_ms": 1000}
    rules = GateRules(limits, domain)
    candidate = case["candidate"]
    report = judge(
        rules,
        Measurements(
            rates={"golden": Rate(successes=candidate["policy_cases_passed"], total=candidate["policy_cases_total"])},
            violations={"no_unperformed_action": candidate["unsafe_side_effect_claims"]},
            p95_ttft_ms=candidate["p95_ttft_ms"],
        ),
    )
    assert report.decision == case["decision"]
    assert [reason.reason for reason in report.reasons] == case["reasons"]


@examples("failure_router")
def test_failure_router(case: dict[str, Any]) -> None:
    found = route(case["symptom"], domain)
    assert (found.name, found.next_action) == (case["owner"], case["next_action"])


def test_lab_files_are_generated_and_keep_their_schemas(tmp_path: Path) -> None:
    small = GeneratorParams(**{name: 3 for name, field in GeneratorParams.model_fields.items() if field.is_required()})
    generate(small, tmp_path)
    for name in CASES["lab_files"]:
        path = tmp_path / Path(name).name
        record = domain.record_types()[path.stem]
        record.model.validate(pl.read_ndjson(path, schema=record.columns))
