"""Which files of a data folder hold the rows of which record type, and which files nothing reads.

The rows of a record type, such as chat, are in

    chat.jsonl, chat.parquet, chat.jsonl.gz or chat.jsonl.zst
    further files: the name, then a number, such as chat_2.jsonl, chat_batch2.jsonl or chat-00001-of-00002.parquet
    the folder chat/, whatever the names of its files

No other suffix makes a file a part: corpus_test.jsonl may be what somebody holds out. For the same
reason a file of chat/ whose name says that it is held out is not trained on. What is not read is reported.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from twinloop.common.errors import UserError
from twinloop.domains.record_types import RecordType

ENDINGS = (".jsonl", ".parquet", ".jsonl.gz", ".jsonl.zst")
UNREAD = f"not {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
PART = re.compile(r"[-_.](?:(?:part|batch|shard|chunk)[-_.]?)?\d+(?:[-_.](?:of[-_.])?\d+)*")
"""What may follow the name of a record type in the name of a further file."""
OF_TOTAL = re.compile(r"(.*?)(\d+)[-_.]of[-_.](\d+)")
HELD_OUT = re.compile(r"(?:^|[^a-z])(?:test|valid|validation|val|eval|dev|held[-_]?out|hold[-_]?out)(?:[^a-z]|$)")


@dataclass(frozen=True)
class DataFiles:
    """of: the files of each record type that has any, in the order in which they are read. ignored: why nothing reads a
    file, by its path in the folder."""

    of: Mapping[str, tuple[Path, ...]]
    ignored: Mapping[str, str]


def find_data(folder: Path, records: Mapping[str, RecordType]) -> DataFiles:
    """The files of `folder`, by record type. Raises UserError where one is there in two formats, and where one of
    several numbered parts is missing."""
    found: defaultdict[str, list[Path]] = defaultdict(list)
    ignored: dict[str, str] = {}
    for path in _entries(folder):
        if path.is_dir() and path.name in records:
            for part in _entries(path):
                if why := _not_a_part(part, records[path.name]):
                    ignored[f"{path.name}/{_printable(part.name)}"] = why
                else:
                    found[path.name].append(part)
        elif path.is_dir():
            ignored[f"{_printable(path.name)}/"] = _unknown(path.name, records)
        elif (stem := stem_of(path)) is None:
            ignored[_printable(path.name)] = UNREAD
        elif name := _record_of(stem, records):
            found[name].append(path)
        else:
            ignored[_printable(path.name)] = _unknown(stem, records)
    for paths in found.values():
        _refuse_two_formats(paths)
        _refuse_missing_parts(paths)
    ordered = {name: tuple(sorted(found[name], key=_order)) for name in records if name in found}
    return DataFiles(ordered, ignored)


def stem_of(path: Path) -> str | None:
    """The name of a file without its ending; None where it has none of the endings that are read."""
    return next((path.name.removesuffix(ending) for ending in ENDINGS if path.name.endswith(ending)), None)


def _entries(folder: Path) -> list[Path]:
    """The visible files and folders of a folder, by name; none where there is no folder."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def _record_of(stem: str, names: Collection[str]) -> str | None:
    """The record type of a file: of several whose names it begins with, the longest."""
    fitting = [name for name in names if stem == name or (stem.startswith(name) and PART.fullmatch(stem[len(name) :]))]
    return max(fitting, key=len, default=None)


def _not_a_part(path: Path, record: RecordType) -> str | None:
    """Why a file of a record type's folder is not read; None where it is."""
    if path.is_dir():
        return "a folder in the folder of a record type"
    if (stem := stem_of(path)) is None:
        return UNREAD
    if not path.name.isprintable():
        return "its name is not plain text"
    held_out = record.split == "held_out" or HELD_OUT.search(record.name)
    if not held_out and HELD_OUT.search(stem.lower()):
        return f"its name says that it is held out, and {record.name} is not"
    return None


def _printable(name: str) -> str:
    """The name for a message; bytes of it that are no text, and line ends, as question marks."""
    return "".join(character if character.isprintable() else "?" for character in name)


def _unknown(stem: str, names: Collection[str]) -> str:
    begun = [name for name in names if stem.startswith(name)]
    near = max(begun, key=len) if begun else next(iter(difflib.get_close_matches(stem, names, n=1)), None)
    return "no record type has this name" + (f"; a further file of {near} is {near}_2.jsonl" if near else "")


def _order(path: Path) -> tuple[int, tuple[tuple[int, str], ...]]:
    """Those beside the folder first; numbers by their value, so that part 10 comes after part 9."""
    pieces = re.split(r"(\d+)", path.name)
    inside = len(path.parts)
    return inside, tuple((int(piece), "") if index % 2 else (0, piece) for index, piece in enumerate(pieces))


def _refuse_two_formats(paths: Sequence[Path]) -> None:
    seen: dict[tuple[Path, str | None], Path] = {}
    for path in sorted(paths, key=lambda path: [path.name.endswith(ending) for ending in ENDINGS], reverse=True):
        first = seen.setdefault((path.parent, stem_of(path)), path)
        if first is not path:
            raise UserError(f"{path.parent}: both {first.name} and {path.name}; remove one of the two")


def _refuse_missing_parts(paths: Sequence[Path]) -> None:
    """Of `train-00000-of-00003` there are three: a copy that was cut short is an error."""
    numbers: defaultdict[tuple[Path, str, str], set[int]] = defaultdict(set)
    for path in paths:
        if numbered := OF_TOTAL.fullmatch(stem_of(path) or ""):
            begin, number, total = numbered.groups()
            numbers[path.parent, begin, total].add(int(number))
    for (folder, begin, total), there in numbers.items():
        if len(there) < int(total):
            raise UserError(
                f"{folder}: {len(there)} of {int(total)} files {begin}…-of-{total}; copy the missing ones there, or "
                "rename those that are complete"
            )
