"""Prefill and decoding of the engines alone: each in a process of its own, round after round."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

from benchmarks.peers import Contestant, run
from benchmarks.serving.clock import Clock
from benchmarks.serving.goals import CTRANSLATE2, GENAI, LLAMA, OURS, Comparison, Goal
from benchmarks.serving.models import Models
from benchmarks.table import Row
from twinloop.common.errors import UserError
from twinloop.models.config import Precision

HERE = Path(__file__).parent
CLASSES: tuple[Precision, ...] = ("int8", "int4", "fp32")


@dataclass(frozen=True)
class Lengths:
    """prefill: tokens of the prompts whose reading is timed. decode: how many sequences are decoded together, and the
    tokens before each, for so many steps."""

    prefill: tuple[int, ...] = (128, 512)
    decode: tuple[tuple[int, int], ...] = ((1, 128), (1, 1024), (8, 128), (16, 128))
    steps: int = 32


QUICK = Lengths(prefill=(16,), decode=((1, 16), (2, 16)), steps=4)


def prefill_key(length: int) -> str:
    return f"prefill {length}"


def decode_key(sequences: int, context: int) -> str:
    return f"decode {sequences} x {context}"


def goals(key: str, precision: Precision) -> list[Goal]:
    """What is promised of a measure, for this class of weights."""
    what, *rest = key.split()
    if precision == "fp32":
        return []
    if what == "prefill":
        return [Goal(1.4, LLAMA), *([Goal(1.0, CTRANSLATE2)] if precision == "int8" else [])]
    if rest[0] == "1":
        return [Goal(1.1 if precision == "int8" else 1.0)]
    times = {"8": 1.75, "16": 1.5}.get(rest[0]) if precision == "int8" else None
    return [Goal(times)] if times else []


def on_cores(command: Sequence[object], cores: Sequence[int]) -> list[str]:
    """The command, held to these cores where the machine can do that."""
    held = ["taskset", "-c", ",".join(map(str, cores))] if shutil.which("taskset") else []
    return [*held, *map(str, command)]


@dataclass(frozen=True)
class _Form:
    """A contestant's model: made when it is asked for. settings: of its script, beside those that all get."""

    name: str
    peer: str
    script: Sequence[object]
    model: Callable[[], Path]
    settings: dict[str, Any]


def _forms(precision: Precision, models: Models) -> list[_Form]:
    ours = [sys.executable, "-m", "benchmarks.serving.engine_ours"]
    llama = [sys.executable, "-m", "benchmarks.serving.engine_llama"]
    genai = [models.peers.python, HERE / "engine_genai.py"]
    ctranslate2 = [models.peers.python, HERE / "engine_ctranslate2.py"]
    program = {"program": str(models.peers.program("llama-batched-bench"))}
    types = {"int8": ("q8_0",), "int4": ("q4_0",), "fp32": ("f32", "f16")}[precision]
    compute = {"int8": "int8", "fp32": "float32"}.get(precision)
    found = [
        _Form(f"{OURS} {precision}", OURS, ours, lambda: models.exported(precision), {}),
        *[_Form(f"{LLAMA} {type.upper()}", LLAMA, llama, lambda type=type: models.gguf(type), program)  # type: ignore[misc]
          for type in types],
        _Form(f"{GENAI} {precision}", GENAI, genai, lambda: models.genai(precision), {}),
    ]  # fmt: skip
    if compute:
        settings = {"compute_type": compute}
        found.append(
            _Form(f"{CTRANSLATE2} {compute}", CTRANSLATE2, ctranslate2, lambda: models.ctranslate2(compute), settings)
        )
    return found


def engine_rows(
    precision: Precision, models: Models, *, cores: Sequence[int], rounds: int, lengths: Lengths
) -> Iterator[Row]:
    """All measures of one class of weights. A contestant that fails takes no further part, and is shown with its last
    words."""
    setting = f"{precision}, {len(cores)} core{'s' * (len(cores) > 1)}"
    clock, missing = Clock.on(len(cores)), dict[str, str]()
    contestants: list[Contestant] = []
    for form in _forms(precision, models):
        try:
            if form.peer in models.peers.missing:
                raise UserError(models.peers.missing[form.peer])
            job = _job(form, setting, lengths, len(cores))
            threads = {"OMP_NUM_THREADS": str(len(cores))}
            contestants.append(Contestant(form.name, on_cores(form.script, cores), threads, job))
        except UserError as error:
            missing[form.name] = str(error)
    results: dict[str, list[dict[str, float]]] = {each.name: [] for each in contestants}
    for number in range(rounds):
        for each in [one for one in contestants if one.name not in missing]:
            print(f"{setting}: {each.name}, round {number + 1}", file=sys.stderr, flush=True)
            try:
                results[each.name].append(run(each))
            except UserError as error:
                missing[each.name] = str(error)
    for key in [*map(prefill_key, lengths.prefill), *starmap(decode_key, lengths.decode)]:
        shown = Comparison(key, setting, clock.rate, goals(key, precision), missing=missing)
        for name, found in results.items():
            for result in found if name not in missing else ():
                shown.add(name, result[key])
        yield from shown.rows()


def _job(form: _Form, setting: str, lengths: Lengths, threads: int) -> dict[str, Any]:
    """What every contestant's script gets, as `run` hands it over."""
    return {
        "method": setting,
        "model": str(form.model()),
        "threads": threads,
        "by_cpu": Clock.on(threads).by_cpu,
        **asdict(lengths),
        **form.settings,
    }
