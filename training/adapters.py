"""LoRA adapters on a network that trains (Hu et al., 2021): the base is frozen, A and B learn.

The base keeps the names of its tensors; A and B have PEFT's names beside them. B starts at zero, so the network starts
as the base, and the base without the adapter is the reference of DPO and GRPO: the same tensors, no second copy.
"""

from __future__ import annotations

import copy
import zlib

import numpy as np
import torch
from torch import Tensor, nn

from twinloop.models.adapter import Adapter
from twinloop.models.adapter_form import AdapterForm
from twinloop.models.decoder import Decoder
from twinloop.models.products import Linear, linear


class LoRALinear(nn.Module):
    """A linear layer with frozen weights, and its low-rank change beside them."""

    def __init__(self, layer: nn.Linear, form: AdapterForm):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A = Linear(layer.in_features, form.rank, bias=False)
        self.lora_B = Linear(form.rank, layer.out_features, bias=False)
        self.form = form
        nn.init.kaiming_uniform_(self.lora_A.weight, a=5**0.5)  # as PEFT
        nn.init.zeros_(self.lora_B.weight)

    def without_adapter(self) -> nn.Linear:
        """The layer that was adapted, over the same tensors."""
        out, into = self.weight.shape
        layer = Linear(into, out, bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = self.weight, self.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        change = self.lora_B(self.lora_A(x) * self.form.scale)
        return linear(x, self.weight, self.bias) + change


def attach_adapter(model: Decoder, form: AdapterForm, *, seed: int, stage: str = "") -> None:
    """Freeze the network, and give it a fresh adapter: the same for the same seed and stage."""
    assert not adapter_layers(model), "an adapter is merged before the next one is attached"
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        # Stages after each other start from other A, or the second adapter would begin in the span of the first.
        torch.manual_seed(zlib.crc32(f"{stage} {seed}".encode()))  # of 64 bits, its generator takes 32
        for name in form.modules(model.config):
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            _replace(model, name, LoRALinear(layer, form))


def bind_adapter(model: Decoder, adapter: Adapter) -> None:
    """Give the network this adapter, beside its weights: each layer with its own rank and scale."""
    for name, (a, b) in adapter.factors.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        alpha = adapter.alphas.get(name, adapter.alpha)
        adapted = LoRALinear(layer, AdapterForm(len(a), alpha, adapter.rank_stabilised))
        with torch.no_grad():
            adapted.lora_A.weight.copy_(torch.from_numpy(a))
            adapted.lora_B.weight.copy_(torch.from_numpy(b))
        _replace(model, name, adapted)


def adapter_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by name; none where the network itself trains."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapter_form(model: nn.Module) -> AdapterForm | None:
    return next((layer.form for layer in adapter_layers(model).values()), None)


def adapter_of(model: nn.Module) -> Adapter | None:
    """A float32 copy of the adapter; None where the network itself trains."""
    layers = adapter_layers(model)
    if not layers:
        return None
    factors = {name: (_copy(layer.lora_A.weight), _copy(layer.lora_B.weight)) for name, layer in layers.items()}
    alphas = {name: layer.form.alpha for name, layer in layers.items()}
    form = next(iter(layers.values())).form  # of all layers alike: rank-stabilised or not
    return Adapter.of(factors, alphas, rank_stabilised=form.rank_stabilised)


def trained_tensors(model: nn.Module, objective: object = None) -> dict[str, nn.Parameter]:
    """What training changes, and a checkpoint keeps: also the parameters of an objective that has some, such as a
    critic's head. They are no part of the network, nor of a model directory."""
    own = objective.named_parameters(prefix="objective") if isinstance(objective, nn.Module) else ()
    return {name: parameter for name, parameter in (*model.named_parameters(), *own) if parameter.requires_grad}


def without_adapter(model: Decoder) -> Decoder:
    """The network with its adapter off, over the same tensors; itself, where it has none."""
    if not adapter_layers(model):
        return model
    base = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for name, layer in adapter_layers(base).items():
        _replace(base, name, layer.without_adapter())
    return base


def frozen_reference(model: Decoder) -> Decoder:
    """What the network is compared with while it trains: itself with the adapter off, or else a copy of it as it is."""
    return without_adapter(model) if adapter_layers(model) else copy.deepcopy(model)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def _copy(parameter: Tensor) -> np.ndarray:
    array: np.ndarray = parameter.detach().float().cpu().numpy().copy()
    return array
