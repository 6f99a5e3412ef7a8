"""Which of two answers to a prompt people preferred, kept in a file that is only appended to.

A judgement is about texts: the prompt and two answers. So it holds for every version that answers so, and comparing
three versions asks nothing again that was asked about two of them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from twinloop.common.errors import UserError
from twinloop.common.files import fsync, write_all

Choice = Literal["first", "second", "tie"]


class Subject(NamedTuple):
    """What is judged, by sha256: a prompt, and two answers, the smaller digest first."""

    prompt: str
    first: str
    second: str

    @classmethod
    def of(cls, prompt: Sequence[Mapping[str, str]], one: str, other: str) -> Subject:
        first, second = sorted((digest(one), digest(other)))
        return cls(digest(json.dumps([dict(message) for message in prompt], sort_keys=True)), first, second)


class Judgement(BaseModel):
    """One line. chosen: None takes back what was judged of it before."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    first: str
    second: str
    chosen: Choice | None
    who: str
    when: str

    @property
    def subject(self) -> Subject:
        return Subject(self.prompt, self.first, self.second)


class Judgements:
    """The file while it is open, and what it comes to: the last judgement of each subject."""

    def __init__(self, path: Path, descriptor: int, who: str):
        self._path = path
        self._descriptor = descriptor
        self._who = who
        self._chosen: dict[Subject, Choice] = {}
        for judgement in self._read():
            self._keep(judgement)

    @classmethod
    @contextmanager
    def opened(cls, path: Path, who: str) -> Iterator[Judgements]:
        """Raises UserError where another process has it open, and for a line that is no judgement."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{path}: somebody judges these answers now; end that `twinloop compare` first"
                ) from None
            fsync(path.parent)
            yield cls(path, descriptor, who)
        finally:
            os.close(descriptor)

    def chosen(self, subject: Subject) -> Choice | None:
        return self._chosen.get(subject)

    def add(self, subject: Subject, chosen: Choice | None) -> None:
        """On disk when this returns. Raises OSError, and then it does not count."""
        when = datetime.now(UTC).isoformat(timespec="seconds")
        judgement = Judgement(**subject._asdict(), chosen=chosen, who=self._who, when=when)
        size = os.fstat(self._descriptor).st_size
        try:
            write_all(self._descriptor, judgement.model_dump_json().encode() + b"\n")
            os.fsync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise
        self._keep(judgement)

    def _keep(self, judgement: Judgement) -> None:
        self._chosen.pop(judgement.subject, None)
        if judgement.chosen is not None:
            self._chosen[judgement.subject] = judgement.chosen

    def _read(self) -> Iterator[Judgement]:
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # a process died while it wrote: that judgement was not reported as kept
            os.ftruncate(self._descriptor, whole)
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                yield Judgement.model_validate_json(line)
            except ValidationError:
                raise UserError(f"{self._path}:{number}: no judgement; restore the file, or remove that line") from None


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
