"""What a recipe takes, before it runs: memory by part, tokens, arithmetic and time, by a few real steps of each stage.

The data is built, validated and tokenized as `twinloop run` does it, and kept for it. Each stage of training is then
built on a sample of its records and trains the untrained base for seconds, so its time includes what no formula has:
packing, optimizer, sampling, this machine. What a step and a record take is multiplied by how many there are.
"""

from __future__ import annotations

import copy
import logging
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from twinloop.common.memory import available_bytes
from twinloop.domains.domain import Domain, Verdict, domain_code
from twinloop.models.config import DecoderConfig, Precision
from twinloop.models.directory import load_config
from twinloop.models.memory import ServingMemory, TrainingMemory, flops_per_token, serving_memory, training_memory
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.registry.artifact import Artifact
from twinloop.tasks.base import base_stage
from twinloop.tasks.base_settings import NewBase
from twinloop.tasks.base_source import Base
from twinloop.tasks.context import Context
from twinloop.tasks.imported_base import import_models, import_stage
from twinloop.tasks.other_processes import BUSY_CORES, OtherProcesses
from twinloop.tasks.recipe import Recipe, TrainStage
from twinloop.tasks.tokenize import tokenize_stage
from twinloop.training.runtime import Runtime
from twinloop.training.settings import RolloutSettings, TrainSettings

if TYPE_CHECKING:
    from twinloop.training.loop import StepReport
    from twinloop.training.stream import Batches, Step

log = logging.getLogger(__name__)

SAMPLE = 600
"""Records that a stage is built on, and half as many: two points give the part that does not grow with the data."""
PROBE_S = 3.0
MIN_STEPS = 4
"""Besides the first, which also allocates."""
STAGE_S = 1.0
"""Of every stage, besides its training: a run in MLflow, the model directory and its checksums."""
ASSUMED_WRONG = 0.05
"""Share of answers without reward in the probe of RL. How often a group of answers has a gradient depends on it."""
MORE_WORDS = (" so", "\nso\n", "<think>\nso\n</think>\n\n")
"""Put into a gold answer, to see whether the verifier pays for longer ones."""
TRIED_WITH_MORE = 3
"""Gold answers that they are put into: one form is that of all."""


@dataclass(frozen=True)
class AnswerLength:
    """Tokens that each answer of RL is taken to have. is_bound: how long right answers are is not known, and these are
    the most that they can have."""

    tokens: int
    is_bound: bool

    def __str__(self) -> str:
        taken = f"each answer is taken to have {self.tokens} tokens"
        if self.is_bound:
            return (
                f"{taken}, the most that max_new_tokens allows, since how long right answers are is not known; shorter "
                "ones take less"
            )
        return f"{taken}, as the longest gold answer has"


@dataclass(frozen=True)
class StagePlan:
    """Of the whole stage. flops: of forward and backward over `tokens`. seconds: on this machine, as busy as it is.
    answers: where the stage samples some."""

    name: str
    memory: TrainingMemory
    steps: int
    tokens: int
    flops: float
    seconds: float
    answers: AnswerLength | None = None


@dataclass(frozen=True)
class Plan:
    """busy_cores: what other processes used meanwhile."""

    config: DecoderConfig
    stages: list[StagePlan]
    serving: dict[Precision, ServingMemory]
    busy_cores: float

    @property
    def busy(self) -> bool:
        """Whether the times are longer than on an idle machine."""
        return self.busy_cores > BUSY_CORES


def make_plan(
    context: Context,
    recipe: Recipe,
    base: Base,
    runtime: Runtime,
    *,
    data: Artifact,
    named: Mapping[str, Mapping[str, Base]] = MappingProxyType({}),
) -> Plan:
    """data: validated. named: the other models that stages read. Raises UserError where a stage cannot be built."""
    records = [stage.method.records for stage in recipe.train]
    if isinstance(recipe.base, NewBase):
        tokenizer = tokenize_stage(context, recipe.base.vocab_size, records=records, data=data)
        model = base_stage(context, recipe.base, seed=recipe.seed, tokenizer=tokenizer)
    else:
        model = import_stage(context, base)
    read = import_models(context, named, start=model)
    config = load_config(model.path)
    max_length = config.max_position_embeddings
    others = OtherProcesses()
    stages = []
    for stage in recipe.train:
        context.progress.started(f"plan {stage.name}")
        started = time.perf_counter()
        rows, seq_len = stage.settings.shape(max_length)
        asked = stage.settings.named_models()
        imported = {name: each.path for name, each in read.get(stage.name, {}).items()}
        with _untrained(stage, model.path) as earlier:
            named_by_stage = {**imported, **earlier}
            memory = training_memory(
                config,
                micro_batch_tokens=rows * seq_len,
                optimizer=stage.settings.optimizer,
                device=runtime.device,
                reference=stage.settings.has_reference(),
                # a teacher is gone before training begins
                reward_models=[load_config(at) for name, at in named_by_stage.items() if asked[name].kind == "reward"],
                lora=stage.settings.lora.form if stage.settings.lora else None,
            )
            if runtime.device == "cpu":
                _warn_of_memory(stage.name, memory.total_bytes, available_bytes())
            settings = stage.settings.with_models(named_by_stage)
            cost = _Prober(context.domain, stage, settings, runtime, data.path, model.path).measure()
        frozen = stage.settings.lora is not None
        flops = cost.tokens * flops_per_token(
            config, context=min(seq_len, max_length) / 2, training=True, frozen=frozen
        )
        stages.append(StagePlan(stage.name, memory, cost.steps, cost.tokens, flops, cost.seconds, cost.answers))
        step = f"{1000 * cost.step_s:,.0f} ms a step"
        context.progress.finished(f"plan {stage.name}", seconds=time.perf_counter() - started, name=step)
    serving = {
        precision: serving_memory(
            config,
            precision=precision,
            slots=recipe.evaluate.slots,
            max_length=max_length,
            adapter_ranks=_exported_ranks(recipe),
        )
        for precision in recipe.export.on(runtime.device)
    }
    return Plan(config, stages, serving, others.cores())


def _warn_of_memory(stage: str, needed: int, available: int) -> None:
    """Before the stage is tried: the system may end the process that takes more."""
    if needed > available:
        log.warning(
            "%s takes about %.0f MiB of memory, and %.0f MiB are available; a smaller micro_batch_size, an adapter "
            "(`lora`) or a smaller base takes less",
            *(stage, needed / 2**20, available / 2**20),
        )


def _exported_ranks(recipe: Recipe) -> int:
    """Ranks of the adapter that stays beside the weights: adapters of stages after each other are exported as one."""
    adapters = [stage.settings.lora for stage in recipe.train if not stage.method.has_head]
    kept = takewhile(lambda lora: lora is not None and not lora.merge, reversed(adapters))
    return sum(lora.rank for lora in kept if lora is not None) if recipe.export.adapters else 0


@dataclass(frozen=True)
class _Cost:
    steps: int
    tokens: int
    seconds: float
    step_s: float
    answers: AnswerLength | None


@dataclass(frozen=True)
class _Built:
    """A stage on so many records: `steps` in all, and what one took."""

    steps: int
    build_s: float
    step_s: float
    step_tokens: float


class _Prober:
    """Trains one stage for seconds."""

    def __init__(
        self,
        domain: Domain,
        stage: TrainStage,
        settings: TrainSettings,
        runtime: Runtime,
        data: Path,
        model: Path,
    ):
        """settings: the stage's, with the directories of the other models that it reads."""
        self._domain, self._stage, self._settings, self._runtime = domain, stage, settings, runtime
        self._data, self._model = data, model

    def measure(self) -> _Cost:
        from twinloop.records.validated import read_records

        started = time.perf_counter()
        records = list(read_records(self._data, self._stage.method.records))
        read_s = time.perf_counter() - started
        sizes = [SAMPLE // 2, SAMPLE] if len(records) > SAMPLE else [len(records)]
        answers = self._answer_length(_spread(records, sizes[-1]))
        found = [self._probe(_spread(records, size), answers) for size in sizes]
        last = found[-1]
        steps = round(_extrapolate(sizes, [each.steps for each in found], len(records)))
        build_s = _extrapolate(sizes, [each.build_s for each in found], len(records))
        seconds = STAGE_S + read_s + max(0.0, build_s) + steps * last.step_s
        return _Cost(steps, round(steps * last.step_tokens), seconds, last.step_s, answers)

    def _probe(self, records: list[dict[str, Any]], answers: AnswerLength | None) -> _Built:
        from twinloop.training.adapters import attach_adapter
        from twinloop.training.loop import run_training
        from twinloop.training.weights import load_decoder

        self._runtime.use()
        settings, tokenizer, domain = self._as_trained(answers)
        network = load_decoder(self._model)
        if settings.lora:
            attach_adapter(network, settings.lora.form, seed=self._runtime.seed, stage=self._stage.name)
        started = time.perf_counter()
        objective, batches = self._stage.method.build(records, network, tokenizer, settings, self._runtime, domain)
        built = time.perf_counter()
        some = _FirstSteps(batches)
        run_training(
            network,
            objective,
            some,
            settings,
            checkpoint_dir=None,
            on_step=some.done,
            device=self._runtime.device,
        )
        return _Built(batches.total_steps, built - started, some.step_s, some.step_tokens)

    def _answer_length(self, records: Sequence[dict[str, Any]]) -> AnswerLength | None:
        """Of the stage's answers, where it samples some: that of the gold answers, if right ones can be no longer."""
        settings, domain = self._settings, self._domain
        if not isinstance(settings, RolloutSettings):
            return None
        most = settings.max_new_tokens
        if not settings.needs_verifier() or not domain.has("gold"):
            return AnswerLength(most, is_bound=True)
        tokenizer = ChatTokenizer.load(self._model)
        with domain_code(domain, "gold", "a prompt's facts"):
            gold = [(domain.gold(facts), facts) for facts in map(domain.read_facts, records)]
        if any(_may_be_longer(domain, *each) for each in gold[:TRIED_WITH_MORE]):
            return AnswerLength(most, is_bound=True)
        longest = max((len(tokenizer.encode_answer(answer)) for answer, _ in gold), default=most)
        return AnswerLength(min(most, longest), is_bound=False)

    def _as_trained(self, answers: AnswerLength | None) -> tuple[TrainSettings, ChatTokenizer, Domain]:
        """Settings, tokenizer and domain with which the untrained network costs about what the trained one will:
        answers that have this length, and most of them rewarded."""
        settings = self._settings
        if answers is None:
            return settings, ChatTokenizer.load(self._model), self._domain
        shorter = settings.model_copy(update={"max_new_tokens": answers.tokens})
        domain = _rewarding(self._domain) if settings.needs_verifier() else self._domain
        return shorter, _Endless.load(self._model), domain


class _Endless(ChatTokenizer):
    """With it every answer has all the tokens that it may: how soon the untrained network would end it says nothing."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return ()


def _may_be_longer(domain: Domain, gold: str, facts: Any) -> bool:
    """Whether the verifier pays for the gold answer with more words in it, such as thinking before the value."""
    places = [0, *(space.start() for space in re.finditer(r"\s+", gold)), len(gold)]
    longer = [gold[:place] + words + gold[place:] for place in places for words in MORE_WORDS]
    with domain_code(domain, "verify", "a longer gold answer"):
        return any(domain.verify(answer, facts).reward > 0 for answer in longer)


class _FirstSteps:
    """A stream that ends once enough of it was timed."""

    def __init__(self, batches: Batches):
        self._batches = batches
        self._steps: list[StepReport] = []
        self._started = time.perf_counter()

    @property
    def total_steps(self) -> int:
        """One more than are done, until it is enough."""
        done, all_steps = len(self._steps), self._batches.total_steps
        enough = done > MIN_STEPS and time.perf_counter() - self._started > PROBE_S
        return done if enough or done == all_steps else min(done + 1, all_steps)

    def next(self) -> Step:
        return self._batches.next()

    def state(self) -> dict[str, Any]:
        return self._batches.state()

    def restore(self, state: dict[str, Any]) -> None:
        self._batches.restore(state)

    def done(self, report: StepReport) -> None:
        self._steps.append(report)

    @property
    def step_s(self) -> float:
        """Seconds a step; of a short stage, its first one's as well."""
        return statistics.median(report.seconds.total for report in self._timed)

    @property
    def step_tokens(self) -> float:
        return statistics.fmean(report.tokens for report in self._timed)

    @property
    def _timed(self) -> list[StepReport]:
        return self._steps[1:] or self._steps


def _rewarding(domain: Domain) -> Domain:
    """The domain with the verifier's cost and other rewards: the untrained network would get none."""
    verify: Callable[[str, Any], Verdict] = domain.verify
    drawn = random.Random(0)

    def assumed(output: str, facts: Any) -> Verdict:
        return replace(verify(output, facts), reward=float(drawn.random() >= ASSUMED_WRONG))

    probed = copy.copy(domain)
    probed.verify = assumed  # type: ignore[method-assign]
    return probed


@contextmanager
def _untrained(stage: TrainStage, base: Path) -> Iterator[dict[str, Path]]:
    """Untrained models in the place of those that earlier stages will make, by the stage's setting. base: a directory,
    itself in the place of a model that writes text."""
    asked = stage.settings.named_models()
    with tempfile.TemporaryDirectory() as folder:
        reward_model = Path(folder)
        if any(asked[name].kind == "reward" for name in stage.earlier):
            _save_untrained_reward_model(reward_model, base)
        yield {name: reward_model if asked[name].kind == "reward" else base for name in stage.earlier}


def _save_untrained_reward_model(folder: Path, base: Path) -> None:
    """base: a model directory. Its head is drawn at random: of one that is 0, no group of answers has a gradient."""
    import torch

    from twinloop.models.directory import save_model
    from twinloop.training.heads import REWARD, attach_head
    from twinloop.training.weights import get_weights, load_decoder

    network, tokenizer = load_decoder(base), ChatTokenizer.load(base)
    attach_head(network, REWARD, tokenizer, ends=tokenizer.stop_ids)
    torch.nn.init.normal_(network.score.weight, generator=torch.Generator().manual_seed(0))
    save_model(folder, network.config, get_weights(network), tokenizer)


def _spread(records: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """So many of them, from all parts of the file."""
    return [records[index * len(records) // count] for index in range(count)]


def _extrapolate(sizes: Sequence[int], values: Sequence[float], size: int) -> float:
    """The line through the last two points; one point holds for its own size."""
    if len(sizes) == 1:
        return values[0]
    (x0, x1), (y0, y1) = sizes[-2:], values[-2:]
    return y1 + (y1 - y0) / (x1 - x0) * (size - x1)
