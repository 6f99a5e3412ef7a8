"""A window reaches back along a token's own path, wherever its parents lie in the row."""

import numpy as np
import pytest
import torch
from small import TINY
from torch.nn.attention.flex_attention import flex_attention

from twinloop.models import attention
from twinloop.training.tree import Segment, Tree, attention_plan, collate, document, scored_logprobs
from twinloop.training.weights import new_decoder

SEES_ALL = TINY.model_copy(update={"num_hidden_layers": 3})
WINDOWED = SEES_ALL.model_copy(update={"windows": (5, None, 7), "rotary_layers": (True, False, True)})
CAPPED = WINDOWED.model_copy(update={"attention_softcap": 0.5})


def scored(tokens, parent):
    return Segment(np.array(tokens, np.int32), np.ones(len(tokens), np.float32), parent)


def alone(model, tokens):
    row = torch.tensor([tokens])
    logits = model.logits(model.hidden(row, torch.arange(len(tokens))[None]))[0, :-1]
    return logits.log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]


@pytest.mark.parametrize("config", [WINDOWED, CAPPED], ids=["windows", "windows, capped scores"])
def test_a_tree_scores_as_its_separate_paths(config, texts):
    """Two turns: the first answer and its continuations lie between the prompt and the second answer."""
    model = new_decoder(config, seed=0)
    root, left, right = texts.run(6, 6), texts.run(9, 9), texts.run(8, 8)
    deep = [texts.run(4, 4), texts.run(6, 6)]
    unscored = Segment(np.array(root, np.int32), np.zeros(len(root), np.float32))
    tree = Tree((unscored, scored(left, 0), scored(deep[0], 1), scored(deep[1], 1), scored(right, 0)))
    batch = collate([(document(texts.run(9, 9)), tree)], 64)
    _, *found = scored_logprobs(model, batch).split(batch.length_S.tolist())
    paths = [root + left, root + left + deep[0], root + left + deep[1], root + right]
    for path, logprobs in zip(paths, found, strict=True):
        torch.testing.assert_close(logprobs, alone(model, path)[-len(logprobs) :], atol=2e-6, rtol=1e-5)


def test_cudas_blocks_show_what_the_cpus_paths_show(texts, monkeypatch):
    """FlexAttention as CUDA uses it, here not compiled."""
    monkeypatch.setattr(attention, "_flex_attention", lambda: flex_attention)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    model = new_decoder(CAPPED, seed=0)
    batch = collate([texts.pairs(2), texts.documents(2)], 96)
    blocks = attention.TreeBlocks(batch.visible_until_BL, batch.positions_BL)
    with torch.no_grad():
        hidden = [model.hidden(batch.tokens_BL, batch.positions_BL, plan) for plan in (blocks, attention_plan(batch))]
    torch.testing.assert_close(*hidden, atol=1e-5, rtol=1e-5)


def test_a_token_past_the_window_is_out_of_reach(texts):
    """Three layers of windows reach 5 + 5 + 7 - 3 positions back together, and no further."""
    model = new_decoder(SEES_ALL.model_copy(update={"windows": (5, 5, 7)}), seed=0)
    tokens = torch.tensor([texts.run(30, 30)])
    changed = tokens.clone()
    changed[0, 3] = (changed[0, 3] + 1) % TINY.vocab_size
    positions = torch.arange(30)[None]
    same = (model.hidden(tokens, positions) == model.hidden(changed, positions)).all(-1)[0].tolist()
    assert same == [index not in range(3, 3 + 15) for index in range(30)]
