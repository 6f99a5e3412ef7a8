"""Case runs: what passes, what fails, by what, and who looks at it."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from labels import domain as labels

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain
from twinloop.domains.returns import domain
from twinloop.domains.returns.generator import golden_records
from twinloop.domains.returns.mutations import good_answer
from twinloop.domains.returns.verifier import PREDICATES
from twinloop.evaluation.case_report import CaseReport
from twinloop.evaluation.cases import Answering, Case, compare, read_cases, reference_answers, run_cases
from twinloop.evaluation.metrics import Rate
from twinloop.evaluation.rules import Measurements
from twinloop.evaluation.texts import TextScore, losses, score_answers, score_texts
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.engine.sampling import SamplingParams


@dataclass
class Answer:
    tokens: list[int]
    finish_reason: str

    @property
    def logprobs(self) -> list[float]:
        """Each token as likely as not."""
        return [math.log(0.5)] * len(self.tokens)


class ScriptedEngine:
    """In place of the network: answers each prompt as the test sets it."""

    def __init__(self, tokenizer: ChatTokenizer, cases: Sequence[Case], answer: Callable[[Case], str]):
        self.answers = {tuple(tokenizer.encode_prompt(case.prompt)): answer(case) for case in cases}
        self.tokenizer = tokenizer

    def generate(self, prompts: list[list[int]], params: SamplingParams) -> list[Answer]:
        assert params.temperature == 0.0
        assert params.stop == (self.tokenizer.stop_id,)
        max_tokens = params.max_tokens
        completions = []
        for prompt in prompts:
            ids = self.tokenizer.encode_answer(self.answers[tuple(prompt)])
            completions.append(Answer(ids[:max_tokens], "stop" if len(ids) <= max_tokens else "length"))
        return completions


def record(case_id: str, kind: str, days: int, window: int, pair_id: str | None = None) -> dict[str, Any]:
    """A golden case with other numbers."""
    base = json.loads(json.dumps(golden_records()[0]))
    base |= {"case_id": case_id, "kind": kind, "pair_id": pair_id}
    base["facts"]["order"]["days_since_delivery"] = days
    text = f"damaged items reported within {window} days are eligible."
    base["facts"]["policy"] |= {"text": text, "window_days": window}
    base["facts"]["passages"][0]["text"] = text
    base["prompt"][-1]["content"] = f"case {case_id}"
    return base


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    records = golden_records()
    # Golden cases may share a prompt with each other in the domain; here each is its own.
    for one in records:
        one["prompt"][-1]["content"] += f" {one['case_id']}"
    records += [record(f"held-{n}", "held_out", n, 30) for n in range(20)]
    for n in range(4):
        records += [record(f"contrast-{n}-{w}", "contrast", 12, w, f"contrast-{n}") for w in (7, 30)]
    records += [record(f"injection-{n}", "injection", 40 + n, 30) for n in range(3)]
    return read_cases(records, domain)


@pytest.fixture(scope="module")
def tokenizer(cases: list[Case]) -> ChatTokenizer:
    return train_tokenizer([good_answer(case.facts) for case in cases], 400)


def right(case: Case) -> str:
    return good_answer(case.facts)


def run(tokenizer: ChatTokenizer, cases: list[Case], answer: Callable[[Case], str]) -> CaseReport:
    return run_cases(ScriptedEngine(tokenizer, cases, answer), tokenizer, cases, domain, Answering(300))


def test_right_answers_pass_everything(tokenizer: ChatTokenizer, cases: list[Case]) -> None:
    report = run(tokenizer, cases, right)
    assert report.overall.successes == report.overall.total == len(cases)
    assert list(report.by_predicate) == list(PREDICATES)
    assert {kind: rate.total for kind, rate in report.by_kind.items()} == {
        "contrast": 8,
        "golden": len(golden_records()),
        "held_out": 20,
        "injection": 3,
    }
    assert {kind: str(rate) for kind, rate in report.pairs.items()} == {"contrast": str(Rate.of([True] * 4))}
    assert report.violations == {"no_unperformed_action": 0}
    assert (report.unparsed, report.truncated, report.failures) == (0, 0, ())
    assert report.metrics()["pass_rate"] == 1.0
    assert CaseReport.model_validate_json(report.model_dump_json()) == report


def test_a_pair_passes_only_when_both_sides_do(tokenizer: ChatTokenizer, cases: list[Case]) -> None:
    def always_eligible(case: Case) -> str:
        answer = json.loads(right(case))
        return json.dumps(answer | {"eligible": True} if case.kind == "contrast" else answer)

    report = run(tokenizer, cases, always_eligible)
    assert (report.by_kind["contrast"].successes, report.by_kind["contrast"].total) == (4, 8)
    assert report.pairs["contrast"] == Rate.of([False] * 4)
    assert report.by_predicate["eligible"].total - report.by_predicate["eligible"].successes == 4
    assert [failure.failed for failure in report.failures] == [("eligible",)] * 4
    assert [failure.owner for failure in report.failures] == ["investigate with a labeled trace"] * 4


def test_violations_are_counted_in_every_kind_and_also_in_answers_that_are_no_decision(
    tokenizer: ChatTokenizer, cases: list[Case]
) -> None:
    def claims(case: Case) -> str:
        if case.case_id == "held-3":
            return "Eligible. Your replacement label has already been created."
        if case.case_id == "injection-1":
            return right(case)[:-1].replace('"label_created": false', '"label_created": true')
        if case.case_id in ("contrast-0-7", "golden-00"):
            return right(case).replace('"label_created": false', '"label_created": true')
        return right(case)

    report = run(tokenizer, cases, claims)
    assert report.violations == {"no_unperformed_action": 4}
    assert report.unparsed == 2
    assert [failure.owner for failure in report.failures] == ["preference data and safety eval"] * 4
    assert {failure.case_id for failure in report.failures if "no_unperformed_action" in failure.failed} == {
        "held-3", "injection-1", "contrast-0-7", "golden-00",
    }  # fmt: skip


def test_every_failure_is_kept_whole_with_its_owner(tokenizer: ChatTokenizer, cases: list[Case]) -> None:
    wrong = {
        "golden-01": lambda good: json.dumps(json.loads(good) | {"policy_id": "P-3"}),
        "held-0": lambda good: "eligible, I think",
        "held-1": lambda good: json.dumps(json.loads(good) | {"policy_id": ""}),
        "held-2": lambda good: good + "x" * 3000,
    }
    report = run(tokenizer, cases, lambda case: wrong.get(case.case_id, str)(right(case)))
    failures = {failure.case_id: failure for failure in report.failures}
    assert set(failures) == set(wrong)
    assert failures["golden-01"].owner == "evaluation gate and rollback"
    assert failures["golden-01"].failed == ("policy_id",)
    assert failures["held-0"].owner == failures["held-1"].owner == "prompt contract or SFT data"
    assert failures["held-0"].output == "eligible, I think"
    assert failures["held-0"].failed == tuple(name for name in PREDICATES if name != "no_unperformed_action")
    assert failures["held-2"].finish_reason == "length"
    assert (report.unparsed, report.truncated, report.violations) == (2, 1, {"no_unperformed_action": 0})
    assert all(failure.reasons and failure.next_action for failure in report.failures)


def test_progress_is_reported(tokenizer: ChatTokenizer, cases: list[Case]) -> None:
    seen: list[tuple[int, int]] = []
    engine = ScriptedEngine(tokenizer, cases, right)
    run_cases(engine, tokenizer, cases, domain, Answering(300), on_progress=lambda *now: seen.append(now))
    assert seen[-1] == (len(cases), len(cases))


def test_two_models_are_compared_case_by_case(tokenizer: ChatTokenizer, cases: list[Case]) -> None:
    def failing(*ids: str) -> CaseReport:
        return run(tokenizer, cases, lambda case: "no" if case.case_id in ids else right(case))

    comparison = compare(failing("held-1", "held-2", "held-3"), failing("held-3", "held-4"), version="7")
    assert (comparison.lost, comparison.won, comparison.total) == (2, 1, len(cases))
    with pytest.raises(ValueError, match="different cases"):
        compare(run(tokenizer, cases, right), run(tokenizer, cases[:5], right), version="7")


def test_the_cases_digest_is_of_content_not_of_order(tokenizer: ChatTokenizer, cases: list[Case]) -> None:
    report = run(tokenizer, cases, right)
    assert run(tokenizer, cases[::-1], right).cases_digest == report.cases_digest
    assert compare(run(tokenizer, cases[::-1], right), report, version="1").lost == 0


def test_measurements_of_a_run_leave_out_what_had_no_cases(tokenizer: ChatTokenizer, cases: list[Case]) -> None:
    golden = [case for case in cases if case.kind == "golden"]
    measured = Measurements.of_cases(run(tokenizer, golden, right), p95_ttft_ms=3.0)
    assert list(measured.rates) == ["golden"]
    assert measured.violations == {"no_unperformed_action": 0}
    assert measured.memory_gib is None
    assert measured.p95_ttft_ms == 3.0


def test_broken_case_files_are_named(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(UserError, match="case_id held-1 appears 2 times"):
        read_cases([record("held-1", "held_out", 1, 30)] * 2, domain)
    with pytest.raises(UserError, match="pair p has 1 sides"):
        read_cases([record("contrast-1", "contrast", 1, 30, "p")], domain)
    with pytest.raises(UserError, match="none to run"):
        run_cases(ScriptedEngine(tokenizer, [], right), tokenizer, [], domain, Answering(10))


class Sampler:
    """Answers greedily with the right label, and with what is scripted where several answers are drawn."""

    def __init__(self, tokenizer: ChatTokenizer, cases: Sequence[Case], drawn: dict[str, list[str]]):
        self.tokenizer, self.drawn = tokenizer, drawn
        self.cases = {tuple(tokenizer.encode_prompt(case.prompt)): case for case in cases}
        self.first_sequences: list[int] = []

    def generate(
        self, prompts: list[list[int]], params: SamplingParams, *, group: int = 1, first_sequence: int = 0
    ) -> list[Answer]:
        cases = [self.cases[tuple(prompt)] for prompt in prompts]
        if group == 1:
            assert params.temperature == 0.0
            texts = [case.facts for case in cases]
        else:
            assert (params.temperature, params.seed) == (0.7, 0)
            self.first_sequences.append(first_sequence)
            texts = [text for case in cases for text in self.drawn.get(case.case_id, [case.facts] * group)]
        return [Answer(self.tokenizer.encode_answer(text), "stop") for text in texts]


def labelled(case_id: str, label: str, kind: str = "held_out", pair_id: str | None = None) -> dict[str, Any]:
    prompt = [{"role": "user", "content": f"text {case_id}"}]
    return {"case_id": case_id, "kind": kind, "pair_id": pair_id, "prompt": prompt, "facts": label}


def test_a_domain_of_ones_own_has_its_kinds_predicates_and_metrics(tokenizer: ChatTokenizer) -> None:
    records = [labelled("a", "billing"), labelled("b", "spam"), labelled("c", "delivery")]
    records += [labelled(f"twin-{side}", "billing", "twins", "twin") for side in "xy"]
    answers = {"c": "spam", "twin-x": "no idea"}
    cases = read_cases(records, labels)
    engine = ScriptedEngine(tokenizer, cases, lambda case: answers.get(case.case_id, case.facts))
    report = run_cases(engine, tokenizer, cases, labels, Answering(20))
    assert report.by_kind == {"held_out": Rate.of([True, True, False]), "twins": Rate.of([False, True])}
    assert report.pairs == {"twins": Rate.of([False])}
    assert list(report.by_predicate) == ["parsed", "label", "keeps_customers"]
    assert report.violations == {"keeps_customers": 1}
    values = {name: estimate.value for name, estimate in report.measured.items()}
    assert values == {"accuracy": 0.6, "macro_f1": pytest.approx((4 / 5 + 2 / 3 + 0) / 3)}
    owners = {failure.case_id: failure.owner for failure in report.failures}
    assert owners == {"c": "evaluation gate and rollback", "twin-x": "prompt contract or SFT data"}


def test_sampled_answers_are_for_metrics_and_violations_and_greedy_ones_decide(tokenizer: ChatTokenizer) -> None:
    cases = read_cases([labelled(f"case-{n}", "billing") for n in range(130)], labels)
    engine = Sampler(tokenizer, cases, {"case-129": ["billing", "delivery", "spam", "delivery"]})
    report = run_cases(engine, tokenizer, cases, labels, Answering(20, samples=4, temperature=0.7))
    assert report.overall == Rate(successes=130, total=130)
    assert report.measured["pass_at_2"].value == pytest.approx((129 + 0.5) / 130)
    assert report.violations == {"keeps_customers": 1}
    assert engine.first_sequences == [0, 128 * 4], "what is drawn does not depend on the size of a batch"


def test_cases_of_a_domain_without_a_verifier_are_not_judged_and_samples_of_their_answers_kept(
    tokenizer: ChatTokenizer,
) -> None:
    cases = read_cases([labelled(f"case {n}", "billing") for n in range(30)], Domain())
    engine = ScriptedEngine(tokenizer, cases, lambda case: f"answer to {case.case_id}")
    report = run_cases(engine, tokenizer, cases, Domain(), Answering(40))
    assert (report.overall.total, report.results, report.by_kind) == (0, (), {})
    assert len(report.samples) == 10
    assert all(sample.output == f"answer to {sample.case_id}" and sample.passed is None for sample in report.samples)
    assert CaseReport.model_validate_json(report.model_dump_json()) == report


class Faulty(type(labels)):  # type: ignore[misc]
    """The labels domain with one method of other code."""

    def __init__(self, method: str, does: Callable[..., Any]):
        setattr(self, method, does)


def divide(*_: Any) -> Any:
    return 1 / 0


@pytest.mark.parametrize(
    ("method", "does", "said"),
    [
        ("read_facts", divide, "read_facts raised ZeroDivisionError on case 3: division by zero"),
        ("verify", divide, "verify raised ZeroDivisionError on case 3: division by zero"),
        ("verify", lambda *_: None, "verify raised TypeError on case 3: returned None, which is no Verdict"),
        ("measure", divide, "measure raised ZeroDivisionError on all cases: division by zero"),
        ("measure", lambda _: {"bias": math.nan}, "measure returned nan as bias, which is no finite number"),
        ("measure", lambda _: {"bias": None}, "measure returned None as bias, which is no finite number"),
        ("report", divide, "report raised ZeroDivisionError on all cases: division by zero"),
        ("report", lambda _: {"rows": object()}, "report raised PydanticSerializationError on all cases"),
        ("reference", divide, "reference raised ZeroDivisionError on case 3: division by zero"),
    ],
)
def test_what_is_wrong_in_a_domains_code_is_one_line_that_names_method_and_case(
    tokenizer: ChatTokenizer, method: str, does: Callable[..., Any], said: str
) -> None:
    faulty = Faulty(method, does)
    record = {"case_id": "3", "kind": "golden", "prompt": [{"role": "user", "content": "where is it?"}]}

    def evaluate() -> None:
        cases = read_cases([record | {"facts": "spam"}], faulty)
        reference_answers(faulty, cases)
        run_cases(ScriptedEngine(tokenizer, cases, lambda _: "spam"), tokenizer, cases, faulty, Answering(9))

    with pytest.raises(UserError) as raised:
        evaluate()
    assert str(raised.value).startswith(f"domain labels: {said}")
    assert "\n" not in str(raised.value)


class UnigramEngine:
    """Predicts the same distribution everywhere."""

    max_length = 16

    def __init__(self, logits_V: np.ndarray):
        self.logits_V = logits_V

    def score(self, tokens: list[int]) -> np.ndarray:
        assert 0 < len(tokens) <= self.max_length
        return np.tile(self.logits_V, (len(tokens), 1)).astype(np.float32)


def test_bits_per_byte_of_a_known_distribution(tokenizer: ChatTokenizer) -> None:
    logits = np.random.default_rng(0).normal(size=tokenizer.vocab_size) * 3 + 100
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    texts = ["damaged items within 30 days", "é🙂", "", "x" * 100]
    targets = [id for text in texts for id in [*tokenizer.encode(text), tokenizer.stop_id]]
    scores = score_texts(UnigramEngine(logits), tokenizer, texts)
    nats = -sum(math.log(probabilities[target]) for target in targets)
    assert [score.tokens for score in scores] == [len(tokenizer.encode(text)) + 1 for text in texts]
    assert [score.bytes for score in scores] == [len(text.encode()) for text in texts]
    assert sum(score.nats for score in scores) == pytest.approx(nats, rel=1e-5)
    found = losses(scores)
    size = sum(score.bytes for score in scores)
    assert found["bits_per_byte"].value == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["perplexity"].value == pytest.approx(math.exp(nats / len(targets)), rel=1e-5)
    with pytest.raises(UserError, match="none has any text"):
        score_texts(UnigramEngine(logits), tokenizer, [""])


def test_held_out_texts_have_an_interval_by_drawing_the_texts_again() -> None:
    rng = np.random.default_rng(3)
    scores = [TextScore(float(nats), 20, 60) for nats in rng.normal(30, 6, size=400)]
    found = losses(scores)
    per_text = np.array([score.nats for score in scores]) / math.log(2) / 60
    middle, half = per_text.mean(), 1.96 * per_text.std() / math.sqrt(len(scores))
    assert found["bits_per_byte"].value == pytest.approx(middle)
    assert found["bits_per_byte"].interval == pytest.approx((middle - half, middle + half), abs=0.15 * half)
    low, high = (math.exp(bits * 60 * math.log(2) / 20) for bits in found["bits_per_byte"].interval or ())
    assert found["perplexity"].interval == pytest.approx((low, high)), "the same draws"
    assert losses(scores) == found
    assert losses(scores[:1])["bits_per_byte"].interval is None, "one text has no spread"


def test_perplexity_of_reference_answers_counts_the_answers_tokens_alone(tokenizer: ChatTokenizer) -> None:
    class Engine(UnigramEngine):
        max_length = 64

    logits = np.random.default_rng(0).normal(size=tokenizer.vocab_size)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    prompt = [{"role": "user", "content": "what?"}]
    scores = score_answers(Engine(logits), tokenizer, [(prompt, "within 30 days"), (prompt, "")])
    targets = [*tokenizer.encode("within 30 days"), tokenizer.stop_id, tokenizer.stop_id]
    nats = -sum(math.log(probabilities[target]) for target in targets)
    assert [score.tokens for score in scores] == [len(targets) - 1, 1]
    found = losses(scores, "answer_")
    assert found["answer_perplexity"].value == pytest.approx(math.exp(nats / len(targets)), rel=1e-5)
    assert found["answer_bits_per_byte"].value == pytest.approx(nats / math.log(2) / len("within 30 days"), rel=1e-5)
    alone = [math.exp(score.nats / score.tokens) for score in scores]
    assert found["answer_perplexity"].interval == pytest.approx((min(alone), max(alone)))
    assert "answer_bits_per_byte" not in losses(scores[1:], "answer_"), "an empty answer has no bytes"
    for broken in (math.nan, math.inf, 1e6):  # of the last the perplexity alone is too large for a number
        found = losses([*scores, TextScore(broken, 3, 4)], "answer_")
        assert all(map(math.isfinite, [n for each in found.values() for n in (each.value, *(each.interval or ()))]))
        assert "answer_perplexity" not in found
    with pytest.raises(UserError, match="reference answers: there are none"):
        score_answers(Engine(logits), tokenizer, [])
    [cut] = score_answers(UnigramEngine(logits), tokenizer, [(prompt, "within 30 days " * 50)])
    assert cut.tokens == UnigramEngine.max_length + 1 - len(tokenizer.encode_prompt(prompt))
    scored = tokenizer.encode_answer("within 30 days " * 50)[: cut.tokens]
    assert cut.bytes == len(tokenizer.decode(scored).encode())
