"""A family: what one architecture's config.json means, one module of `models/families/` each.

The module's name is the `model_type` of the config.json; adding a module adds the family. It holds

    ARCHITECTURE   the class of `transformers`
    CLASSIFIER     that with a head on the last token, where its name is not the same with ForSequenceClassification
    DEFAULTS       what `transformers` takes where config.json lacks a field
    GGUF           its names in a GGUF file, see `models/gguf_form.py`
    read(fields, plain) -> dict
                   fields of DecoderConfig: what the family has beside the sizes and constants that all share, which
                   are in `plain`. It raises UserError for what the network cannot do
    write(config, fields) -> dict
                   the config.json of a network; `fields` is what all families share of it

Families only translate: what they need of the network are fields of DecoderConfig that name no family.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from pydantic import ValidationError

import twinloop.models.families
from twinloop.common.errors import UserError
from twinloop.common.modules import modules_in
from twinloop.models.config import DecoderConfig
from twinloop.models.config_fields import ACTIVATIONS, read_activation, write_rope

_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""The fields of config.json that DecoderConfig has under the same name and with the same meaning in every family."""

_WRITES, _CLASSIFIES = "ForCausalLM", "ForSequenceClassification"
"""How the name of a class of `transformers` ends."""

_MOST_LABELS = 10_000
"""That have no names, so that a corrupt config.json must not make their list endless."""

_NULL_COUNTS = ("sliding_window", "bos_token_id", "eos_token_id", "pad_token_id")
"""Where null says something else than a field that is not there."""


def find_family(model_type: object) -> ModuleType:
    """The module of a model_type. Raises UserError where there is none."""
    known = modules_in(twinloop.models.families)
    if model_type not in known:
        raise UserError(f"config.json: model_type {model_type!r} is not one of {', '.join(known)}")
    return importlib.import_module(f"{twinloop.models.families.__name__}.{model_type}")


def find_gguf_family(architecture: object) -> ModuleType:
    """The module of a GGUF file's `general.architecture`. Raises UserError where there is none.

    A file of a Mistral says llama, which it is once no layer has a window.
    """
    families = [find_family(name) for name in modules_in(twinloop.models.families)]
    known = {family.GGUF.architecture: family for family in families}
    known |= {family.GGUF.architecture: family for family in families if family.GGUF.architecture == _name(family)}
    if not isinstance(architecture, str) or architecture not in known:
        raise UserError(f"general.architecture {architecture!r} is not one of {', '.join(sorted(known))}")
    return known[architecture]


def read_config(fields: Any) -> DecoderConfig:
    """The network that the content of a config.json describes.

    Raises UserError for a field that is missing or of a wrong type, and for what the network does not have: another
    architecture, activation or rotary scaling, quantised weights.
    """
    if not isinstance(fields, dict):
        raise UserError(f"config.json: it holds a {type(fields).__name__}, not an object with the model's sizes")
    family = find_family(fields.get("model_type"))
    if fields.get("quantization_config"):
        raise UserError(
            "config.json: a quantised checkpoint (quantization_config) is not read; take the original, or a GGUF file"
        )
    stated = {name: value for name, value in fields.items() if value is not None or name in _NULL_COUNTS}
    fields = {"tie_word_embeddings": False, **family.DEFAULTS, **stated}
    shared = {name: fields[name] for name in _SHARED if name in fields}
    width, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    shared.setdefault("num_key_value_heads", heads)
    if _is_size(width) and _is_size(heads):
        shared.setdefault("head_dim", width // heads)
    eos = shared.get("eos_token_id")
    if isinstance(eos, list) and eos:
        shared["eos_token_id"] = eos[0]
    plain = _checked(shared)
    changes = {"activation": read_activation(fields), **_read_head(fields), **family.read(fields, plain)}
    config = _checked({**shared, **changes})
    model_type = fields["model_type"]
    return config if config.model_type == model_type else _checked({**shared, **changes, "family": model_type})


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The content of `config.json`, as `transformers` reads it.

    Raises UserError where the family has no words for this network.
    """
    family = find_family(config.model_type)
    written: dict[str, Any] = family.write(
        config,
        {
            "architectures": [_architecture(family, config)],
            "model_type": config.model_type,
            "hidden_act": ACTIVATIONS[config.activation],
            "torch_dtype": "float32",
            "rope_parameters": write_rope(config.rope),
            # All that transformers 4, and what reads its form, looks at; such a reader would scale nothing without it.
            **({"rope_scaling": write_rope(config.rope)} if config.rope_scaling else {}),
            **{name: getattr(config, name) for name in _SHARED},
            **_write_head(config),
        },
    )
    back = read_config(written)
    for name in DecoderConfig.model_fields:
        if getattr(back, name) != getattr(config, name):
            raise UserError(
                f"model: a {config.model_type} network cannot have {name} {getattr(config, name)!r}; "
                f"its config.json would say {getattr(back, name)!r}"
            )
    return written


def _architecture(family: ModuleType, config: DecoderConfig) -> str:
    name: str = family.ARCHITECTURE
    if not config.labels:
        return name
    return getattr(family, "CLASSIFIER", name.replace(_WRITES, _CLASSIFIES))


def _read_head(fields: dict[str, Any]) -> dict[str, Any]:
    """`labels`, where the architecture has them. The vocabulary then has one table, whatever the file says."""
    named = fields.get("architectures")
    architectures = named if isinstance(named, list) else []
    if not any(isinstance(name, str) and name.endswith(_CLASSIFIES) for name in architectures):
        return {}
    named = fields.get("id2label") or {str(index): f"LABEL_{index}" for index in range(_num_labels(fields))}
    if not isinstance(named, dict) or set(map(str, range(len(named)))) != set(named):
        raise UserError("config.json: id2label does not name each label from 0 on")
    labels = tuple(str(named[str(index)]) for index in range(len(named)))
    _refuse_another_problem(fields.get("problem_type"), len(labels))
    return {"labels": labels, "tie_word_embeddings": True}


def _num_labels(fields: dict[str, Any]) -> int:
    """Where nothing names them. Raises UserError for what is no number of labels."""
    number = fields.get("num_labels", 2)
    if not _is_size(number) or number > _MOST_LABELS:
        raise UserError(f"config.json: num_labels: {number!r} is not a number from 1 to {_MOST_LABELS:,}")
    return int(number)


def _refuse_another_problem(problem: object, labels: int) -> None:
    """A head's scores are one text's only label of several, or the one number that it gets."""
    if problem == "multi_label_classification":
        raise UserError(
            f"config.json: problem_type {problem!r}: a text may have several labels there, and gets one of them here"
        )
    if problem == "regression" and labels > 1:
        raise UserError(f"config.json: problem_type {problem!r} with {labels} numbers for a text is not supported")


def _write_head(config: DecoderConfig) -> dict[str, Any]:
    """As `transformers` has labels: it takes their number from these."""
    if not config.labels:
        return {}
    return {
        "id2label": {str(index): label for index, label in enumerate(config.labels)},
        "label2id": {label: index for index, label in enumerate(config.labels)},
    }


def _checked(known: dict[str, Any]) -> DecoderConfig:
    try:
        return DecoderConfig(**known)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f" {part}:" for part in first["loc"])
        raise UserError(f"config.json:{where} {first['msg'].removeprefix('Value error, ')}") from None


def _name(family: ModuleType) -> str:
    return family.__name__.rpartition(".")[2]


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0
