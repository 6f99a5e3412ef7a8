"""Below a frozen projection, values and gradients come at once, in pieces, and are those of the plain computation."""

import subprocess
import sys

import pytest
import torch

from twinloop.models.adapter_form import AdapterForm
from twinloop.models.chunks import LOGIT_CHUNK, logit_chunk
from twinloop.training.adapters import attach_adapter, trained_tensors
from twinloop.training.objectives import CausalLMLoss
from twinloop.training.packing import pack
from twinloop.training.tree import attention_plan, collate, scored_logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_gradients_of_the_adapter_are_those_of_the_plain_loss(tiny, texts, chunk, temperature):
    attach_adapter(tiny, AdapterForm(3, 6.0), seed=0)
    with torch.no_grad():
        for tensor in trained_tensors(tiny).values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    batch = collate(pack(texts.examples(9), 64).rows, 64, temperature=temperature)

    def gradients(logprobs):
        loss, _ = CausalLMLoss().of_logprobs(logprobs, batch)
        loss.backward()
        found = {name: tensor.grad.clone() for name, tensor in trained_tensors(tiny).items()}
        tiny.zero_grad()
        return loss.detach(), found

    loss, ours = gradients(scored_logprobs(tiny, batch, chunk=chunk))
    tiny.model.embed_tokens.requires_grad_(True)
    hidden = tiny.hidden(batch.tokens_BL, batch.positions_BL, attention_plan(batch)).flatten(0, 1)[batch.predict_from_N]
    logprobs = (tiny.logits(hidden) / temperature).log_softmax(-1).gather(1, batch.target_N[:, None])[:, 0]
    expected, plain = gradients(logprobs)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-4, msg=name)


def test_without_gradients_nothing_is_kept(tiny, texts):
    attach_adapter(tiny, AdapterForm(3, 6.0), seed=0)
    batch = collate(pack(texts.examples(9), 64).rows, 64)
    with torch.no_grad():
        values = scored_logprobs(tiny, batch, chunk=5)
    assert not values.requires_grad
    torch.testing.assert_close(values, scored_logprobs(tiny, batch).detach(), atol=1e-6, rtol=1e-5)


def test_a_large_vocabulary_has_fewer_positions_at_once():
    assert logit_chunk(512) == LOGIT_CHUNK
    assert logit_chunk(49152) * 49152 * 4 <= 64 * 2**20
    assert logit_chunk(2**30) == 1


STEP = """
from pathlib import Path
import sys
import numpy as np, torch
from twinloop.common.memory import peak_bytes
from twinloop.models.adapter_form import AdapterForm
from twinloop.models.config import DecoderConfig
from twinloop.training.adapters import attach_adapter
from twinloop.training.loop import run_training
from twinloop.training.objectives import CausalLMLoss
from twinloop.training.settings import TrainSettings
from twinloop.training.stream import BatchStream
from twinloop.training.tree import document
from twinloop.training.weights import load_decoder, get_weights, new_decoder
from twinloop.models.directory import save_model


folder = Path(sys.argv[2])
if sys.argv[1] == "make":
    config = DecoderConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=2048,
    )
    save_model(folder, config, get_weights(new_decoder(config, seed=0)))
else:
    torch.set_num_threads(1)
    model = load_decoder(folder)
    attach_adapter(model, AdapterForm(16, 16.0), seed=0)
    tokens = np.random.default_rng(0).integers(6, 49152, (2, 512)).tolist()
    stream = BatchStream(
        [document(each) for each in tokens], seq_len=512, batch_size=2, seed=0, steps=3, micro_batch_size=1
    )
    run_training(model, CausalLMLoss(), stream, TrainSettings(learning_rate=1e-4), checkpoint_dir=folder / "kept")
    print(peak_bytes())
"""


@pytest.mark.slow
def test_a_base_of_135m_trains_with_rank_16_in_two_and_a_half_gib(tmp_path):
    """The size of SmolLM2-135M, rows of 512 tokens, every position scored."""
    for what in ("make", "train"):
        run = subprocess.run(
            [sys.executable, "-c", STEP, what, tmp_path], capture_output=True, text=True, timeout=500, check=False
        )
        assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= 2.5 * 2**30
    assert next((tmp_path / "kept").glob("*.safetensors")).stat().st_size < 64 * 2**20
