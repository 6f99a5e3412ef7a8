"""Small runs on a recipe's corpus, of several sizes and numbers of tokens, for a scaling law of its pretraining.

Each is an artifact: a second call, also for another budget, finds them, and one that was stopped goes on from its
checkpoint. Each has a learning rate that decays within its own tokens: the loss in the middle of a longer run is no
measurement of a shorter one (Hoffmann et al., 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinloop.common.errors import UserError
from twinloop.models.config import DecoderConfig
from twinloop.models.memory import flops_per_token
from twinloop.registry.artifact import Artifact
from twinloop.tasks.base_settings import NewBase
from twinloop.tasks.context import Context, Report
from twinloop.tasks.measure import export_in, losses_of_texts
from twinloop.tasks.other_processes import OtherProcesses
from twinloop.tasks.recipe import Recipe, TrainStage
from twinloop.tasks.tokenize import CORPUS, HELD_OUT, tokenize_stage
from twinloop.training.runtime import Runtime

if TYPE_CHECKING:
    from twinloop.models.decoder import Decoder
    from twinloop.models.tokenizer import ChatTokenizer

DEPTHS = (1, 2, 3)
SHARES = (1 / 3, 1)
"""Of the longest run's tokens."""
MIN_STEPS = 250
"""Of the shortest run. After 100 steps of the default recipe a network of 34,000 weights had learned so little (0.683
bits a byte, 0.532 after 300) that a law with it missed a run of six times the compute by 3.3%, without it by 0.9%."""
MAX_DEPTH = 64
SPARE = 1.25
"""More of the corpus than a run reads, since records differ in length."""


@dataclass(frozen=True)
class Measured:
    """A small run. loss: on the held-out text, in bits a byte. flops, seconds: of a token. busy_cores: what other
    processes used meanwhile."""

    depth: int
    parameters: int
    tokens: int
    loss: float
    flops: float
    seconds: float
    busy_cores: float


@dataclass(frozen=True)
class Shape:
    """A network of the recipe's kind. flops: of training it on a token."""

    depth: int
    parameters: int
    flops: float


@dataclass(frozen=True)
class Corpus:
    """stage: what pretrains on it. tokens: about, in all of it."""

    recipe: Recipe
    stage: TrainStage
    data: Artifact
    tokenizer: Artifact
    tokens: int

    @property
    def base(self) -> NewBase:
        """The recipe's network."""
        assert isinstance(self.recipe.base, NewBase)
        return self.recipe.base

    @property
    def depth(self) -> int:
        return self.base.depth

    @property
    def planned_tokens(self) -> int:
        """Of the recipe's pretraining."""
        tokens: int = self.stage.settings.model_dump()["tokens"]
        return tokens

    def config(self, depth: int) -> DecoderConfig:
        return of_depth(self.base, depth).decoder_config(self.tokenizer.metrics["vocab_size"])

    def shape(self, depth: int) -> Shape:
        config = self.config(depth)
        seq_len: int = getattr(self.stage.settings, "seq_len", config.max_position_embeddings)
        flops = flops_per_token(config, context=min(seq_len, config.max_position_embeddings) / 2, training=True)
        return Shape(depth, config.num_parameters, flops)

    def shapes(self) -> list[Shape]:
        return [self.shape(depth) for depth in range(1, MAX_DEPTH + 1)]


def of_depth(base: NewBase, depth: int) -> NewBase:
    """The network of another depth, its widths in proportion: heads as wide, and as many to a key-value head."""
    if base.hidden_size is None and base.num_attention_heads is None and base.num_key_value_heads is None:
        return base.model_copy(update={"depth": depth})  # the depth derives every size
    shape = base.decoder_config(base.vocab_size)
    heads = max(1, round(shape.num_attention_heads * depth / base.depth))
    width = heads * shape.hidden_size // shape.num_attention_heads
    queries = shape.num_attention_heads // shape.num_key_value_heads  # of a key-value head
    return base.model_copy(
        update={
            "depth": depth,
            "hidden_size": width,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // queries if heads % queries == 0 else heads,
            "intermediate_size": width * shape.intermediate_size // shape.hidden_size,
        }
    )


def pretraining_of(recipe: Recipe) -> TrainStage:
    """The stage that a law can be fitted for. Raises UserError for a recipe without one, or without a new network."""
    if not isinstance(recipe.base, NewBase):
        raise UserError(f"{recipe.name}: its base is trained already; --budget plans a new one (`base: {{depth: 4}}`)")
    for stage in recipe.train:
        if stage.method.records == CORPUS and "tokens" in type(stage.settings).model_fields:
            return stage
    raise UserError(f"{recipe.name}: no stage pretrains for a number of `tokens` on a corpus, which --budget plans")


def open_corpus(context: Context, recipe: Recipe, *, data: Artifact) -> Corpus:
    """The tokenizer, and what there is to train on. Raises UserError where no held-out text measures a loss."""
    from twinloop.records.validated import has_records, read_records

    stage = pretraining_of(recipe)
    assert isinstance(recipe.base, NewBase)
    if not has_records(data.path, HELD_OUT):
        raise UserError(f"{recipe.data_dir}: there is no {HELD_OUT}, on which the loss of a run is measured; add it")
    records = [each.method.records for each in recipe.train]
    tokenizer = tokenize_stage(context, recipe.base.vocab_size, records=records, data=data)
    size = sum(len(record["text"].encode()) for record in read_records(data.path, CORPUS))
    return Corpus(recipe, stage, data, tokenizer, round(size / tokenizer.metrics["bytes_per_token"]))


def grid(corpus: Corpus, longest: int) -> list[tuple[int, int]]:
    """(depth, tokens) of the small runs, cheapest first. Raises UserError where the corpus or `longest` is small."""
    batch: int = getattr(corpus.stage.settings, "batch_tokens", 1)
    least = MIN_STEPS * batch
    if longest * SHARES[0] < least:
        raise UserError(
            f"run-tokens: the shortest run would have {longest * SHARES[0]:,.0f} tokens, fewer than {MIN_STEPS} steps "
            f"of {batch:,}; give at least {math.ceil(least / SHARES[0] / 1000)}k"
        )
    if longest > 4 * corpus.tokens:
        raise UserError(
            f"{corpus.recipe.data_dir}: the corpus has about {corpus.tokens:,} tokens, too few for runs of "
            f"{longest:,}; give fewer with --run-tokens, or more text"
        )
    found = [(depth, round(longest * share)) for depth in DEPTHS for share in SHARES]
    return sorted(found, key=lambda each: corpus.shape(each[0]).flops * each[1])


def measure_runs(
    context: Context, corpus: Corpus, runtime: Runtime, longest: int, *, enough: Callable[[Measured], None]
) -> list[Measured]:
    """All runs of the grid. enough: raises UserError after the first, the smallest, where the others are not wanted."""
    (depth, tokens), *others = grid(corpus, longest)
    first = small_run(context, corpus, runtime, depth=depth, tokens=tokens)
    enough(first)
    return [first, *(small_run(context, corpus, runtime, depth=depth, tokens=tokens) for depth, tokens in others)]


def small_run(context: Context, corpus: Corpus, runtime: Runtime, *, depth: int, tokens: int) -> Measured:
    """Train a network of this depth for so many tokens, and score the held-out texts as a run's own stages are."""
    stage, config, tied = corpus.stage, corpus.config(depth), corpus.base.keys_as_queries
    settings = stage.settings.model_copy(update={"tokens": tokens})

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        from twinloop.models.tokenizer import ChatTokenizer
        from twinloop.training.loop import run_training
        from twinloop.training.weights import new_decoder

        runtime.use()
        network = new_decoder(config, seed=runtime.seed, keys_as_queries=tied)
        tokenizer = ChatTokenizer.load(corpus.tokenizer.path)
        records = _some_records(corpus, tokens)
        objective, batches = stage.method.build(records, network, tokenizer, settings, runtime, context.domain)
        others = OtherProcesses()
        result = run_training(
            network,
            objective,
            batches,
            settings,
            checkpoint_dir=keep / "checkpoints",
            checkpoint_every_s=context.checkpoint_every_s,
            on_step=report.trained(),
            device=runtime.device,
        )
        losses = _score(network, tokenizer, keep, runtime, corpus.data.path)
        return {**result.summary(), **losses, "seconds": result.seconds.total, "busy_cores": others.cores()}

    made = context.run(
        "scaling-run",
        work,
        settings={
            **settings.model_dump(),
            "network": config.model_dump(),
            "keys_as_queries": tied,
            "runtime": runtime.model_dump(),
        },
        inputs={"data": corpus.data, "tokenizer": corpus.tokenizer},
        modules=("twinloop.tasks.scaling",),
        found=[stage.method.found],
        uses_domain=stage.method.uses_domain,
        label=f"depth {depth}, {tokens / 1e3:,.0f}k",
    )
    numbers = made.metrics
    return Measured(
        depth=depth,
        parameters=config.num_parameters,
        tokens=numbers["tokens"],
        loss=numbers["bits_per_byte"],
        flops=corpus.shape(depth).flops,
        seconds=numbers["seconds"] / numbers["tokens"],
        busy_cores=numbers["busy_cores"],
    )


def _some_records(corpus: Corpus, tokens: int) -> list[dict[str, Any]]:
    """As many as hold so many tokens and some more, from all parts of the corpus; all where it has fewer."""
    from twinloop.records.validated import read_records

    records: Sequence[dict[str, Any]] = list(read_records(corpus.data.path, CORPUS))
    count = min(len(records), math.ceil(SPARE * tokens / corpus.tokens * len(records)))
    return [records[index * len(records) // count] for index in range(count)]


def _score(network: Decoder, tokenizer: ChatTokenizer, keep: Path, runtime: Runtime, data: Path) -> dict[str, float]:
    """Losses on the held-out texts, by the engine that ships."""
    from twinloop.models.directory import save_model
    from twinloop.serving.engine import Engine
    from twinloop.training.weights import get_weights

    save_model(keep / "model", network.config, get_weights(network), tokenizer)
    engine = Engine.load(export_in(keep, keep / "model", runtime), slots=1, threads=runtime.threads)
    return {name: loss.value for name, loss in losses_of_texts(engine, tokenizer, data).items()}
