"""A recipe: the settings of one whole pipeline, checked before anything runs.

Few settings. What can be derived is derived, and what nobody should change is a constant of its package. Imports
neither torch nor the libraries of any stage, so that a mistake is reported at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import Field, InstanceOf, SerializeAsAny, ValidationError, model_validator

from twinloop.common.errors import UserError
from twinloop.common.strict_yaml import read_yaml
from twinloop.domains.domain import Domain
from twinloop.models.config import KIND_NAMES, Kind, Precision
from twinloop.records import DATA_DIR, DATA_FILE
from twinloop.registry.versions import CHECKPOINTS
from twinloop.tasks.base_settings import (
    FORMS,
    KINDS,
    NAMED,
    NAMED_FORMS,
    TRAINED,
    AnyModel,
    BaseSettings,
    EarlierStage,
    NewBase,
    kind_of_model,
)
from twinloop.tasks.mistakes import explain_all
from twinloop.training.method import Method, load_method
from twinloop.training.runtime import Runtime, cuda_is_here, fastest_products
from twinloop.training.settings import (
    Count,
    NamedModel,
    Positive,
    Share,
    StrictModel,
    TrainSettings,
)

SUCH_AS = "a recipe is a YAML file such as recipes/returns.yaml"
BESIDE_SETTINGS = ("method", "records")
"""Keys of a stage that are no settings of its method."""
MOST_REPORTED = 5
"""Mistakes reported at once."""


class ValidateSettings(StrictModel):
    max_quarantined: Share = 0.01
    """Share of one file's rows that may be quarantined before the stage fails; duplicates do not count."""
    split_keys: list[str] = Field(default=["text"])
    """What training and held-out rows may not share: `text`, and keys that the domain defines."""


class EvaluateSettings(StrictModel):
    stage_cases: Count = 200
    """Cases that each stage of training is measured on; the evaluation itself takes them all."""
    max_new_tokens: Count = 160
    slots: Annotated[int, Field(ge=1, le=1024)] = 16
    samples: Count = 1
    """1: greedy answers only. More: so many answers a case are sampled too, for the domain's metrics (pass@k)."""
    temperature: Positive = 1.0
    """Of sampled answers."""


CUDA_ONLY: tuple[Precision, ...] = ("fp16", "bf16")
"""What the engine does not run on CPU."""


class ExportSettings(StrictModel):
    precisions: Annotated[list[Precision], Field(min_length=1)] | None = None
    """The first is served. None: fp32 and int8 on CPU, fp16 and bf16 on CUDA, which runs no other.

    fp16 first: its logits stay nine times nearer to the network's than bf16's, and within the gate's limit."""

    adapters: bool = False
    """Keep the adapter of the last stage beside its base, not merged: one server then answers for every version on that
    base, by its name. It runs on CPU, in fp32, int8 or int4."""

    def on(self, device: str) -> list[Precision]:
        on_cuda = device == "cuda" and not self.adapters
        return self.precisions or (["fp16", "bf16"] if on_cuda else ["fp32", "int8"])

    def only_on_cuda(self) -> Precision | None:
        """The first precision asked for that the engine does not run on CPU."""
        return next((each for each in self.precisions or [] if each in CUDA_ONLY), None)


class GateSettings(StrictModel):
    rules: str = "recipes/gate.yaml"
    """File with the release rules, relative to the project."""


@dataclass(frozen=True)
class TrainStage:
    """One stage of training. name: its method's, with a number from the second one on, such as sft-2."""

    name: str
    method: Method
    settings: TrainSettings
    place: str
    """Where the recipe holds it, such as train[1]."""
    models: Mapping[str, BaseSettings | EarlierStage] = field(default_factory=dict)
    """The other models that it reads, by the setting that names each, such as `teacher`."""

    @property
    def earlier(self) -> dict[str, str]:
        """Those of them that stages before it make: the names of these stages, by setting."""
        return {name: model.stage for name, model in self.models.items() if isinstance(model, EarlierStage)}

    @property
    def needs_verifier(self) -> bool:
        """Whether the domain's verifier gives its rewards."""
        return self.method.needs_verifier and self.settings.needs_verifier()

    def check_records(self, domain: Domain) -> None:
        """Raises UserError where `records` names nothing of this domain that the method can learn from."""
        if self.method.named_records:
            try:
                self.method.check_records(domain.record_types())
            except UserError as error:
                raise UserError(f"{self.place}.records: {error}") from None

    @property
    def named_records(self) -> dict[str, str]:
        """The key `records` and its value, where the recipe has it."""
        return {"records": self.method.named_records} if self.method.named_records else {}


class Recipe(StrictModel):
    """One pipeline. Each stage receives its own section and nothing else."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    """Also the name of the registered model."""
    domain: str
    """What the model is for: a ready-made domain, an importable module, or a file such as ./tickets.py."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    threads: Annotated[int, Field(ge=1, le=1024)] = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    backward: Literal["float32", "bfloat16"] = "float32"
    """What the products of the backward pass may round their factors to, on CPU: bfloat16 where a measurement at start
    finds it faster, as on CPUs that have it, and float32 elsewhere. Measure to the gate what it costs."""
    checkpoint_every_s: Annotated[float, Field(ge=0)] = 20.0
    """What a crash may cost. Changes no result."""
    data: Annotated[str, Field(pattern=r"^(\.|[\w-]+(/[\w-]+)*)$")] = "."
    """The folder whose data.dvc versions the data, relative to the project: `.` where the project has one data set."""
    base: SerializeAsAny[InstanceOf[BaseSettings]]
    validate_: Annotated[ValidateSettings, Field(alias="validate")] = ValidateSettings()
    train: tuple[InstanceOf[TrainStage], ...]
    evaluate: EvaluateSettings = EvaluateSettings()
    export: ExportSettings = ExportSettings()
    gate: GateSettings = GateSettings()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.name.endswith(CHECKPOINTS):
            raise ValueError(f"name: {self.name}: {CHECKPOINTS} is for the registered model of a recipe's checkpoints")
        if self.base.max_length is not None:
            self.check_context(self.base.max_length)
        if self.device == "cpu" and (wrong := self.export.only_on_cuda()):
            raise ValueError(f"export.precisions has {wrong}, which only CUDA runs, and device is cpu")
        if self.export.adapters and self.train:  # what is wrong with the stages is reported beside
            if wrong := self.export.only_on_cuda():
                raise ValueError(
                    f"export.precisions has {wrong}, and export.adapters runs on CPU only; take fp32 or int8"
                )
            if self.train[-1].method.has_head:
                raise ValueError("export.adapters: the last stage trains a head, for which an adapter has no place")
            lora = self.train[-1].settings.lora
            if lora is None or lora.merge:
                raise ValueError("export.adapters: the last stage makes no adapter; give it `lora`, without `merge`")
        return self

    def check_context(self, max_length: int) -> None:
        """Raises ValueError where the settings do not fit a model of so many tokens."""
        if self.answer_tokens >= max_length:
            raise ValueError(
                f"evaluate.max_new_tokens ({self.evaluate.max_new_tokens}) leaves no tokens for a prompt in "
                f"base.max_length ({max_length})"
            )
        for stage in self.train:
            try:
                stage.settings.check_context(max_length)
            except ValueError as error:
                raise ValueError(f"{stage.place}.{error}") from None

    @property
    def answer_tokens(self) -> int:
        """The most tokens of an answer that is measured; of a network with a head it is one."""
        headed = any(stage.method.has_head for stage in self.train[-1:])
        return 1 if headed else self.evaluate.max_new_tokens

    @property
    def kind(self) -> Kind:
        """What the network gives that it releases: that of the last stage."""
        return self.train[-1].method.kind

    @property
    def dataset(self) -> str:
        """The file that versions the data, relative to the project."""
        return (PurePosixPath(self.data) / DATA_FILE).as_posix()

    @property
    def data_dir(self) -> str:
        """The folder of the data's files, relative to the project."""
        return (PurePosixPath(self.data) / DATA_DIR).as_posix()

    @property
    def record_types(self) -> tuple[str, ...]:
        """The data files that are read, by name: what the stages learn from, and what they are measured on."""
        trained = dict.fromkeys(stage.method.records for stage in self.train)
        if any(stage.settings.reward_models() for stage in self.train):
            trained["preferences"] = None  # on which reward models are measured
        of_documents = any(stage.method.own_records == "corpus" for stage in self.train)
        held_out = ("corpus_heldout", "cases") if of_documents else ("cases",)
        return (*trained, *held_out)

    def plain(self) -> dict[str, Any]:
        """Every setting, also those at their default, as JSON; a stage of training by its name."""
        stages = {
            each.name: {"method": each.method.name} | each.named_records | each.settings.model_dump(mode="json")
            for each in self.train
        }
        return self.model_dump(mode="json", by_alias=True, exclude={"train"}) | {"train": stages}

    def runtime(self) -> Runtime:
        """Raises UserError where the recipe wants CUDA, or a precision that only CUDA runs, and there is none."""
        here = cuda_is_here()
        if self.device == "cuda" and not here:
            raise UserError("device: cuda, but torch finds no GPU on this machine; set it to auto or cpu")
        device: Literal["cpu", "cuda"] = "cuda" if here and self.device != "cpu" else "cpu"
        if device == "cpu" and (wrong := self.export.only_on_cuda()):
            raise UserError(
                f"export.precisions: {wrong} runs on CUDA only, and this machine has no GPU; take fp32 or int8"
            )
        library, fastest = fastest_products() if device == "cpu" else ("blas", "bfloat16")
        backward = self.backward if fastest == "bfloat16" else "float32"
        return Runtime(seed=self.seed, threads=self.threads, device=device, library=library, backward=backward)


def default_recipe(project: Path) -> Path:
    """The recipe that commands take where none is named: `recipe` of params.yaml, or else the only one in recipes/.

    Raises UserError where that is none or several.
    """
    if named := _named_recipe(project):
        return named
    found = [path for path in sorted((project / "recipes").glob("*.yaml")) if _is_recipe(path)]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(
            f"{project / 'recipes'}: which recipe? There: {names}; name one, or set `recipe` in params.yaml"
        )
    return found[0]


def default_model(project: Path) -> str:
    """The registered model that commands take where none is named: that of the default recipe."""
    return load_recipe(default_recipe(project), project).name


def recipe_of(model: str, project: Path) -> Recipe:
    """The recipe that makes the registered model of this name. Raises UserError where no recipe of the project does."""
    return load_recipe(recipe_path_of(model, project), project)


def recipe_path_of(model: str, project: Path) -> Path:
    """The recipe's file, whatever it is called. Raises UserError where no recipe of the project makes this model."""
    named = _named_recipe(project)
    for path in [*([named] if named else []), *sorted((project / "recipes").glob("*.yaml"))]:
        if _is_recipe(path) and read_yaml(path, SUCH_AS).get("name") == model:
            return path
    raise UserError(f"{model}: no recipe in {project / 'recipes'} has this name; name a model that one makes")


def recipe_names(project: Path) -> set[str]:
    """The models that the project's recipes make."""
    paths = [path for path in (project / "recipes").glob("*.yaml") if _is_recipe(path)]
    return {str(name) for path in paths if (name := read_yaml(path, SUCH_AS).get("name"))}


def _named_recipe(project: Path) -> Path | None:
    """The recipe that params.yaml names."""
    params = read_yaml(project / "params.yaml", "it is the project's own")
    named = params.get("recipe") if isinstance(params, Mapping) else None
    return project / named if isinstance(named, str) else None


def _is_recipe(path: Path) -> bool:
    fields = read_yaml(path, SUCH_AS)
    return isinstance(fields, Mapping) and "train" in fields


def load_recipe(path: Path, project: Path | None = None) -> Recipe:
    """Read and check a recipe. project: where files such as ./my_method.py are; None: the working directory.

    Raises UserError: one line with the file, the key, and what is allowed there.
    """
    fields = read_yaml(path, SUCH_AS)
    if not isinstance(fields, dict):
        raise UserError(f"{path}: a recipe is a mapping, such as `name: my-model` and `train: [{{method: sft, ...}}]`")
    problems: list[str] = []
    if (base := _read_base(fields.get("base"), problems)) is not None:
        fields["base"] = base
    stages = _read_stages(fields.get("train"), project or Path.cwd(), problems)
    if stages is not None:
        fields["train"] = tuple(stages)
    try:
        recipe = Recipe.model_validate(fields)
    except ValidationError as error:
        explained = explain_all(error, fields, Recipe)
        problems = [each for each in explained if not each.startswith(("train: ", "base: "))] + problems
    if problems:
        raise UserError(f"{path}: {'; '.join(problems[:MOST_REPORTED])}")
    return recipe


def _read_base(fields: Any, problems: list[str]) -> BaseSettings | None:
    """The key `base`; what is wrong with it is added to `problems`, and None returned."""
    if not isinstance(fields, dict):
        problems.append(f"base: {'missing' if fields is None else 'not a mapping'}; {FORMS}")
        return None
    return _read_model(fields, "base", KINDS, FORMS, problems)


def _read_model(
    fields: dict[str, Any], place: str, kinds: Mapping[str, type[AnyModel]], forms: str, problems: list[str]
) -> AnyModel | None:
    """Which model the keys name; what is wrong with them is added to `problems`, and None returned."""
    try:
        kind = kind_of_model(fields, place, kinds, forms)
        return kind.model_validate(fields)
    except ValidationError as error:
        problems += explain_all(error, fields, kind, place)
    except ValueError as error:
        problems.append(str(error))
    return None


def _read_named_models(
    settings: TrainSettings, place: str, earlier: Sequence[TrainStage], problems: list[str]
) -> dict[str, BaseSettings | EarlierStage]:
    """The trained models that a stage names, by setting; what is wrong with them is added to `problems`."""
    found: dict[str, BaseSettings | EarlierStage] = {}
    for name, asked in settings.named_models().items():
        model = _read_model(asked.name, f"{place}.{name}", NAMED, NAMED_FORMS, problems)
        if isinstance(model, NewBase):
            problems.append(f"{place}.{name}: depth makes a new network; {TRAINED} that is trained")
        elif isinstance(model, EarlierStage) and (wrong := _not_made(model.stage, asked, earlier)):
            problems.append(f"{place}.{name}: {wrong}")
        elif model:
            found[name] = model
    return found


def _not_made(name: str, asked: NamedModel, earlier: Sequence[TrainStage]) -> str | None:
    """What is wrong where no stage before makes such a model."""
    makers = [stage.name for stage in earlier if stage.method.kind == asked.kind]
    if name in makers:
        return None
    known = f"those that do: {', '.join(makers)}" if makers else f"a folder is named as ./{name}"
    return f"no stage {name} makes {KIND_NAMES[asked.kind]} before it; {known}"


def _read_stages(entries: Any, project: Path, problems: list[str]) -> list[TrainStage] | None:
    """The stages of the key `train`; what is wrong with them is added to `problems`. None where they are no list."""
    if not isinstance(entries, list) or not entries:
        problems.append("train: must be a list of stages, such as `train: [{method: sft, learning_rate: 1e-3, ...}]`")
        return None
    stages: list[TrainStage] = []
    named: Counter[str] = Counter()
    for index, entry in enumerate(entries):
        place = f"train[{index}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("method"), str):
            problems.append(f"{place}.method: missing; a stage is a mapping such as {{method: sft, ...}}")
            continue
        try:
            method = load_method(entry["method"], project)
        except UserError as error:
            problems.append(f"{place}.{error}")
            continue
        values = {key: value for key, value in entry.items() if key not in BESIDE_SETTINGS}
        if "records" in entry:
            if not isinstance(entry["records"], str) or not entry["records"].isidentifier():
                problems.append(f"{place}.records: not the name of a data file without its ending, such as corpus")
                continue
            method = replace(method, named_records=entry["records"])
        try:
            settings = method.settings.model_validate(values)
        except ValidationError as error:
            problems += explain_all(error, values, method.settings, place, BESIDE_SETTINGS)
            continue
        named[method.name] += 1
        count = named[method.name]
        name = method.name if count == 1 else f"{method.name}-{count}"
        models = _read_named_models(settings, place, stages, problems)
        stages.append(TrainStage(name, method, settings, place, models))
    return stages
