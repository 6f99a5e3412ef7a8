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


def read_rope(fields: Fields, plain: DecoderConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of DecoderConfig, where all layers turn by the same angles."""
    # Before transformers 5 the scaling was alone, beside rope_theta; added to a file of today, it is all that counts.
    rope = parse_rope(fields.get("rope_scaling") or fields.get("rope_parameters") or {}, fields, plain)
    return {"rope_theta": rope.theta, "rope_scaling": rope.scaling}


def parse_rope(given: Any, fields: Fields, plain: DecoderConfig) -> Rope:
    """The angles that one object of config.json describes; `rope_theta` may be in `fields` instead."""
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise UserError(f"config.json: rope_parameters: {given!r} is not an object with the angles' base and scaling")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UserError(
            f"config.json: rotary scaling {kind!r} is not supported, only linear and llama3 are; use a checkpoint "
            "without it"
        )
    turned = given.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if turned not in (None, 1):
        raise UserError(f"config.json: partial_rotary_factor {turned!r} is not supported; whole heads are turned")
    scaling: dict[str, Any] = {"kind": kind, "factor": given.get("factor")}
    if kind == "llama3":
        scaling |= {name: given.get(name) for name in ("low_freq_factor", "high_freq_factor")}
        name = "original_max_position_embeddings"
        scaling[name] = fields.get(name, given.get(name, plain.max_position_embeddings))
    try:
        theta: Any = given.get("rope_theta", fields.get("rope_theta", plain.rope_theta))
        return Rope(theta=theta, scaling=None if kind == "default" else RopeScaling(**scaling))
    except ValidationError as error:
        first = error.errors()[0]
        name = "".join(f" {'rope_theta' if part == 'theta' else part}:" for part in first["loc"])
        raise UserError(f"config.json:{name} {first['msg'].removeprefix('Value error, ')}") from None


def write_rope(rope: Rope) -> dict[str, Any]:
    kind = "default" if rope.scaling is None else rope.scaling.kind
    numbers = {} if rope.scaling is None else rope.scaling.model_dump(exclude={"kind"}, exclude_none=True)
    return {"rope_type": kind, "rope_theta": rope.theta, **numbers}


def read_windows(fields: Fields, plain: DecoderConfig, *, slides: list[bool]) -> dict[str, Any]:
    """`windows` of DecoderConfig. slides: the layers with a window where `layer_types` does not list them."""
    types = by_layer(fields, "layer_types", (_SLIDING, _FULL), plain.num_hidden_layers)
    if types is not None:
        slides = [kind == _SLIDING for kind in types]
    if not any(slides):
        return {}
    window = fields.get("sliding_window")
    if type(window) is not int or not 0 < window < 2**31:
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
    """`sliding_window` and `layer_types`. Windows of several widths have no words there: `write_config` notices."""
    windows = config.windows or (None,) * config.num_hidden_layers
    return {
        "sliding_window": next((window for window in windows if window is not None), None),
        "layer_types": [_FULL if window is None else _SLIDING for window in windows],
    }


def by_layer(fields: Fields, name: str, choices: tuple[str, str] | tuple[int, int], layers: int) -> list[Any] | None:
    """One of two values for each layer, if the field is there. Raises UserError for anything else."""
    values = fields.get(name)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) < layers or not all(value in choices for value in values[:layers]):
        first, second = choices
        raise UserError(f"config.json: {name} does not say {first} or {second} for each of the {layers} layers")
    return values[:layers]


def flag(fields: Fields, name: str) -> bool:
    """A field that is true or false; false where it is not there. Raises UserError for anything else."""
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise UserError(f"config.json: {name}: {value!r} is not true or false")
    return value


def number(fields: Fields, name: str) -> float | None:
    """A number above 0, if it is there. Raises UserError for anything else."""
    value = fields.get(name)
    if value is not None and (type(value) not in (int, float) or not 0 < value < 1e30):
        raise UserError(f"config.json: {name}: {value!r} is not a number above 0")
    return None if value is None else float(value)


def count(fields: Fields, name: str, default: int) -> int:
    """A whole number, 0 or more. Raises UserError for anything else."""
    value = fields.get(name, default)
    if type(value) is not int or value < 0:
        raise UserError(f"config.json: {name}: {value!r} is not a whole number")
    return value
