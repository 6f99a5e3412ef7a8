"""How long a decode step takes, how much of it is ours, and what the bound engine gains over plain PyTorch.

    python -m benchmarks.decode [--device cuda] [--threads N]

One random network of the default recipe's size, so that nothing has to be trained first. PyTorch's sampler is a fair
one: prompts computed once a group, a preallocated cache, one batched step for all rows, the next token drawn by
inversion from the same draws, finished rows dropped when half are. Rollouts of both are measured in turns, in one
process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from models.config import DecoderConfig
from models.decoder import Decoder, rotary_tables, rotate
from models.directory import save_model
from models.onnx_bundle import export_bundle
from models.onnx_graph import Precision
from serving.engine import Engine
from serving.sampling import choose, uniform_draws

CONFIG = DecoderConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)
MAX_LENGTH = 512
CONTEXT = 160
"""Tokens in each slot while a step is timed: a case's prompt and part of its answer."""
ANSWER = 80
STEPS = 200


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments.add_argument("--threads", type=int, default=1, help="of ONNX Runtime and of PyTorch alike")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    network = Decoder(CONFIG).requires_grad_(False).eval()
    console = Console()
    console.print(
        f"{CONFIG.num_parameters:,} parameters, {options.device}, {options.threads} threads, {CONTEXT} tokens"
    )
    precisions: list[Precision] = ["fp32", "int8"] if options.device == "cpu" else ["fp16", "bf16"]
    console.print(step_table(network, precisions, options.threads))
    console.print(rollout_table(network.to(options.device), options.threads))


# --- a decode step -----------------------------------------------------------------------------------------------


def step_table(network: Decoder, precisions: list[Precision], threads: int) -> Table:
    table = Table("precision", "slots", "step ms", "p95 ms", "outside ORT", "tokens/s", "KV bytes copied a step")
    with tempfile.TemporaryDirectory() as folder:
        tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
        save_model(Path(folder) / "model", CONFIG, tensors)
        for precision in precisions:
            bundle = Path(folder) / precision
            export_bundle(Path(folder) / "model", bundle, precision=precision, max_length=MAX_LENGTH)
            for slots in (1, 8, 32):
                table.add_row(precision, str(slots), *time_steps(bundle, slots, threads))
    return table


def time_steps(bundle: Path, slots: int, threads: int) -> list[str]:
    """Steps of all slots, each drawn and fed back, as `generate` does; the run inside is timed apart."""
    engine = Engine.load(bundle, slots=slots, threads=threads)
    prompt = np.random.default_rng(0).integers(0, CONFIG.vocab_size, CONTEXT)
    for slot in range(slots):
        engine.prefill(slot, prompt)
    inside: list[float] = []
    session_run = engine._session.run_with_iobinding

    def timed_run(binding: ort.IOBinding) -> None:
        began = time.perf_counter()
        session_run(binding)
        inside.append(time.perf_counter() - began)

    engine._session.run_with_iobinding = timed_run  # type: ignore[method-assign]
    tokens, active = np.zeros(slots, np.int64), np.ones(slots, bool)
    temperature = np.ones(slots, np.float32)
    draws = np.random.default_rng(0).random((STEPS, slots))
    whole = []
    for step in range(STEPS):
        began = time.perf_counter()
        logits = engine.decode(0, tokens, active)
        tokens, _ = choose(logits, temperature, draws[step])
        whole.append(time.perf_counter() - began)
    ours = 1 - statistics.median(inside) / statistics.median(whole)
    step_s = statistics.median(whole)
    return [
        f"{1000 * step_s:.3f}",
        f"{1000 * float(np.quantile(whole, 0.95)):.3f}",
        f"{ours:.0%}",
        f"{slots / step_s:,.0f}",
        str(copied_bytes(engine)),
    ]


def copied_bytes(engine: Engine) -> int:
    """Bytes of cache that runs wrote elsewhere than where they read them, over every binding that was used."""
    copied = 0
    for (first, _, _, _), step in engine._bindings.items():
        _, *presents = step._binding.get_outputs()  # the first are the logits
        for block, present in enumerate(presents):
            if present.data_ptr() != engine._arena.address(block, first):
                copied += present.tensor_size_in_bytes()
    return copied


# --- rollouts ----------------------------------------------------------------------------------------------------


def rollout_table(network: Decoder, threads: int, *, prompts: int = 8, group: int = 8, rounds: int = 5) -> Table:
    """GRPO's shape: `group` answers to each prompt at temperature 1. The stop token comes by chance."""
    rng = np.random.default_rng(1)
    asked = [rng.integers(0, CONFIG.vocab_size, CONTEXT + int(rng.integers(-40, 40))).tolist() for _ in range(prompts)]
    stops = list(range(6))  # one in 85 tokens of an untrained network: answers of 1 to 80 tokens
    on_cuda = network.model.norm.weight.is_cuda
    dtype = torch.bfloat16 if on_cuda else torch.float32  # as rollouts have it: a bf16 shadow of the weights on CUDA
    weights = {name: ort.OrtValue.from_dlpack(tensor.to(dtype)) for name, tensor in network.state_dict().items()}
    if on_cuda:
        torch.cuda.synchronize()
    engine = Engine.from_weights(CONFIG, weights, max_length=MAX_LENGTH, slots=prompts * group, threads=threads)
    baseline = TorchSampler(network)
    sampled = {"max_tokens": ANSWER, "group": group}
    arms: dict[str, Callable[[int], int]] = {
        "PyTorch": lambda seed: baseline.generate(asked, stops=stops, seed=seed, **sampled),
        "bound engine": lambda seed: sum(
            len(answer.tokens)
            for answer in engine.generate(asked, temperature=1.0, seed=seed, stop_ids=stops, **sampled)
        ),
    }
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, run in arms.items():
            began = time.perf_counter()
            tokens = run(turn)
            if turn:  # the first turn warms up
                rates[name].append(tokens / (time.perf_counter() - began))
    ratios = [ours / theirs for ours, theirs in zip(rates["bound engine"], rates["PyTorch"], strict=True)]
    table = Table("rollouts", "tokens/s", "times PyTorch (range)")
    table.add_row("PyTorch", f"{statistics.median(rates['PyTorch']):,.0f}", "1")
    spread = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
    table.add_row("bound engine", f"{statistics.median(rates['bound engine']):,.0f}", spread)
    return table


class TorchSampler:
    """The same network in plain PyTorch, with the cache that its training code does not have.

    B rows, L positions, H query heads, K key-value heads, M cache positions, E head width.
    """

    def __init__(self, network: Decoder):
        self.network = network
        self.device = network.model.norm.weight.device

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], *, group: int, max_tokens: int, stops: list[int], seed: int) -> int:
        """Answers at temperature 1. Returns how many tokens were drawn."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        longest = int(lengths.max())
        shape = (len(prompts), CONFIG.num_key_value_heads, longest + max_tokens, CONFIG.head_dim)
        cache = [
            (torch.zeros(shape, device=self.device), torch.zeros(shape, device=self.device))
            for _ in self.network.model.layers
        ]
        tokens_BL = torch.zeros(len(prompts), longest, dtype=torch.long, device=self.device)
        for row, prompt in enumerate(prompts):
            tokens_BL[row, : len(prompt)] = torch.tensor(prompt)
        positions_BL = torch.arange(longest, device=self.device).expand(len(prompts), -1)
        hidden = self._forward(tokens_BL, positions_BL, cache, None)[torch.arange(len(prompts)), lengths - 1]
        # One prompt computed for the whole group.
        cache = [tuple(part.repeat_interleave(group, dim=0) for part in pair) for pair in cache]
        length_B = lengths.repeat_interleave(group)
        logits_BV = self.network.logits(hidden).repeat_interleave(group, dim=0)
        draws = torch.from_numpy(np.stack([uniform_draws(seed, row, max_tokens) for row in range(len(length_B))]))
        draws = draws.to(self.device)
        stops_V = torch.zeros(CONFIG.vocab_size, dtype=torch.bool, device=self.device)
        stops_V[stops] = True
        alive_B = torch.ones(len(length_B), dtype=torch.bool, device=self.device)
        drawn = 0
        for step in range(max_tokens):
            cumulative_BV = torch.softmax(logits_BV, dim=-1).cumsum(-1)
            next_B = (
                (cumulative_BV < draws[:, step, None] * cumulative_BV[:, -1:]).sum(-1).clamp(max=CONFIG.vocab_size - 1)
            )
            torch.log_softmax(logits_BV, dim=-1).gather(1, next_B[:, None])
            drawn += int(alive_B.sum())
            alive_B &= ~stops_V[next_B]
            living = int(alive_B.sum())
            if living == 0 or step + 1 == max_tokens:
                break
            if living <= len(alive_B) // 2:
                cache = [tuple(part[alive_B] for part in pair) for pair in cache]
                next_B, length_B, draws, alive_B = next_B[alive_B], length_B[alive_B], draws[alive_B], alive_B[alive_B]
            hidden = self._forward(next_B[:, None], length_B[:, None], cache, int(length_B.max()) + 1)
            logits_BV = self.network.logits(hidden[:, 0])
            length_B = length_B + 1
        return drawn

    def _forward(
        self, tokens_BL: Tensor, positions_BL: Tensor, cache: list[tuple[Tensor, ...]], reach: int | None
    ) -> Tensor:
        """Hidden states [B, L, D]; keys and values are written at their positions. reach None: a first prompt."""
        network = self.network
        x = network.model.embed_tokens(tokens_BL)
        cos, sin = rotary_tables(positions_BL, CONFIG.head_dim, CONFIG.rope_theta)
        rows = torch.arange(len(tokens_BL), device=self.device)[:, None]
        mask = None
        if reach is not None:
            mask = (torch.arange(reach, device=self.device) <= positions_BL)[:, None, None]
        for layer, (keys_BKME, values_BKME) in zip(network.model.layers, cache, strict=True):
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            shape = (*normed.shape[:2], -1, CONFIG.head_dim)
            q = rotate(attention.q_proj(normed).view(shape).transpose(1, 2), cos, sin)
            k = rotate(attention.k_proj(normed).view(shape).transpose(1, 2), cos, sin)
            v = attention.v_proj(normed).view(shape).transpose(1, 2)
            keys_BKME[rows, :, positions_BL] = k.transpose(1, 2)
            values_BKME[rows, :, positions_BL] = v.transpose(1, 2)
            if reach is not None:
                k, v = keys_BKME[:, :, :reach], values_BKME[:, :, :reach]
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
            x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return network.model.norm(x)


if __name__ == "__main__":
    main()
