"""A training method: one module that defines what is learned from which records. A recipe's stage names it.

A method's module holds

    Settings        its settings, derived from a class of `training/settings.py`
    RECORDS         the record type that it learns from: corpus, chat, preferences, prompts, or one of the domain's
    build(records, model, tokenizer, settings, runtime, domain) -> (objective, batches)

and, where the defaults do not fit,

    NEEDS_VERIFIER  True: the domain's verifier gives the rewards. It is audited before
    USES_DOMAIN     True: other code of the domain's, such as its labels, changes what is trained
    HEAD            "labels" or "reward": what it trains scores a text's last token, and writes no text
    SHOWN           names of metrics to show beside the loss while it trains
    conversations(record), lengths(record, tokenizer)   as in `training/forms.py`
    check(settings, tokenizer, domain)   raises UserError for what no records could mend, before any stage is trained

Settings that name another model, such as a teacher, are a `ModelName` and say so in `named_models`; `build` gets them
with its directory.
`build` gets the domain. So the domain's code is part of the stage's key where the method needs the verifier, and for
every method that is not ready-made. The module's docstring names the paper. torch is imported inside `build`, so that a
recipe is checked without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import twinloop.training.methods
from twinloop.common.errors import UserError
from twinloop.common.modules import FoundModule, find_module, modules_in
from twinloop.domains.domain import Domain
from twinloop.models.config import Kind
from twinloop.training import forms
from twinloop.training.runtime import Runtime
from twinloop.training.settings import TrainSettings

if TYPE_CHECKING:
    from twinloop.domains.record_types import RecordType
    from twinloop.models.decoder import Decoder
    from twinloop.models.tokenizer import ChatTokenizer
    from twinloop.training.objectives import Objective
    from twinloop.training.stream import Batches

PARTS = ("Settings", "RECORDS", "build")


@dataclass(frozen=True)
class Method:
    """A method's module, with the defaults for what it leaves out."""

    found: FoundModule
    named_records: str | None = None
    """A record type of the same columns that the recipe names in place of the module's own."""

    @property
    def name(self) -> str:
        return self.found.short_name

    @property
    def settings(self) -> type[TrainSettings]:
        kind: type[TrainSettings] = self.found.module.Settings
        return kind

    @property
    def records(self) -> str:
        """The record type that it learns from."""
        return self.named_records or self.own_records

    @property
    def own_records(self) -> str:
        """The record type that it learns from where the recipe names no other."""
        own: str = self.found.module.RECORDS
        return own

    def check_records(self, types: Mapping[str, RecordType]) -> None:
        """Raises UserError where none of these, the domain's record types, is what the method can learn from."""
        named, own = types.get(self.records), types.get(self.own_records)
        if named is None:
            raise UserError(f"no record type {self.records!r}; there are {', '.join(types)}")
        if named.split != "train":
            raise UserError(f"{named.name} is not to train on: it is {'held out' if named.split else 'evidence'}")
        if own is not None and named.columns != own.columns:
            columns, wanted = (", ".join(each.columns) for each in (named, own))
            raise UserError(f"{named.name} has the columns {columns}; {self.name} learns from {wanted}")

    @property
    def reading(self) -> str:
        """What reads which records, as a key."""
        return f"{self.found.name} {self.named_records}" if self.named_records else self.found.name

    @property
    def needs_verifier(self) -> bool:
        return bool(self._part("NEEDS_VERIFIER", default=False))

    @property
    def uses_domain(self) -> bool:
        """Whether the domain's code may change what is trained. Ready-made ones without rewards ignore it."""
        ready_made = self.found.name.startswith(f"{twinloop.training.methods.__name__}.")
        return self.needs_verifier or not ready_made or bool(self._part("USES_DOMAIN", default=False))

    @property
    def kind(self) -> Kind:
        """What its network gives."""
        kind: Kind = self._part("HEAD", default="text")
        return kind

    @property
    def has_head(self) -> bool:
        """Whether its network gives a score or labels, and not text."""
        return self.kind != "text"

    @property
    def shown(self) -> Sequence[str]:
        """Names of metrics to show while it trains, besides loss and speed."""
        names: Sequence[str] = self._part("SHOWN", default=())
        return names

    def conversations(self, record: forms.Record) -> list[list[forms.Message]]:
        """Chats of a record that end with an answer which is trained."""
        found: list[list[forms.Message]] = self._part("conversations", forms.conversations)(record)
        return found

    def lengths(self, record: forms.Record, tokenizer: ChatTokenizer) -> forms.Lengths | None:
        """How many tokens a record takes; None where any number will do."""
        found: forms.Lengths | None = self._part("lengths", forms.lengths)(record, tokenizer)
        return found

    def check(self, settings: TrainSettings, tokenizer: ChatTokenizer, domain: Domain) -> None:
        """Raises UserError for what `build` would refuse whatever the records are, before any stage is trained."""
        if check := self._part("check", default=None):
            check(settings, tokenizer, domain)

    def build(
        self,
        records: Iterable[dict[str, Any]],
        model: Decoder,
        tokenizer: ChatTokenizer,
        settings: TrainSettings,
        runtime: Runtime,
        domain: Domain,
    ) -> tuple[Objective, Batches]:
        """What is optimised, and on which batches. model: what is trained; as it is now, the reference."""
        built: tuple[Objective, Batches] = self.found.module.build(records, model, tokenizer, settings, runtime, domain)
        return built

    def _part(self, name: str, default: Any) -> Any:
        return getattr(self.found.module, name, default)


def ready_made() -> list[str]:
    """The names of the methods that come with Twinloop."""
    return modules_in(twinloop.training.methods)


def load_method(name: str, project: Path) -> Method:
    """The method of this name: a ready-made one, an importable module, or a file of the project.

    Raises UserError where there is none, where its code fails, or where it lacks a part.
    """
    found = find_module(name, project, kind="method", package=twinloop.training.methods, ready_made=ready_made())
    if missing := [part for part in PARTS if not hasattr(found.module, part)]:
        raise UserError(f"method: {name} defines no {missing[0]}; a method's module has {', '.join(PARTS)}")
    settings = found.module.Settings
    if not (isinstance(settings, type) and issubclass(settings, TrainSettings)):
        raise UserError(f"method: {name}: Settings must derive from a class of twinloop.training.settings")
    return Method(found)
