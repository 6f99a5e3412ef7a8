"""The same contracts on a GPU: FlexAttention, bf16, the engine bound to a shadow of the weights."""

import onnxruntime
import pytest
import torch
from interrupted import run
from test_rollouts import stream_for

from twinloop.training.loop import run_training
from twinloop.training.objectives import GRPOLoss
from twinloop.training.packing import pack
from twinloop.training.scoring import Rows, tree_logprobs
from twinloop.training.settings import TrainSettings
from twinloop.training.tree import collate, scored_logprobs
from twinloop.training.weights import new_decoder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA = torch.device("cuda")


def test_block_mask_shows_what_the_boolean_mask_shows(tiny, texts):
    rows = pack([*texts.documents(9), *texts.pairs(9)], 128).rows
    batch = collate(rows, 128)
    with torch.no_grad():
        on_cpu = scored_logprobs(tiny, batch)
        on_cuda = scored_logprobs(tiny.to(CUDA), batch.to(CUDA))
    torch.testing.assert_close(on_cuda.cpu(), on_cpu, atol=2e-3, rtol=2e-3)


def test_windows_and_capped_scores_are_the_same_in_a_block_mask(tiny, texts):
    changes = {"windows": (7, None), "rotary_layers": (True, False), "attention_softcap": 2.0}
    model = new_decoder(tiny.config.model_copy(update=changes), seed=0)
    batch = collate(pack([*texts.documents(9), *texts.pairs(9)], 128).rows, 128)
    with torch.no_grad():
        on_cpu = scored_logprobs(model, batch)
        on_cuda = scored_logprobs(model.to(CUDA), batch.to(CUDA))
    torch.testing.assert_close(on_cuda.cpu(), on_cpu, atol=2e-3, rtol=2e-3)


def test_bf16_scores_are_near_float32s(tiny, texts):
    trees = texts.pairs(9)
    on_cpu = tree_logprobs(tiny, trees, Rows(128))
    on_cuda = tree_logprobs(new_decoder(tiny.config, seed=0), trees, Rows(128, device="cuda"))
    for one, other in zip(on_cpu, on_cuda, strict=True):
        assert abs(one - other).max() < 0.05


@pytest.mark.parametrize("stop_at", [3, 4])
def test_stopped_training_resumes_bit_for_bit(tmp_path, stop_at):
    def stop(report):
        if report.step == stop_at:
            raise KeyboardInterrupt

    whole, _ = run(tmp_path / "whole", 6, device="cuda")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", 6, on_step=stop, device="cuda")
    resumed, _ = run(tmp_path / "stopped", 6, device="cuda")
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="this onnxruntime has no CUDA"
)
def test_rollouts_follow_the_weights_through_their_shadow(tiny):
    with torch.no_grad():
        tiny.model.embed_tokens.weight *= 8
    reports = []
    stream = stream_for(tiny, steps=4, device="cuda")
    settings = TrainSettings(learning_rate=0.003, warmup_ratio=0.0, decay_ratio=0.0)
    run_training(tiny, GRPOLoss(), stream, settings, checkpoint_dir=None, on_step=reports.append, device="cuda")
    gaps = [report.metrics["logprob_gap"] for report in reports if "logprob_gap" in report.metrics]
    assert gaps
    assert max(gaps) < 0.05
