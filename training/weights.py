"""Between the network and the model directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from twinloop.models.adapter_form import is_adapter_tensor
from twinloop.models.config import DecoderConfig
from twinloop.models.decoder import Decoder
from twinloop.models.directory import check_tensors, load_config, load_tensors
from twinloop.training.adapters import adapter_of


def new_decoder(config: DecoderConfig, *, seed: int, keys_as_queries: bool = False) -> Decoder:
    """An untrained network, the same for the same seed; the global random state is left alone. keys_as_queries: see
    `NewBase`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Decoder(config)
    if keys_as_queries:
        network.begin_keys_as_queries()
    return network


def load_decoder(directory: Path) -> Decoder:
    """The network of a model directory, float32, on CPU, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        model = Decoder(load_config(directory))
    set_weights(model, load_tensors(directory), where=str(directory))
    return model.eval()


def set_weights(model: Decoder, tensors: Mapping[str, np.ndarray], *, where: str) -> None:
    """Copy arrays into the parameters of the same names. Raises UserError if names or shapes differ."""
    check_tensors(
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        {name: array.shape for name, array in tensors.items()},
        tied=model.config.tie_word_embeddings,
        where=where,
    )
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            parameter.copy_(torch.from_numpy(np.array(tensors[name], dtype=np.float32)))


def get_weights(model: Decoder) -> dict[str, np.ndarray]:
    """Float32 copies of all weights, by Hugging Face's names; an adapter is merged into them."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not is_adapter_tensor(name)}
    weights = {name: tensor.detach().float().cpu().numpy().copy() for name, tensor in tensors.items()}
    adapter = adapter_of(model)
    return adapter.merge(weights) if adapter else weights
