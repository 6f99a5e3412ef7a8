"""Distillation: the loss by its formula, what it leaves alone, and where it leads."""

import math

import pytest
import torch
from small import TINY, padded

from twinloop.training.distillation import DistilLoss, attach_teacher
from twinloop.training.loop import run_training
from twinloop.training.packing import pack
from twinloop.training.settings import TrainSettings
from twinloop.training.stream import BatchStream
from twinloop.training.tree import collate, scored_hidden
from twinloop.training.weights import new_decoder

LENGTH = 64


@pytest.fixture
def teacher():
    """With opinions: an untrained network's are almost those of any other."""
    model = new_decoder(TINY.model_copy(update={"num_hidden_layers": 1}), seed=5)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 30
    return model


def attach(teacher, examples, *, top_k=8, temperature=1.0):
    return attach_teacher(teacher, examples, top_k=top_k, temperature=temperature, vocab_size=64, seq_len=LENGTH)


def taught(teacher, texts, count=24, **settings):
    return attach(teacher, texts.examples(count), **settings)


def one_batch(trees):
    return collate(pack(trees, LENGTH).rows, LENGTH)


def logprobs(model, batch, temperature):
    return (model.logits(scored_hidden(model, batch)).double() / temperature).log_softmax(-1)


def test_by_hand():
    """Four tokens, of which the teacher's two likeliest have 1/2 and 1/4; the student is uniform."""
    teacher_NK = torch.tensor([[0.5, 0.25, 0.25]]).log()
    found = DistilLoss(vocab_size=64).of_logits(torch.zeros(1, 4), torch.tensor([[2, 0]]), teacher_NK)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    assert found.tolist() == pytest.approx([expected], abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [1, 8, 63])
def test_the_rest_of_the_vocabulary_is_one_class(tiny, teacher, texts, top_k, temperature):
    batch = one_batch(taught(teacher, texts, top_k=top_k, temperature=temperature))
    p, q = (logprobs(model, batch, temperature).exp() for model in (teacher, tiny))
    top = p.topk(top_k).indices
    p, q = (torch.cat([each.gather(1, top), 1 - each.gather(1, top).sum(1, keepdim=True)], 1) for each in (p, q))
    expected = temperature**2 * (p * (p.log() - q.log())).sum(1).mean()
    loss, _ = DistilLoss(vocab_size=64, temperature=temperature).loss(tiny, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_with_the_whole_vocabulary_it_is_the_divergence_itself(tiny, teacher, texts, temperature):
    examples = texts.examples(24)
    batch = one_batch(attach(teacher, examples, top_k=1000, temperature=temperature))
    assert batch.teacher_ids_NK.shape == batch.teacher_logprobs_NK.shape == (len(batch.target_N), 64)
    p, q = (logprobs(model, batch, temperature) for model in (teacher, tiny))
    expected = temperature**2 * torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    loss, _ = DistilLoss(vocab_size=64, temperature=temperature).loss(tiny, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    some = one_batch(attach(teacher, examples, top_k=8, temperature=temperature))
    fewer, _ = DistilLoss(vocab_size=64, temperature=temperature).loss(tiny, some)
    assert 0 < fewer < loss, "fewer classes bound the divergence from below"


@pytest.mark.parametrize("top_k", [4, 64])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(teacher, texts, top_k):
    loss, _ = DistilLoss(vocab_size=64, temperature=2.0).loss(
        teacher, one_batch(taught(teacher, texts, top_k=top_k, temperature=2.0))
    )
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    for parameter in teacher.parameters():
        torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter), atol=2e-6, rtol=0)


def test_kept_are_the_likeliest_tokens_of_every_tree_in_six_bytes_each(teacher, texts):
    for tree in taught(teacher, texts, 61):
        (segment,) = tree.segments
        batch = collate([(tree,)], LENGTH)
        expected = logprobs(teacher, batch, 1.0).topk(8)
        assert segment.teacher["ids"].tolist() == expected.indices.tolist()
        kept = torch.from_numpy(segment.teacher["logprobs"].copy())
        torch.testing.assert_close(kept[:, :8], expected.values.float(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(kept.exp().sum(1), torch.ones(len(kept)))
        assert segment.teacher.nbytes == segment.num_scored * (8 * (2 + 4) + 4)


def train(student, trees, checkpoint_dir=None, on_step=None):
    stream = BatchStream(trees, seq_len=LENGTH, batch_size=2, seed=1, epochs=25)
    settings = TrainSettings(learning_rate=0.01)
    return run_training(
        student,
        DistilLoss(vocab_size=64),
        stream,
        settings,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every_s=0.0,
        on_step=on_step,
    )


def test_a_student_moves_towards_its_teacher(teacher, texts):
    trees, student = taught(teacher, texts), new_decoder(TINY, seed=0)
    batch = one_batch(trees)
    before, _ = DistilLoss(vocab_size=64).loss(student, batch)
    result = train(student, trees)
    after, _ = DistilLoss(vocab_size=64).loss(student, batch)
    assert after < 0.5 * before
    assert result.loss < result.initial_loss
    agree = [logprobs(model, batch, 1.0).argmax(1) for model in (student, teacher)]
    assert (agree[0] == agree[1]).float().mean() > 0.5


def test_stopped_and_resumed_it_ends_bit_for_bit_alike(teacher, texts, tmp_path):
    class StoppedError(Exception):
        pass

    def stop(report):
        if report.step == 7:
            raise StoppedError

    examples = texts.examples(24)

    def trees():  # as a new process makes them
        return attach(teacher, examples)

    whole, stopped = new_decoder(TINY, seed=0), new_decoder(TINY, seed=0)
    train(whole, trees())
    with pytest.raises(StoppedError):
        train(stopped, trees(), tmp_path, stop)
    resumed = new_decoder(TINY, seed=3)
    assert train(resumed, trees(), tmp_path).resumed_from_step == 6
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("top_k", [8, 1000])
@pytest.mark.parametrize(("of_teacher", "of_student"), [(16, 0), (0, 16), (16, 32)])
def test_rows_that_no_token_has_are_in_neither_distribution(tiny, teacher, texts, of_teacher, of_student, top_k):
    examples = texts.examples(24)
    expected, _ = DistilLoss(vocab_size=64).loss(tiny, one_batch(attach(teacher, examples, top_k=top_k)))
    batch = one_batch(attach(padded(teacher, of_teacher), examples, top_k=top_k))
    student = padded(tiny, of_student)
    loss, _ = DistilLoss(vocab_size=64).loss(student, batch)
    assert batch.teacher_ids_NK.max() < 64
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert not student.model.embed_tokens.weight.grad[64:].any()
