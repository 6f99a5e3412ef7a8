"""The workload of a benchmark: a recipe's network, its tokenizer and its data, small but of the real kind."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import onnxruntime as ort
import torch

from benchmarks.table import heading
from twinloop.common.errors import UserError
from twinloop.common.strict_yaml import read_yaml
from twinloop.domains.domain import Domain
from twinloop.domains.loader import load_domain
from twinloop.domains.returns.case_maker import GeneratorParams
from twinloop.domains.returns.generator import generate
from twinloop.models.config import DecoderConfig
from twinloop.models.decoder import Decoder
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.tasks.base_settings import NewBase
from twinloop.tasks.base_source import resolve_base
from twinloop.tasks.recipe import Recipe, TrainStage, default_recipe, load_recipe
from twinloop.training.objectives import Objective
from twinloop.training.runtime import Runtime
from twinloop.training.settings import RolloutSettings
from twinloop.training.stream import Batches
from twinloop.training.weights import new_decoder

SCALE = 0.1
"""Of the data set that a run trains on: enough for minutes of batches that never repeat a row."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """data: a folder with the generator's files."""

    recipe: Recipe
    domain: Domain
    runtime: Runtime
    tokenizer: ChatTokenizer
    data: Path

    @property
    def config(self) -> DecoderConfig:
        return self.base.decoder_config(self.tokenizer.vocab_size)

    @property
    def base(self) -> NewBase:
        return new_base_of(self.recipe)

    def new_network(self) -> Decoder:
        """Untrained."""
        return new_decoder(self.config, seed=self.runtime.seed)

    def records(self, name: str) -> Iterator[Record]:
        with (self.data / f"{name}.jsonl").open(encoding="utf-8") as file:
            yield from map(json.loads, file)

    @property
    def rollouts(self) -> RolloutSettings:
        """How answers are sampled: as the first stage that samples does. Raises UserError where none does."""
        for stage in self.recipe.train:
            if isinstance(stage.settings, RolloutSettings):
                return stage.settings
        raise UserError(f"{self.recipe.name}: no stage samples answers, so its rollouts cannot be measured")

    @cached_property
    def prompts(self) -> list[list[int]]:
        """What answers are sampled to in RL."""
        return [self.tokenizer.encode_prompt(record["prompt"]) for record in self.records("prompts")]

    @property
    def context(self) -> int:
        """Tokens in a slot half-way through an answer: the usual prompt, and half of what may follow it."""
        return sorted(map(len, self.prompts))[len(self.prompts) // 2] + self.rollouts.max_new_tokens // 2

    def build(
        self,
        stage: TrainStage,
        network: Decoder,
        *,
        domain: Domain | None = None,
        made: Mapping[str, Path] | None = None,
    ) -> tuple[Objective, Batches]:
        """What the stage trains on, exactly as its task does. domain: another one to give rewards. made: what stages
        before it made, by their names: reward models among them."""
        made = made or {}
        places = {name: made[maker] for name, maker in stage.earlier.items() if maker in made}
        if missing := [name for name in stage.models if name not in places]:
            raise UserError(
                f"{stage.place}.{missing[0]}: a whole run makes this model; benchmarks.lifecycle is one, of a recipe "
                "whose models are all made by its stages"
            )
        settings = stage.settings.with_models(places)
        records = self.records(stage.method.records)
        judge = domain or self.domain
        return stage.method.build(records, network, self.tokenizer, settings, self.runtime, judge)


def prepare(recipe: Recipe, device: Literal["cpu", "cuda"], data: Path) -> Workload:
    """With a tokenizer trained on the data, or that of the recipe's base. Torch then uses the recipe's threads."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU on this machine")
    if source := resolve_base(recipe, Path.cwd()).source:
        tokenizer = source.load_tokenizer()
    else:
        with (data / "corpus.jsonl").open(encoding="utf-8") as corpus:
            texts: Iterable[str] = (json.loads(line)["text"] for line in corpus)
            tokenizer = train_tokenizer(texts, new_base_of(recipe).vocab_size)
    runtime = recipe.model_copy(update={"device": device}).runtime()
    runtime.use()
    return Workload(recipe, load_domain(recipe.domain, Path.cwd()).domain, runtime, tokenizer, data)


def new_base_of(recipe: Recipe) -> NewBase:
    """Raises UserError where the recipe starts from a model that is there already."""
    if not isinstance(recipe.base, NewBase):
        raise UserError(f"{recipe.name}: measured are recipes with a new network (`base: {{depth: 4}}`); name one")
    return recipe.base


def make_data(out: Path, scale: float, dataset: str = ".") -> Path:
    """The data set of the folder's params.yaml, its counts multiplied."""
    params = read_yaml(Path(dataset) / "params.yaml", "run this in the project's folder")["generate"]
    counts = {name: value for name, value in params.items() if name != "seed" and isinstance(value, int)}
    generate(GeneratorParams(**params | {name: max(8, int(value * scale)) for name, value in counts.items()}), out)
    return out


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every measurement has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", default=default_recipe(Path.cwd()))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser


@contextmanager
def open_workload(options: argparse.Namespace, scale: float = SCALE) -> Iterator[Workload]:
    """For `arguments`, in a temporary folder."""
    recipe = load_recipe(options.recipe)
    with TemporaryDirectory(prefix="twinloop-bench-") as folder:
        yield prepare(recipe, options.device, make_data(Path(folder) / "raw", scale, recipe.data))


def machine(device: str, threads: int) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads} threads"


def heading_of(workload: Workload) -> str:
    config, runtime = workload.config, workload.runtime
    libraries = f"torch {torch.__version__}, onnxruntime {ort.__version__}"
    network = f"{workload.recipe.name}: {config.num_parameters:,} parameters, vocabulary {config.vocab_size}"
    return heading(machine(runtime.device, runtime.threads), libraries, network)
