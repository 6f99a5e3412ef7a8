"""The network of a GGUF file: its shape from the metadata, its weights by Hugging Face's names.

What an architecture calls its sizes and tensors is its family's, see `models/gguf_form.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from twinloop.common.errors import UserError
from twinloop.models.config import DecoderConfig
from twinloop.models.family import find_gguf_family, read_config
from twinloop.models.gguf_file import GGUFFile
from twinloop.models.gguf_form import ROPE_FREQS, GGUFForm

_REQUIRED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
LLAMA3_SCALING: dict[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_FACTORS = (8.0, 32.0)
"""Of Llama 3.1 and 3.3, and of Llama 3.2."""


def read_network(file: GGUFFile) -> DecoderConfig:
    """The network's shape, its special tokens left to the tokenizer.

    Raises UserError for another architecture, or where a size is missing.
    """
    architecture = file.metadata.get("general.architecture")
    try:
        family = find_gguf_family(architecture)
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None
    own = {key.removeprefix(f"{architecture}."): value for key, value in file.metadata.items()}
    if missing := [key for key in _REQUIRED if key not in own]:
        raise UserError(f"{file.path}: no {architecture}.{missing[0]} in its metadata; it is no language model")
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path}: token_embd.weight is missing; it is no whole language model")
    form: GGUFForm = family.GGUF
    fields = {
        "model_type": family.__name__.rpartition(".")[2],
        **form.fields(own),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    try:
        config = read_config(fields)
        return _with_llama3_scaling(file, form, fields) if ROPE_FREQS in file.tensors else config
    except UserError as error:  # it names the fields as config.json does
        said = str(error).replace("config.json: ", "as config.json: ", 1)
        raise UserError(f"{file.path}: its metadata, {said}") from None


def _with_llama3_scaling(file: GGUFFile, form: GGUFForm, fields: dict[str, Any]) -> DecoderConfig:
    """The file has no more of Llama 3's rotary scaling than what each frequency is divided by."""
    factors_F = file.load(ROPE_FREQS)
    for factor in LLAMA3_FACTORS:
        config = read_config(fields | {"rope_scaling": {**LLAMA3_SCALING, "factor": factor}})
        expected = form.rope_freqs(config)
        if expected is not None and factors_F.shape == expected.shape and np.allclose(factors_F, expected, rtol=1e-4):
            return config
    raise UserError(f"{ROPE_FREQS} is not the rotary scaling of Llama 3.1, 3.2 or 3.3; only that is read")


def network_shapes(file: GGUFFile, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors by Hugging Face's names; one that the network does not have goes by its own."""
    names = {tensor.name: name for name, tensor in _form(file).tensors(config).items()}
    return {names.get(name, name): tensor.shape for name, tensor in file.tensors.items() if name != ROPE_FREQS}


def load_network(file: GGUFFile, config: DecoderConfig) -> dict[str, np.ndarray]:
    """All weights as float32, by Hugging Face's names."""
    tensors = _form(file).tensors(config).items()
    return {name: np.ascontiguousarray(tensor.from_gguf(file.load(tensor.name))) for name, tensor in tensors}


def _form(file: GGUFFile) -> GGUFForm:
    form: GGUFForm = find_gguf_family(file.metadata["general.architecture"]).GGUF
    return form
