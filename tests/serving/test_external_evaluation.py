"""lm-evaluation-harness and Inspect, unmodified, on the served model: their numbers are ours.

They live in an environment of their own, whose interpreter TWINLOOP_EVAL_PYTHON names; this was written for

    pip install "lm_eval[api]==0.4.13" transformers==5.24.0 inspect-ai==0.3.285 openai==3.57.0
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from judged_cases import judged
from served import MODEL, REASONS, make_app, running, small_tokenizer
from test_prompt_logprobs import a_network, bind, logprobs_of

from twinloop.domains.chat import Chat
from twinloop.domains.metrics import exact_match
from twinloop.evaluation.estimates import estimated
from twinloop.models.decoder import Decoder
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.engine import Engine
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.engine.scheduler import Scheduler

pytestmark = pytest.mark.slow

MAX_LENGTH, MAX_TOKENS = 512, 12
STOPS = ["\n", " 3"]
"""Of generate_until."""

NO_NETWORK = {
    **{f"{scheme}_PROXY": "http://127.0.0.1:9" for scheme in ("HTTP", "HTTPS", "ALL")},
    "NO_PROXY": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
"""Nobody listens at that proxy, so that what is not on this machine cannot be had."""

DATASET = """
dataset_path: json
dataset_kwargs: {data_files: {test: ITEMS}}
test_split: test
"""

CHOICES_TASK = (
    DATASET
    + """
task: choices
output_type: multiple_choice
doc_to_text: "<|bos|>{{question}}:"
doc_to_target: "{{gold}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
)

TEXTS_TASK = (
    DATASET
    + """
task: texts
output_type: generate_until
doc_to_text: "BEGIN{{question}}"
doc_to_target: "{{TARGET}}"
generation_kwargs: {until: UNTIL, max_gen_toks: LIMIT, temperature: 0, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
)

INSPECT_TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import FieldSpec, json_dataset
from inspect_ai.scorer import exact
from inspect_ai.solver import generate

@task
def chats():
    fields = FieldSpec(input="question", target="chat_target")
    return Task(dataset=json_dataset("items.jsonl", fields), solver=generate(), scorer=exact())
"""


@dataclass(frozen=True)
class Served:
    """A model that is served, the files of its tokenizer, and items with our own numbers."""

    url: str
    folder: Path
    items: list[dict[str, Any]]


@pytest.fixture(scope="module")
def python() -> str:
    named = os.environ.get("TWINLOOP_EVAL_PYTHON")
    if not named:
        pytest.skip("TWINLOOP_EVAL_PYTHON names no interpreter with lm_eval and inspect_ai")
    return named


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, python: str) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("external")
    tokenizer = small_tokenizer()
    tokenizer.save(folder / "tokenizer", max_length=MAX_LENGTH)
    network = a_network(tokenizer.vocab_size)
    items = make_items(network, tokenizer)
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    scheduler = Scheduler(bind(network, max_length=MAX_LENGTH), queue_size=64)
    with running(make_app(folder, scheduler, tokenizer)) as client:
        yield Served(str(client.base_url), folder, items)
    scheduler.close(drain=False, timeout_s=20)


def make_items(network: Decoder, tokenizer: ChatTokenizer) -> list[dict[str, Any]]:
    """Questions with choices, and with targets that every second greedy answer reaches. ours: what we measure."""
    engine = bind(network, max_length=MAX_LENGTH)
    items: list[dict[str, Any]] = []
    for number in range(16):
        question = f"{REASONS[number % len(REASONS)]} items reported within {7 + 11 * number} days are"
        choices = [*dict.fromkeys([likeliest_word(network, tokenizer, question), *REASONS[:3]])]
        loglikelihoods = [loglikelihood(network, tokenizer, f"{question}:", choice) for choice in choices]
        text = generated(engine, tokenizer, tokenizer.encode_text(question), STOPS)
        chat = generated(engine, tokenizer, tokenizer.encode_prompt([{"role": "user", "content": question}]))
        other = "" if number % 2 else " x"
        items.append(
            {
                "question": question,
                "choices": choices,
                "gold": number % 2,
                "target": text + other,
                "chat_target": chat + other,
                "ours": {"loglikelihoods": loglikelihoods, "text": text, "chat": chat},
            }
        )
    return items


def likeliest_word(network: Decoder, tokenizer: ChatTokenizer, question: str) -> str:
    """What comes next, where that is a word."""
    likeliest = int(logprobs_of(network, tokenizer.encode_text(f"{question}:"))[-1].argmax())
    word = tokenizer.decode([likeliest]).strip()
    return word if word.isalpha() else "other"


def loglikelihood(network: Decoder, tokenizer: ChatTokenizer, question: str, choice: str) -> tuple[float, bool]:
    """Of the tokens that come after those of the question, and whether each is the likeliest."""
    ids, begin = tokenizer.encode_text(question + choice), len(tokenizer.encode_text(question))
    logprobs = logprobs_of(network, ids)[begin - 1 : -1]
    following = torch.tensor(ids[begin:])
    found = logprobs[torch.arange(len(following)), following].sum()
    return float(found), bool((logprobs.argmax(dim=1) == following).all())


def generated(engine: Engine, tokenizer: ChatTokenizer, prompt: list[int], stops: Sequence[str] = ()) -> str:
    params = SamplingParams(max_tokens=MAX_TOKENS, stop=tokenizer.stop_ids)
    text = tokenizer.decode(engine.generate([prompt], params)[0].tokens)
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def texts_task(target: str, stops: Sequence[str], begin: str) -> str:
    task = TEXTS_TASK.replace("TARGET", target).replace("UNTIL", json.dumps(stops))
    return task.replace("BEGIN", begin).replace("LIMIT", str(MAX_TOKENS))


def exact_matches(items: list[dict[str, Any]], answer: str, target: str) -> tuple[list[float], float]:
    """Of each item, and of all, as `twinloop` evaluates them."""
    statistic = exact_match().of
    assert statistic is not None
    cases = [judged(Chat(), None, item["ours"][answer], reference=item[target]) for item in items]
    terms = [each for case in cases if (each := statistic.terms(case)) is not None]
    estimate = estimated(terms, statistic.value, mean=statistic.mean)
    assert estimate is not None
    return [each["sum"] for each in terms], estimate.value


def call(command: Sequence[object], folder: Path, **environment: str) -> None:
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    done = subprocess.run(
        [*map(str, command)],
        cwd=folder,
        env=kept | NO_NETWORK | {"HOME": str(folder), "OPENAI_API_KEY": "none"} | environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


def lm_eval(
    served: Served, python: str, task: str, text: str, *options: object, model: str, **arguments: object
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run its command on a task. Returns the samples in order, and the results of all of them."""
    folder = Path(tempfile.mkdtemp(dir=served.folder))
    (folder / "task.yaml").write_text(text.replace("ITEMS", str(served.folder / "items.jsonl")), encoding="utf-8")
    arguments |= {"model": MODEL.name, "max_length": MAX_LENGTH}
    command = [
        python, "-m", "lm_eval", "run", "--model", model, "--tasks", task, "--include_path", folder,
        "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()),
        "--output_path", folder / "out", "--log_samples", *options,
    ]  # fmt: skip
    call(command, folder)
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    (results,) = (folder / "out").rglob("results_*.json")
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").split("\n") if line]
    measured = json.loads(results.read_text(encoding="utf-8"))["results"][task]
    return sorted(lines, key=lambda line: line["doc_id"]), measured


@pytest.mark.parametrize("batch_size", [1, 5])
def test_lm_eval_measures_the_likelihoods_of_the_network(served, python, batch_size):
    samples, results = lm_eval(
        served, python, "choices", CHOICES_TASK, "--batch_size", batch_size,
        model="local-completions", base_url=f"{served.url}/v1/completions", tokenizer=served.folder / "tokenizer",
    )  # fmt: skip
    right, greedy = [], []
    for item, sample in zip(served.items, samples, strict=True):
        ours = item["ours"]["loglikelihoods"]
        theirs = [response for (response,) in sample["resps"]]
        assert [float(logprob) for logprob, _ in theirs] == pytest.approx([logprob for logprob, _ in ours], abs=1e-3)
        assert [flag == "True" for _, flag in theirs] == [flag for _, flag in ours]
        right.append(float(max(range(len(ours)), key=lambda choice: ours[choice][0]) == item["gold"]))
        greedy += [flag for _, flag in ours]
        assert sample["acc"] == right[-1]
    assert results["acc,none"] == pytest.approx(sum(right) / len(right))
    assert set(right) == {0.0, 1.0}
    assert set(greedy) == {False, True}


@pytest.mark.parametrize("prompts", ["tokens", "texts"])
def test_lm_eval_measures_our_exact_match_of_texts(served, python, prompts):
    """The server puts BOS before a text, and lm-eval before tokens, where the task names it."""
    begin, arguments = ("<|bos|>", {}) if prompts == "tokens" else ("", {"tokenized_requests": False})
    samples, results = lm_eval(
        served, python, "texts", texts_task("target", STOPS, begin),
        model="local-completions", base_url=f"{served.url}/v1/completions", tokenizer=served.folder / "tokenizer",
        **arguments,
    )  # fmt: skip
    compare(served.items, "text", "target", [sample["resps"][0][0] for sample in samples],
            [sample["exact_match"] for sample in samples], results["exact_match,none"])  # fmt: skip


def test_lm_eval_measures_our_exact_match_of_chats(served, python):
    samples, results = lm_eval(
        served, python, "texts", texts_task("chat_target", [], ""),
        "--apply_chat_template", model="local-chat-completions", base_url=f"{served.url}/v1/chat/completions",
    )  # fmt: skip
    compare(served.items, "chat", "chat_target", [sample["resps"][0][0] for sample in samples],
            [sample["exact_match"] for sample in samples], results["exact_match,none"])  # fmt: skip


def test_inspect_measures_our_exact_match_of_chats(served, python):
    (served.folder / "chats.py").write_text(INSPECT_TASK, encoding="utf-8")
    call(
        [
            python, "-m", "inspect_ai", "eval", "chats.py", "--model", f"openai-api/twinloop/{MODEL.name}",
            "--temperature", 0, "--max-tokens", MAX_TOKENS, "--log-dir", "logs", "--log-format", "json",
            "--display", "none",
        ],
        served.folder, TWINLOOP_BASE_URL=f"{served.url}/v1", TWINLOOP_API_KEY="none",
    )  # fmt: skip
    (path,) = (served.folder / "logs").glob("*.json")
    log = json.loads(path.read_text(encoding="utf-8"))
    assert log["status"] == "success"
    samples = sorted(log["samples"], key=lambda sample: sample["id"])
    (score,) = log["results"]["scores"]
    texts = [sample["output"]["choices"][0]["message"]["content"] for sample in samples]
    matches = [float(sample["scores"]["exact"]["value"] == "C") for sample in samples]
    compare(served.items, "chat", "chat_target", texts, matches, score["metrics"]["mean"]["value"])


def compare(
    items: list[dict[str, Any]], answer: str, target: str, texts: list[str], matches: list[float], share: float
) -> None:
    """Ours and theirs, item by item and over all."""
    assert texts == [item["ours"][answer] for item in items]
    ours, rate = exact_matches(items, answer, target)
    assert matches == ours
    assert share == pytest.approx(rate)
    assert 0 < rate < 1
