"""How long a decode step takes, how much of it is ours, what it copies, and what the engine gains over plain PyTorch.

    python -m benchmarks.decode [recipes/returns.yaml] [--device cuda]

The recipe's network, untrained. Rollouts have the shape that verifier RL gives them, and those of both samplers are
measured in turns, in one process, on the recipe's threads.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import onnxruntime as ort

from benchmarks.table import Row, percent, promise, show
from benchmarks.torch_sampler import TorchSampler
from benchmarks.workload import Workload, arguments, open_workload
from twinloop.models.config import Precision
from twinloop.models.directory import save_model
from twinloop.models.exported import export_model
from twinloop.serving.engine import Engine
from twinloop.serving.engine.sampling import SamplingParams, choose
from twinloop.training.sampler import BoundSampler
from twinloop.training.weights import get_weights

SLOTS = (1, 8, 32)
STEPS = 200
ROUNDS = 7
FASTER_THAN_TORCH = 2.0
"""What the project promises on CPU."""


def main() -> None:
    options = arguments(__doc__).parse_args()
    with open_workload(options) as workload:
        show(measure(workload))


def measure(workload: Workload) -> Iterator[Row]:
    for precision in workload.recipe.export.on(workload.runtime.device):
        yield from step_rows(workload, precision)
    yield from rollout_rows(workload)


# --- a decode step -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a whole step; outside: the share of its median that is not spent in ONNX Runtime."""

    median_s: float
    p95_s: float
    outside: float


def step_rows(workload: Workload, precision: Precision) -> list[Row]:
    """Time of a step by slots, and what the widest one copies."""
    rows = []
    with TemporaryDirectory() as folder:
        model, exported = Path(folder) / "model", Path(folder) / "exported"
        save_model(model, workload.config, get_weights(workload.new_network()), workload.tokenizer)
        export_model(model, exported, precision=precision, max_length=workload.config.max_position_embeddings)
        for slots in SLOTS:
            times = time_steps(exported, slots, workload.context)
            setting = f"{precision}, {slots} x {workload.context} tokens"
            rows += [
                Row("decode step", setting, f"{1000 * times.median_s:.3f}", "ms"),
                Row("· 95th percentile", setting, f"{1000 * times.p95_s:.3f}", "ms"),
                Row("· outside ONNX Runtime", setting, percent(times.outside), "% of the step"),
            ]
        return rows + cache_rows(exported, precision, slots, workload.context)


def time_steps(exported: Path, slots: int, context: int, *, threads: int | None = None) -> StepTimes:
    """Steps of all slots, each drawn and fed back, as `generate` does; the run inside is timed separately."""
    engine = Engine.load(exported, slots=slots, threads=threads)
    _fill(engine, context)
    inside: list[float] = []
    run = ort.InferenceSession.run_with_iobinding

    def timed_run(session: ort.InferenceSession, binding: ort.IOBinding) -> None:
        began = time.perf_counter()
        run(session, binding)
        inside.append(time.perf_counter() - began)

    tokens, active = np.zeros(slots, np.int64), np.ones(slots, bool)
    temperature = np.ones(slots, np.float32)
    steps = min(STEPS, engine.max_length - context)
    draws = np.random.default_rng(0).random((steps, slots))
    whole = []
    with patch.object(ort.InferenceSession, "run_with_iobinding", timed_run):
        for step in range(steps):
            began = time.perf_counter()
            logits = engine.decode(0, tokens, active)
            tokens, _ = choose(logits, temperature, draws[step])
            whole.append(time.perf_counter() - began)
    median_s = statistics.median(whole)
    return StepTimes(median_s, float(np.quantile(whole, 0.95)), 1 - statistics.median(inside) / median_s)


def _fill(engine: Engine, context: int) -> None:
    """A sequence in every slot."""
    prompt = np.random.default_rng(0).integers(0, engine.config.vocab_size, context)
    for slot in range(engine.slots):
        engine.prefill(slot, prompt)


# --- what a step copies ------------------------------------------------------------------------------------------


@dataclass
class Bound:
    """What one binding was workload for the cache: by buffer, the address and the shape of past and of present."""

    binding: ort.IOBinding
    past: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    present: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)

    def written_at(self) -> list[int]:
        """Where ONNX Runtime's own outputs lie after a run; the logits come first."""
        return [value.data_ptr() for value in self.binding.get_outputs()[1:]]


@contextmanager
def recorded_bindings() -> Iterator[dict[int, Bound]]:
    """Every binding of a cache that is made inside, as ONNX Runtime receives it: by whom does not matter."""
    found: dict[int, Bound] = {}
    bind_input, bind_output = ort.IOBinding.bind_input, ort.IOBinding.bind_output

    def record(side: str, bind: Callable[..., None]) -> Callable[..., None]:
        prefix = {"past": "past_key_values.", "present": "present."}[side]

        def bind_recorded(
            binding: ort.IOBinding, name: str, device: str, index: int, kind: object, shape: tuple[int, ...], at: int
        ) -> None:
            if name.startswith(prefix):
                bound = found.setdefault(id(binding), Bound(binding))
                getattr(bound, side)[name.removeprefix(prefix)] = at, tuple(shape)
            bind(binding, name, device, index, kind, shape, at)

        return bind_recorded

    with (
        patch.object(ort.IOBinding, "bind_input", record("past", bind_input)),
        patch.object(ort.IOBinding, "bind_output", record("present", bind_output)),
    ):
        yield found


@dataclass(frozen=True)
class CacheStep:
    """What one decode step did to the cache. copied: bytes of buffers that were not written where they were read.

    appended: buffers in which exactly the new token's place changed, behind the very address that was bound as past;
    None on a device whose memory cannot be read by address from here.
    """

    buffers: int
    copied: int
    appended: int | None


def watch_cache(exported: Path, slots: int, context: int) -> CacheStep:
    """One decode step of all slots, observed by the addresses that were bound and by the bytes behind them."""
    engine = Engine.load(exported, slots=slots)
    _fill(engine, context)
    with recorded_bindings() as found:
        engine.decode(0, np.zeros(slots, np.int64), np.ones(slots, bool))  # binds, and appends position `context`
    (step,) = found.values()
    itemsize = 4 if engine.precision in ("fp32", "int8", "int4") else 2
    copied = sum(
        int(np.prod(shape)) * itemsize
        for (name, (at, shape)), written in zip(step.past.items(), step.written_at(), strict=True)
        if not at == step.present[name][0] == written
    )
    if engine.device != "cpu":
        return CacheStep(len(step.past), copied, None)
    before = [_read(at, shape) for at, shape in step.past.values()]
    engine.decode(0, np.zeros(slots, np.int64), np.ones(slots, bool))
    after = [_read(at, shape) for at, shape in step.past.values()]
    return CacheStep(
        len(before), copied, sum(_appended(*pair, context + 1) for pair in zip(before, after, strict=True))
    )


def _read(address: int, shape: tuple[int, ...]) -> np.ndarray:
    """A copy of the float32 cache [C, K, M, E] that lies there."""
    return np.frombuffer(ctypes.string_at(address, int(np.prod(shape)) * 4), np.float32).reshape(shape)


def _appended(before: np.ndarray, after: np.ndarray, position: int) -> bool:
    """Whether every slot and head got a new entry at this position, and nothing else changed."""
    changed_CKM = (before != after).any(axis=-1)
    return bool(changed_CKM[:, :, position].all()) and int(changed_CKM.sum()) == changed_CKM[:, :, position].size


def cache_rows(exported: Path, precision: Precision, slots: int, context: int) -> list[Row]:
    seen = watch_cache(exported, slots, context)
    setting = f"{precision}, {slots} slots, past and present of {seen.buffers} buffers by address"
    rows = [Row("KV cache copied by a step", setting, str(seen.copied), "bytes", promise("0", seen.copied == 0))]
    if seen.appended is not None:
        whole = seen.appended == seen.buffers
        share = f"{seen.appended} of {seen.buffers}"
        setting = "behind the address of past, only the new token's place changed"
        rows.append(Row("· seen in memory", setting, share, "buffers", promise("all", whole)))
    return rows


# --- rollouts ----------------------------------------------------------------------------------------------------


def rollout_rows(workload: Workload) -> list[Row]:
    """The sampling of RL: the groups of one step, at its temperature, on its sampler."""
    settings, network = workload.rollouts, workload.new_network().requires_grad_(False).to(workload.runtime.device)
    prompts = workload.prompts[: settings.prompts_per_step]
    longest = max(map(len, prompts)) + settings.max_new_tokens
    threads = workload.runtime.threads
    engine = BoundSampler(network, max_length=longest, prompts=len(prompts), group=settings.group_size, threads=threads)
    torch_sampler = TorchSampler(network)
    sampled = SamplingParams(
        max_tokens=settings.max_new_tokens, temperature=settings.temperature, stop=workload.tokenizer.stop_ids
    )
    greedy = replace(sampled, temperature=0.0)

    def by_torch(seed: int) -> Answers:
        return torch_sampler.generate(prompts, replace(sampled, seed=seed), group=settings.group_size)

    def by_engine(seed: int) -> Answers:
        done = engine.generate(prompts, replace(sampled, seed=seed), group=settings.group_size)
        return [completion.tokens for completion in done]

    on_cpu = workload.runtime.device == "cpu"
    engine_greedy = [completion.tokens for completion in engine.generate(prompts, greedy, group=1)]
    same = agreement(torch_sampler.generate(prompts, greedy, group=1), engine_greedy)
    theirs, ours = rates([by_torch, by_engine])
    setting = f"{len(prompts)} prompts of {settings.group_size} answers, {threads} threads each"
    wall = [one.wall / other.wall for one, other in zip(ours, theirs, strict=True)]
    cpu = [one.cpu / other.cpu for one, other in zip(ours, theirs, strict=True)]
    return [
        Row(
            "rollouts, PyTorch with a KV cache",
            setting,
            f"{statistics.median(r.wall for r in theirs):,.0f}",
            "tokens/s",
        ),
        Row("rollouts, bound engine", setting, f"{statistics.median(r.wall for r in ours):,.0f}", "tokens/s"),
        ratio_row("· ratio", wall),
        # What neighbours on the cores take from both, unevenly, is not in it.
        *([ratio_row("· ratio, by CPU time", cpu)] if on_cpu else []),
        Row("· greedy tokens alike", f"{len(prompts)} answers", percent(same), "%"),
    ]


def ratio_row(what: str, ratios: list[float]) -> Row:
    ratio, spread = statistics.median(ratios), f"range of {len(ratios)}: {min(ratios):.1f} to {max(ratios):.1f}"
    return Row(what, spread, f"{ratio:.1f}", "times PyTorch", promise("at least 2", ratio >= FASTER_THAN_TORCH))


Answers = list[list[int]]


@dataclass(frozen=True)
class Rate:
    """Tokens a second of wall time, and of CPU time of the whole process."""

    wall: float
    cpu: float


def rates(samplers: list[Callable[[int], Answers]]) -> list[list[Rate]]:
    """Of each sampler in each round, in turns, after a round that warms up."""
    found: list[list[Rate]] = [[] for _ in samplers]
    for turn in range(ROUNDS + 1):
        for sampler, speeds in zip(samplers, found, strict=True):
            began, worked = time.perf_counter(), time.process_time()
            tokens = sum(map(len, sampler(turn)))
            wall, cpu = time.perf_counter() - began, time.process_time() - worked
            if turn:
                speeds.append(Rate(tokens / wall, tokens / cpu))
    return found


def agreement(these: Answers, those: Answers) -> float:
    """Share of tokens that are the same at the same place."""
    pairs = list(zip(these, those, strict=True))
    same = sum(a == b for one, other in pairs for a, b in zip(one, other, strict=False))
    return same / sum(max(len(one), len(other)) for one, other in pairs)


if __name__ == "__main__":
    main()
