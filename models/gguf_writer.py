"""A GGUF file of a model directory, as llama.cpp reads it.

Names, numbers and the order of rows are the family's `GGUFForm`. Vectors stay float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import gguf
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType

from twinloop.common.errors import UserError
from twinloop.models.config import DecoderConfig
from twinloop.models.directory import check_float16, check_tensors, load_config, load_tensors
from twinloop.models.family import find_family
from twinloop.models.gguf_form import ROPE_FREQS, GGUFForm
from twinloop.models.gguf_vocabulary import GGUFVocabulary
from twinloop.models.shapes import weight_shapes

GGUFType: TypeAlias = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
"""Of the matrices."""

_TYPES: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
_BLOCK = 32
"""Neighbours in a row that share a scale in Q8_0 and Q4_0."""


def write_gguf(model_dir: Path, path: Path, vocabulary: GGUFVocabulary, *, type: GGUFType, name: str) -> None:
    """Write a model directory as one GGUF file. name: of the model, for people.

    Raises UserError for a network that llama.cpp has not, weights that float16 cannot hold, or missing tensors.
    """
    config = load_config(model_dir)
    if config.labels:
        raise UserError(f"{model_dir}: a network with a head for {', '.join(config.labels)} has no form as GGUF")
    form = gguf_form(config)
    layout = form.tensors(config)
    tensors = load_tensors(model_dir)
    shapes = {each: array.shape for each, array in tensors.items()}
    check_tensors(weight_shapes(config), shapes, tied=config.tie_word_embeddings, where=str(model_dir))
    writer = gguf.GGUFWriter(path, form.architecture)
    _add_network(writer, form.metadata(config), type, name)
    if (freqs := form.rope_freqs(config)) is not None:
        writer.add_tensor(ROPE_FREQS, freqs.astype(np.float32))
    _add_vocabulary(writer, vocabulary)
    for each, tensor in layout.items():
        array = tensor.to_gguf(np.asarray(tensors[each], np.float32))
        stored = _stored_type(each, array, type)
        if stored == GGMLQuantizationType.F16:
            check_float16(each, array, str(model_dir))
        writer.add_tensor(tensor.name, gguf.quants.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_form(config: DecoderConfig) -> GGUFForm:
    form: GGUFForm = find_family(config.model_type).GGUF
    return form


def _stored_type(name: str, array: np.ndarray, type: GGUFType) -> GGMLQuantizationType:
    """As llama.cpp's own converter chooses: what has no whole blocks is F16, and what meets the vocabulary at least
    Q8_0."""
    if array.ndim == 1:
        return GGMLQuantizationType.F32
    wanted, _ = _TYPES[type]
    if type in ("q8_0", "q4_0") and array.shape[-1] % _BLOCK:
        return GGMLQuantizationType.F16
    if type == "q4_0" and ("embed_tokens" in name or "lm_head" in name):
        return GGMLQuantizationType.Q8_0
    return wanted


def _add_network(writer: gguf.GGUFWriter, metadata: Mapping[str, Any], type: GGUFType, name: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(_TYPES[type][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata.items():
        full = f"{writer.arch}.{key}"
        match value:
            case bool():
                writer.add_bool(full, value)
            case int():
                writer.add_uint32(full, value)
            case float():
                writer.add_float32(full, value)
            case str():
                writer.add_string(full, value)
            case _:
                writer.add_array(full, list(value))


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: GGUFVocabulary) -> None:
    reading = vocabulary.reading
    writer.add_tokenizer_model(reading.model)
    writer.add_tokenizer_pre(reading.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if reading.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores([reading.scores.get(token, 0.0) for token in vocabulary.tokens])
    writer.add_bos_token_id(vocabulary.bos_id)
    # llama.cpp ends an answer at each of these three; its templates have the first one's text as `eos_token`.
    writer.add_eos_token_id(vocabulary.eos_id)
    end_of_turn, *others = [id for id in vocabulary.stop_ids if id != vocabulary.eos_id] or [vocabulary.eos_id]
    writer.add_eot_token_id(end_of_turn)
    if others:
        writer.add_eom_token_id(others[0])
    writer.add_pad_token_id(vocabulary.pad_id)
    if vocabulary.unknown_id is not None:
        writer.add_unk_token_id(vocabulary.unknown_id)
    # The chat template writes them itself, and a BOS that is added twice changes answers.
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(reading.space_prefix)
    writer.add_chat_template([{"name": name, "template": text} for name, text in vocabulary.chat_templates.items()])
