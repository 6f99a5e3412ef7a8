"""LoRA adapters (Hu et al., 2021) in PEFT's form: adapter_config.json and adapter_model.safetensors, without torch.

An adapter adds scale * B @ A to some of a network's matrices.

Left out, and refused by name: what PEFT keeps beside A and B (DoRA's magnitudes, biases, whole modules), what changes
the base too (PiSSA and its kin), and adapters of embeddings.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (numpy knows bfloat16 once it is imported)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from twinloop.common.errors import UserError
from twinloop.models.adapter_form import LORA_A, LORA_B, adapter_scale, linear_layers
from twinloop.models.config import DecoderConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BASE = "twinloop_base"
"""What ADAPTER_WEIGHTS says of the base in its metadata, which `peft` does not look at: as `base_digest`."""
_FAITHFUL_STARTS = (True, "gaussian", "eva", "orthogonal", "mica")
"""PEFT's initialisations that leave the base as it is."""
_NEUTRAL = {
    "use_dora": "DoRA",
    "bias": "trained biases",
    "lora_bias": "a bias of B",
    "modules_to_save": "whole modules trained beside it",
    "fan_in_fan_out": "transposed weights",
    "layer_replication": "repeated layers",
    "trainable_token_indices": "trained embedding rows",
    "target_parameters": "parameters that are no linear layer",
    "alora_invocation_tokens": "activation by tokens",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
"""Fields of adapter_config.json that, once set, ask for more than A and B; and what for."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """factors: A [rank, in] and B [out, rank], float32, by the linear layer's name. alpha: of each that has not its own
    in `alphas`."""

    factors: Mapping[str, tuple[np.ndarray, np.ndarray]]
    alpha: float
    rank_stabilised: bool = False
    alphas: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        factors: Mapping[str, tuple[np.ndarray, np.ndarray]],
        alphas: Mapping[str, float],
        *,
        rank_stabilised: bool = False,
    ) -> Adapter:
        """alphas: of every layer."""
        alpha = _most_common(alphas)
        own = {name: each for name, each in alphas.items() if each != alpha}
        return cls(factors, alpha, rank_stabilised, own)

    @property
    def ranks(self) -> dict[str, int]:
        """By the linear layer's name."""
        return {name: len(a) for name, (a, _) in self.factors.items()}

    @property
    def max_rank(self) -> int:
        return max(self.ranks.values())

    def scale(self, name: str) -> float:
        rank = len(self.factors[name][0])
        return adapter_scale(rank, self.alphas.get(name, self.alpha), rank_stabilised=self.rank_stabilised)

    def merge(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A network's tensors with the adapter added, in float32 where it adds to one."""
        merged = dict(tensors)
        for name, (a, b) in self.factors.items():
            product = np.float32(self.scale(name)) * (b @ a)
            merged[f"{name}.weight"] = np.asarray(tensors[f"{name}.weight"], np.float32) + product
        return merged

    def then(self, other: Adapter) -> Adapter:
        """The one adapter that adds what both add: ranks add up, scales go into B."""
        factors: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name in dict.fromkeys([*self.factors, *other.factors]):
            parts = [(*each.factors[name], each.scale(name)) for each in (self, other) if name in each.factors]
            a = np.concatenate([a for a, _, _ in parts])
            b = np.concatenate([np.float32(scale) * b for _, b, scale in parts], axis=1)
            factors[name] = a, b
        return Adapter.of(factors, {name: len(a) for name, (a, _) in factors.items()})


def base_digest(tensors: Mapping[str, np.ndarray], config: DecoderConfig) -> str:
    """Of the matrices that adapters add to: the types that they are stored in, and the sha256 of their values."""
    digest, types = hashlib.sha256(), set()
    for name in sorted(linear_layers(config)):
        array = tensors[f"{name}.weight"]
        types.add(array.dtype.name)
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return f"{'+'.join(sorted(types))} {digest.hexdigest()}"


def refuse_another_base(directory: Path, tensors: Mapping[str, np.ndarray], config: DecoderConfig) -> None:
    """Raise UserError where Twinloop wrote the adapter for a network of other weights.

    Those in other types may be the same, rounded. `peft` writes only the name of a base, which may have another here.
    """
    with safe_open(directory / ADAPTER_WEIGHTS, "np") as file:
        recorded = (file.metadata() or {}).get(_BASE)
    if recorded is None:
        return
    found = base_digest(tensors, config)
    if found != recorded and found.split()[0] == recorded.split()[0]:
        raise UserError(
            f"{directory}: the adapter was trained on another base, of the same shapes and other weights; name that one"
        )


def save_adapter(directory: Path, adapter: Adapter, *, base: str, digest: str | None = None) -> None:
    """Write an adapter as `peft` does. base: where its base is, in what PEFT calls `base_model_name_or_path`.
    digest: `base_digest`, where it is known."""
    directory.mkdir(parents=True, exist_ok=True)
    ranks = adapter.ranks
    rank = _most_common(ranks)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": adapter.alpha,
        "use_rslora": adapter.rank_stabilised,
        "target_modules": sorted({name.rpartition(".")[2] for name in ranks}),
        "rank_pattern": {re.escape(name): each for name, each in ranks.items() if each != rank},
        "alpha_pattern": {re.escape(name): alpha for name, alpha in adapter.alphas.items()},
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (directory / ADAPTER_CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    tensors: dict[str, np.ndarray] = {}
    for name, (a, b) in adapter.factors.items():
        tensors |= {f"{_PREFIX}{name}.{LORA_A}": a, f"{_PREFIX}{name}.{LORA_B}": b}
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    known = {"format": "pt"} | ({_BASE: digest} if digest else {})
    save_file(contiguous, directory / ADAPTER_WEIGHTS, metadata=known)


def read_adapter(directory: Path, config: DecoderConfig) -> Adapter:
    """An adapter that `peft` or Twinloop wrote. config: of the base.

    Raises UserError, one line, for what is missing, corrupt or pickled, for an adapter that is more than A and B, and
    for one of another base.
    """
    fields = _read_config(directory)
    _refuse_more_than_lora(directory / ADAPTER_CONFIG, fields)
    factors = _factors(directory, _read_weights(directory), linear_layers(config))
    ranks = {name: _pattern(directory, fields, "rank_pattern", name, "r") for name in factors}
    for name, (a, _) in factors.items():
        if len(a) != ranks[name]:
            raise UserError(
                f"{directory}: {name} has rank {len(a)}, {ADAPTER_CONFIG} says {ranks[name]:g}; save the adapter again"
            )
    alphas = {name: _pattern(directory, fields, "alpha_pattern", name, "lora_alpha") for name in factors}
    return Adapter.of(factors, alphas, rank_stabilised=bool(fields.get("use_rslora")))


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / ADAPTER_CONFIG
    if not path.is_file():
        raise UserError(f"{path}: no such file; an adapter holds {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); save the adapter again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: it holds a {type(fields).__name__}, not an object with the adapter's settings")
    return fields


def _refuse_more_than_lora(path: Path, fields: Mapping[str, Any]) -> None:
    if fields.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {fields.get('peft_type')!r} is not supported; only LORA is")
    for name, what in _NEUTRAL.items():
        if fields.get(name) not in (None, False, "none", [], {}):
            raise UserError(f"{path}: {name} {fields[name]!r} ({what}) is not supported; merge the adapter with `peft`")
    start = fields.get("init_lora_weights", True)
    if start not in (*_FAITHFUL_STARTS, False):
        raise UserError(
            f"{path}: init_lora_weights {start!r} changed the base too and is not supported; convert it with `peft`"
        )


def _read_weights(directory: Path) -> dict[str, np.ndarray]:
    path = directory / ADAPTER_WEIGHTS
    if not path.is_file():
        pickled = " (adapter_model.bin is pickled and not read)" if (directory / "adapter_model.bin").exists() else ""
        raise UserError(f"{path}: no such file{pickled}; save the adapter with safetensors")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, AttributeError, KeyError) as error:
        raise UserError(f"{path}: corrupt weights ({error}); save the adapter again") from None
    return {name.removeprefix(_PREFIX): array.astype(np.float32) for name, array in tensors.items()}


def _factors(
    directory: Path, tensors: Mapping[str, np.ndarray], layers: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and B by linear layer. Raises UserError unless the tensors are pairs that fit the base's layers."""
    if others := sorted(name for name in tensors if "embed_tokens" in name or name.startswith("lm_head")):
        raise UserError(
            f"{directory}: {others[0]}: changed embeddings and heads are not supported, only linear layers inside the "
            "network's layers are; merge the adapter with `peft`"
        )
    names = {name.removesuffix(f".{LORA_A}").removesuffix(f".{LORA_B}") for name in tensors}
    if unknown := sorted(name for name in names if name not in layers):
        raise UserError(f"{directory}: {unknown[0]} is no linear layer of the base; the adapter is of another one")
    if not names:
        raise UserError(f"{directory / ADAPTER_WEIGHTS}: it holds no tensors; save the adapter again")
    factors: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in (name for name in layers if name in names):
        a, b = tensors.get(f"{name}.{LORA_A}"), tensors.get(f"{name}.{LORA_B}")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.size:
            shapes = [None if each is None else each.shape for each in (a, b)]
            raise UserError(f"{directory}: {name}: A and B of shapes {shapes} are no pair; save the adapter again")
        if (b.shape[0], a.shape[1]) != layers[name]:
            raise UserError(
                f"{directory}: {name} is {b.shape[0]} x {a.shape[1]}, the base's is "
                f"{layers[name][0]} x {layers[name][1]}; the adapter is of another base"
            )
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise UserError(f"{directory}: {name}: the adapter holds values that are not finite; train it again")
        factors[name] = a, b
    return factors


def _pattern(directory: Path, fields: Mapping[str, Any], patterns: str, name: str, default: str) -> float:
    """The value of the first pattern that ends the layer's name, as PEFT 0.21 finds it, or the adapter's own."""
    known = fields.get(patterns) or {}
    if not isinstance(known, Mapping):
        raise UserError(f"{directory / ADAPTER_CONFIG}: {patterns} is {known!r}, not an object with numbers by layer")
    for pattern, value in known.items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error:
            raise UserError(f"{directory / ADAPTER_CONFIG}: {patterns}: {pattern!r} is not a pattern") from None
        if matches:
            found, where = value, f"{patterns}.{pattern}"
            break
    else:
        found, where = fields.get(default), default
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 < found < math.inf:
        raise UserError(f"{directory / ADAPTER_CONFIG}: {where} is {found!r}; it must be a number more than 0")
    return found


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]
