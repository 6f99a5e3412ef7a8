"""Parts of a config.json that several families have: activation, rotary positions, windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from twinloop.common.errors import UserError
from twinloop.models.config import DecoderConfig
from twinloop.models.rope import Rope, RopeScaling

Fields = Mapping[str, Any]

ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
"""Our name to Hugging Face's."""

_SLIDING, _FULL = "sliding_attention", "full_attention"


def read_activation(fields: Fields) -> str:
    name = "hidden_activation" if "hidden_activation" in fields else "hidden_act"
    given = fields.get(name, "silu")
    for ours, theirs in ACTIVATIONS.items():
        if given == theirs:
            return ours
    raise UserError(
        f"config.json: {name} {given!r} is not supported; only {' and '.join(sorted(ACTIVATIONS.values()))} are"
    )


def read_rope(rope: Any, fields: Fields, plain: DecoderConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of DecoderConfig. rope: `rope_parameters`, or `rope_scaling` as it was before
    transformers 5."""
    if not isinstance(rope, dict):
        raise UserError(f"config.json: rope_parameters: {rope!r} is not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UserError(
            f"config.json: rotary scaling {kind!r} is not supported; only linear and llama3 are: use a checkpoint "
            "without it"
        )
    turned = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if turned not in (None, 1, 1.0):
        raise UserError(f"config.json: partial_rotary_factor {turned!r} is not supported; whole heads are turned")
    theta = rope.get("rope_theta") or fields.get("rope_theta") or plain.rope_theta
    scaling: dict[str, Any] = {"kind": kind, "factor": rope.get("factor")}
    if kind == "llama3":
        scaling = {
            **scaling,
            "low_freq_factor": rope.get("low_freq_factor"),
            "high_freq_factor": rope.get("high_freq_factor"),
            "original_max_position_embeddings": fields.get("original_max_position_embeddings")
            or rope.get("original_max_position_embeddings")
            or plain.max_position_embeddings,
        }
    try:
        read = Rope(theta=theta, scaling=None if kind == "default" else RopeScaling(**scaling))
    except ValidationError as error:
        first = error.errors()[0]
        name = {"theta": "rope_theta"}.get(str(first["loc"][0]), first["loc"][0]) if first["loc"] else "rope_parameters"
        raise UserError(f"config.json: {name}: {first['msg'].removeprefix('Value error, ')}") from None
    return {"rope_theta": read.theta, "rope_scaling": read.scaling}


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": scaling.kind, "rope_theta": theta, **scaling.model_dump(exclude={"kind"}, exclude_none=True)}


def read_windows(fields: Fields, plain: DecoderConfig, *, slides: list[bool]) -> dict[str, Any]:
    """`windows` of DecoderConfig. slides: the layers with a window where `layer_types` does not list them."""
    types = fields.get("layer_types")
    layers = plain.num_hidden_layers
    if types is not None:
        if not isinstance(types, list) or len(types) < layers or not set(types[:layers]) <= {_SLIDING, _FULL}:
            raise UserError(
                f"config.json: layer_types does not say {_SLIDING} or {_FULL} for each of the {layers} layers"
            )
        slides = [kind == _SLIDING for kind in types[:layers]]
    if not any(slides):
        return {}
    window = fields.get("sliding_window")
    if type(window) is not int or window <= 0:
        raise UserError(f"config.json: sliding_window: {window!r} is not a number of positions")
    return {"windows": tuple(window if slid else None for slid in slides)}


def read_upper_windows(fields: Fields, plain: DecoderConfig) -> dict[str, Any]:
    """`windows` of Qwen's families: none unless `use_sliding_window`, then from layer `max_window_layers` on."""
    windowed = flag(fields, "use_sliding_window") and fields.get("sliding_window") is not None
    first = count(fields, "max_window_layers", 0)
    slides = [windowed and index >= first for index in range(plain.num_hidden_layers)]
    if not windowed:
        fields = {**fields, "layer_types": None}
    return read_windows(fields, plain, slides=slides)


def write_windows(config: DecoderConfig) -> dict[str, Any]:
    """`sliding_window` and `layer_types`. Windows of several widths cannot be told: `write_config` notices."""
    windows = config.windows or (None,) * config.num_hidden_layers
    return {
        "sliding_window": next((window for window in windows if window is not None), None),
        "layer_types": [_FULL if window is None else _SLIDING for window in windows],
    }


def flag(fields: Fields, name: str) -> bool:
    """A field that is true or false; false where it is not there. Raises UserError for anything else."""
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise UserError(f"config.json: {name}: {value!r} is not true or false")
    return value


def number(fields: Fields, name: str) -> float | None:
    """A number above 0, if it is there. Raises UserError for anything else."""
    value = fields.get(name)
    if value is not None and (type(value) not in (int, float) or not 0 < value < float("inf")):
        raise UserError(f"config.json: {name}: {value!r} is not a number above 0")
    return None if value is None else float(value)


def count(fields: Fields, name: str, default: int) -> int:
    """A whole number, 0 or more. Raises UserError for anything else."""
    value = fields.get(name, default)
    if type(value) is not int or value < 0:
        raise UserError(f"config.json: {name}: {value!r} is not a whole number")
    return value
