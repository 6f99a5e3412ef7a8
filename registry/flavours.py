"""MLmodel files: how MLflow's own clients load what is registered.

An exported model has the flavour `python_function`: `mlflow.pyfunc.load_model` gives the domain's decisions by the
engine that serves, through `registry.pyfunc`. A checkpoint has the flavour `transformers`, with its adapter where there
is one. These files lie beside the folder that the manifest is about, so they change no digest, and nothing that
Twinloop serves is read from them.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinloop.domains.examples import example_request, scored_example
from twinloop.registry.artifact import Manifest
from twinloop.registry.logged_models import MODEL_FOLDER

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

    from twinloop.domains.domain import Domain

MLMODEL = "MLmodel"
LOADER = "twinloop.registry.pyfunc"
MAX_TOKENS = "max_tokens"
_TASKS = {"TextGeneration": "text-generation", "TextClassification": "text-classification"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def write_flavour(folder: Path, name: str, domain_name: str, manifest: Manifest, domain: Domain | None) -> None:
    """Write the MLmodel for `folder/model`, what the manifest is about; none for what no flavour fits.

    name: of the registered model. domain_name: what loads the domain again.
    """
    from mlflow.models import Model
    from mlflow.models.utils import _save_example

    from twinloop.models.adapter import ADAPTER_CONFIG
    from twinloop.models.directory import ADAPTER, BASE, CONFIG, WEIGHTS, load_config
    from twinloop.models.exported import EXPORT_FILE  # onnx takes half a second

    if EXPORT_FILE in manifest.files:
        reward = load_config(folder / MODEL_FOLDER).kind == "reward"
        model = Model(signature=_signature(domain, reward=reward) if domain else None)
        model.add_flavor(
            "python_function",
            loader_module=LOADER,
            python_version=platform.python_version(),
            model_name=name,
            domain=domain_name,
            manifest_digest=manifest.digest,
        )
        if domain:
            example = {"messages": scored_example(domain)} if reward else example_request(domain)
            _save_example(model, example, str(folder))
    elif CONFIG in manifest.files and WEIGHTS in manifest.files:
        model = Model()
        model.add_flavor("transformers", **_transformers(folder))
    elif f"{ADAPTER}/{ADAPTER_CONFIG}" in manifest.files:
        adapted = {"model_binary": f"{MODEL_FOLDER}/{BASE}", "peft_adaptor": f"{MODEL_FOLDER}/{ADAPTER}"}
        model = Model()
        model.add_flavor("transformers", **_transformers(folder) | adapted)
    else:
        return
    model.save(str(folder / MLMODEL))


def _signature(domain: Domain, *, reward: bool) -> ModelSignature:
    """What goes in and out; of a reward model conversations and scores, whatever the domain asks. Anything that MLflow
    has no type for is "any", and checked by the domain alone."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import (
        AnyType,
        Array,
        ColSpec,
        DataType,
        Object,
        ParamSchema,
        ParamSpec,
        Property,
        Schema,
        TensorSpec,
    )

    def type_of(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Any:
        if reference := schema.get("$ref"):
            return type_of(definitions[reference.rpartition("/")[2]], definitions)
        plain = {"string": DataType.string, "integer": DataType.long, "number": DataType.double}
        plain["boolean"] = DataType.boolean
        kind = schema.get("type")
        if kind in plain:
            return plain[kind]
        if kind == "array" and "items" in schema:
            return Array(type_of(schema["items"], definitions))
        if kind == "object" and schema.get("properties"):
            required = schema.get("required", ())
            fields = schema["properties"].items()
            return Object([Property(name, type_of(each, definitions), name in required) for name, each in fields])
        return AnyType()

    text = DataType.string
    if domain.request is None or reward:
        message = Object([Property("role", text), Property("content", text)])
        inputs = Schema([ColSpec(Array(message), "messages")])
        if reward:
            return ModelSignature(inputs, Schema([ColSpec(DataType.double)]))
        params = ParamSchema([ParamSpec(MAX_TOKENS, DataType.long, domain.max_answer_tokens)])
        return ModelSignature(inputs, Schema([ColSpec(text)]), params)
    schema = domain.request.model_json_schema()
    columns: list[ColSpec | TensorSpec] = [
        ColSpec(type_of(each, schema.get("$defs", {})), name, name in schema.get("required", ()))
        for name, each in schema.get("properties", {}).items()
    ]
    reason = Object([Property(name, text) for name in ("predicate", "reason", "owner")])
    outputs = Schema(
        [ColSpec(AnyType(), "decision"), ColSpec(DataType.boolean, "escalated"), ColSpec(Array(reason), "reasons")]
    )
    return ModelSignature(Schema(columns) if columns else None, outputs)


def _transformers(folder: Path) -> dict[str, Any]:
    """The flavour of a model directory, as MLflow 3.17.2 writes it for a local checkpoint. It looks for the tokenizer
    in a folder of its own."""
    from twinloop.models.directory import load_config

    tokenizer = folder / "components" / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        if (source := folder / MODEL_FOLDER / name).exists():
            shutil.copyfile(source, tokenizer / name)
    config = json.loads((folder / MODEL_FOLDER / "config.json").read_bytes())
    kind = "TextGeneration" if load_config(folder / MODEL_FOLDER).kind == "text" else "TextClassification"
    return {
        "task": _TASKS[kind],
        "instance_type": f"{kind}Pipeline",
        "pipeline_model_type": config["architectures"][0],
        "source_model_name": MODEL_FOLDER,
        "model_binary": MODEL_FOLDER,
        "components": ["tokenizer"],
        "tokenizer_type": "PreTrainedTokenizerFast",
    }
