"""A directory for onnxruntime-genai: an exported model, its graph with the inputs that genai gives, and genai's config.

genai gives `attention_mask` where our engine says each row's length, and wants logits of every position. So the graph
is changed at its two ends and keeps its nodes and weights in between:

    input_ids        int64 [B, L]
    attention_mask   int64 [B, past + L]      1 for what there is
    logits           float32 [B, L, V]
    past_key_values.i.key / .value   [B, K, past, E],    present.i.key / .value   [B, K, past + L, E]

Shapes: letters as in `models.shapes`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, TensorProto, helper, numpy_helper

from twinloop.common.errors import UserError
from twinloop.models.config import DecoderConfig
from twinloop.models.directory import CONFIG, GENERATION_CONFIG
from twinloop.models.exported import GRAPH_FILE, WEIGHTS_FILE, ExportedModel, read_exported
from twinloop.models.tokenizer_files import SETTINGS, read_stop_ids
from twinloop.models.vocabulary import TOKENIZER

GENAI_CONFIG = "genai_config.json"
_COPIED = (WEIGHTS_FILE, CONFIG, GENERATION_CONFIG, TOKENIZER, SETTINGS)
_OURS = ("seqlens_k", "total_sequence_length", "logit_rows")


def write_genai(exported_dir: Path, out: Path) -> None:
    """Write an exported model into the directory `out` in genai's form. Raises UserError where it is corrupt, or its
    adapter lies beside its base."""
    exported, config = read_exported(exported_dir)
    if exported.takes_adapters:
        raise UserError("genai: its adapter is applied by our engine only; export it with `adapters: false` for genai")
    model = onnx.load(exported_dir / GRAPH_FILE, load_external_data=False)  # the weights' file stays as it is
    _take_attention_mask(model.graph)
    _give_all_logits(model.graph, config)
    onnx.save(model, out / GRAPH_FILE)
    for name in _COPIED:
        if (exported_dir / name).exists():
            shutil.copyfile(exported_dir / name, out / name)
    stop_ids = read_stop_ids(exported_dir) or (config.eos_token_id,)
    text = json.dumps(_genai_config(exported, config, stop_ids), indent=2) + "\n"
    (out / GENAI_CONFIG).write_text(text, encoding="utf-8")


def _take_attention_mask(graph: GraphProto) -> None:
    """Compute the rows' lengths from the mask, and give the lengths of past and present names of their own."""
    for given in [each for each in graph.input if each.name in _OURS]:
        graph.input.remove(given)
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["B", "total"])
    graph.input.insert(1, mask)
    for values, length in ((graph.input, "past"), (graph.output, "total")):
        for value in values:
            if value.name.startswith(("past_key_values.", "present.")):
                value.type.tensor_type.shape.dim[2].dim_param = length
    graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "mask_axis"))
    graph.initializer.append(numpy_helper.from_array(np.array(1, np.int64), "one"))
    nodes = [
        helper.make_node("ReduceSum", ["attention_mask", "mask_axis"], ["mask_lengths"], keepdims=0),
        helper.make_node("Sub", ["mask_lengths", "one"], ["mask_lengths_less_one"]),
        helper.make_node("Cast", ["mask_lengths_less_one"], ["seqlens_k"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["mask_shape"]),
        helper.make_node("Gather", ["mask_shape", "one"], ["mask_width"], axis=0),
        helper.make_node("Cast", ["mask_width"], ["total_sequence_length"], to=TensorProto.INT32),
    ]
    for node in reversed(nodes):
        graph.node.insert(0, node)


def _give_all_logits(graph: GraphProto, config: DecoderConfig) -> None:
    """Project every position, not the chosen rows."""
    produced = {node.output[0]: node for node in graph.node if node.output}
    rows = produced["hidden_rows"]
    flat = produced["hidden_flat"]
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == "hidden_rows":
                node.input[index] = flat.input[0]
    graph.node.remove(rows)
    graph.node.remove(flat)
    logits = next(each for each in graph.output if each.name == "logits")
    logits.CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "L", config.vocab_size]))


def _genai_config(exported: ExportedModel, config: DecoderConfig, stop_ids: Sequence[int | None]) -> dict[str, Any]:
    cache = {f"{time}_{kind}_names": f"{prefix}.%d.{kind}" for time, prefix in _CACHES for kind in ("key", "value")}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": GRAPH_FILE,
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask"}
        | {name: value for name, value in cache.items() if name.startswith("past")},
        "outputs": {"logits": "logits"} | {name: value for name, value in cache.items() if name.startswith("present")},
    }
    model = {
        "type": config.model_type,
        "vocab_size": config.vocab_size,
        "context_length": exported.max_length,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(stop_ids) if stop_ids[1:] else stop_ids[0],
        "pad_token_id": config.pad_token_id,
        "decoder": decoder,
    }
    # Answers are greedy where the caller asks for nothing else, as generation_config.json has it.
    search = {"do_sample": False, "max_length": exported.max_length, "past_present_share_buffer": True}
    return {"model": model, "search": search}


_CACHES = (("past", "past_key_values"), ("present", "present"))
