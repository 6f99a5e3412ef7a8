"""The packed token tree: packing and sharing a prompt change nothing but the time."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from twinloop.common.errors import UserError
from twinloop.training.packing import cut, pack
from twinloop.training.tree import (
    Segment,
    Tree,
    attention_plan,
    collate,
    document,
    example,
    group,
    pair,
    scored_logprobs,
)

STOP = 5


def alone(model, tokens):
    """Log-probabilities of tokens[1:] in one plain causal pass, without packing, trees or masks."""
    row = torch.tensor([tokens])
    logits = model.logits(model.hidden(row, torch.arange(len(tokens))[None]))[0, :-1]
    return logits.log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]


def logprobs_by_sequence(model, batch):
    return scored_logprobs(model, batch).split(batch.length_S.tolist())


def test_packed_documents_score_as_each_alone(tiny, texts):
    runs = [texts.run(5, 30) for _ in range(12)]
    packing = pack([document(run) for run in runs], 64)
    batch = collate(packing.rows, 64)
    order = [tree.segments[0].tokens.tolist() for row in packing.rows for tree in row]
    for tokens, logprobs in zip(order, logprobs_by_sequence(tiny, batch), strict=True):
        torch.testing.assert_close(logprobs, alone(tiny, tokens), atol=2e-6, rtol=1e-5)


def test_packed_logits_equal_unpacked_logits(tiny, texts):
    first, second = texts.run(9, 9), texts.run(13, 13)
    batch = collate([(document(first), document(second))], 32)
    packed = tiny.logits(tiny.hidden(batch.tokens_BL, batch.positions_BL, attention_plan(batch)))[0]
    for tokens, logits in ((first, packed[:9]), (second, packed[9:22])):
        unpacked = tiny.logits(tiny.hidden(torch.tensor([tokens]), torch.arange(len(tokens))[None]))[0]
        torch.testing.assert_close(logits, unpacked, atol=2e-6, rtol=1e-5)


def test_group_scores_as_its_separate_sequences(tiny, texts):
    prompt, completions = texts.run(7, 7), [texts.run(3, 9) for _ in range(4)]
    logprobs = [[0.0] * len(tokens) for tokens in completions]
    tree = group(prompt, completions, advantages=[0.0] * 4, old_logprobs=logprobs)
    batch = collate([(document(texts.run(6, 6)), tree)], 64)
    _, *shared = logprobs_by_sequence(tiny, batch)
    for tokens, logprobs_of_child in zip(completions, shared, strict=True):
        separate = alone(tiny, prompt + tokens)[len(prompt) - 1 :]
        torch.testing.assert_close(logprobs_of_child, separate, atol=2e-6, rtol=1e-5)


def test_deep_tree_scores_as_its_separate_paths(tiny, texts):
    """Two turns: a prompt, two answers, and below the first answer two more."""
    root, left, right = texts.run(5, 5), texts.run(4, 4), texts.run(3, 3)
    deep = [texts.run(2, 2), texts.run(6, 6)]

    def scored(tokens, parent):
        return Segment(np.array(tokens, np.int32), np.ones(len(tokens), np.float32), parent)

    unscored = Segment(np.array(root, np.int32), np.zeros(5, np.float32))
    tree = Tree((unscored, scored(left, 0), scored(deep[0], 1), scored(deep[1], 1), scored(right, 0)))
    found = logprobs_by_sequence(tiny, collate([(tree,)], 24))
    paths = [root + left, root + left + deep[0], root + left + deep[1], root + right]
    for path, logprobs in zip(paths, found, strict=True):
        torch.testing.assert_close(logprobs, alone(tiny, path)[-len(logprobs) :], atol=2e-6, rtol=1e-5)


def test_tree_has_the_gradient_of_its_separate_sequences(tiny, texts):
    prompt, chosen, rejected = texts.run(6, 6), texts.run(5, 5), texts.run(4, 4)
    scored_logprobs(tiny, collate([(pair(prompt, chosen, rejected),)], 32)).sum().backward()
    shared = [parameter.grad.clone() for parameter in tiny.parameters()]
    tiny.zero_grad()
    (alone(tiny, prompt + chosen)[5:].sum() + alone(tiny, prompt + rejected)[5:].sum()).backward()
    for gradient, parameter in zip(shared, tiny.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=2e-5, rtol=1e-4)


def test_both_first_answer_tokens_are_predicted_from_the_prompts_last_state():
    batch = collate([(pair([10, 11, 12], [20, STOP], [30, STOP]),)], 8)
    assert batch.predict_from_N.tolist() == [2, 3, 2, 5]
    assert batch.target_N.tolist() == [20, STOP, 30, STOP]
    assert batch.positions_BL[0, :7].tolist() == [0, 1, 2, 3, 4, 3, 4]


def test_answer_alone_is_scored_and_its_stop_token_too():
    batch = collate([(example([10, 11, 12], [20, 21, STOP]),)], 8)
    assert batch.target_N.tolist() == [20, 21, STOP]
    assert batch.weight_N.tolist() == [1.0, 1.0, 1.0]
    assert batch.predict_from_N.tolist() == [2, 3, 4]


def test_answer_without_tokens_is_refused_with_one_line():
    with pytest.raises(UserError, match="its answer holds no tokens"):
        example([10, 11], [])
    with pytest.raises(UserError, match="its rejected holds no tokens"):
        pair([10, 11], [12], [])


def test_every_token_of_a_long_document_is_scored_exactly_once():
    tokens = list(range(100))
    pieces = cut([document(tokens)], 16)
    assert all(piece.length <= 16 for piece in pieces)
    batch = collate([(piece,) for piece in pieces], 16)
    assert batch.target_N.tolist() == tokens[1:]
    sources = batch.tokens_BL.flatten()[batch.predict_from_N]
    assert sources.tolist() == tokens[:-1]


@pytest.mark.parametrize("length", [15, 16, 17, 30, 31, 32, 46])
def test_a_cut_loses_nothing_at_any_length(length):
    batch = collate([(piece,) for piece in cut([document(range(length))], 16)], 16)
    assert batch.target_N.tolist() == list(range(1, length))


def test_an_example_longer_than_a_row_is_refused_not_truncated():
    with pytest.raises(UserError, match="example 1: 20 tokens do not fit a row of 16"):
        pack([example([1, 2], [3]), example([1] * 10, [2] * 10)], 16)


def test_packing_is_dense_deterministic_and_complete(texts):
    trees = texts.documents(400, low=5, high=60)
    packing = pack(trees, 128)
    assert packing.fill > 0.95
    assert packing.rows == pack(trees, 128).rows
    assert sorted(id(tree) for row in packing.rows for tree in row) == sorted(id(tree) for tree in trees)
    assert all(sum(tree.length for tree in row) <= 128 for row in packing.rows)


def test_padding_makes_no_nan(tiny, texts):
    batch = collate([(document(texts.run(5, 5)),), ()], 32)
    logprobs = scored_logprobs(tiny, batch)
    logprobs.sum().backward()
    assert torch.isfinite(logprobs).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in tiny.parameters())


def test_projection_in_chunks_equals_the_whole(tiny, texts):
    batch = collate(pack(texts.documents(10), 64).rows, 64)
    whole = scored_logprobs(tiny, batch)
    whole.sum().backward()
    gradients = [parameter.grad.clone() for parameter in tiny.parameters()]
    tiny.zero_grad()
    pieces = scored_logprobs(tiny, batch, chunk=7)
    pieces.sum().backward()
    torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=1e-6)
    for gradient, parameter in zip(gradients, tiny.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-5)


def test_logprobs_at_a_temperature_are_those_of_the_sharpened_distribution(tiny):
    row = example([10, 11], [20, STOP])
    logits = tiny.logits(tiny.hidden(torch.tensor([[10, 11, 20]]), torch.arange(3)[None]))[0, 1:]
    expected = (logits / 0.7).log_softmax(-1)[torch.arange(2), torch.tensor([20, STOP])]
    torch.testing.assert_close(scored_logprobs(tiny, collate([(row,)], 8, temperature=0.7)), expected)


def test_rows_for_a_gpu_hold_the_same_tokens_and_see_the_same(tiny, texts):
    rows = pack([*texts.documents(6), *texts.pairs(5)], 48).rows
    batch = collate(rows, 48)
    laid_out = batch.in_rows()
    count, length = laid_out.tokens_BL.shape
    assert (count & (count - 1), length) == (0, 48)
    order = torch.arange(length)
    until = laid_out.visible_until_BL[:, None, :]
    seen_BLL = (order <= order[:, None]) & (order[:, None] < until)
    assert seen_BLL.diagonal(dim1=1, dim2=2).all()

    class Masked:
        def attend(self, q, k, v, scores):
            mask = seen_BLL[:, None]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scores.scale, enable_gqa=True)

    hidden_ND = tiny.hidden(laid_out.tokens_BL, laid_out.positions_BL, Masked()).flatten(0, 1)[laid_out.predict_from_N]
    found = tiny.logits(hidden_ND).log_softmax(-1).gather(1, laid_out.target_N[:, None])[:, 0]
    torch.testing.assert_close(found, scored_logprobs(tiny, batch), atol=5e-6, rtol=1e-5)
