"""Log-probabilities under a frozen network: each tree gets its own, however many there are."""

import pytest
import torch

from twinloop.training.packing import pack
from twinloop.training.scoring import ROWS_AT_ONCE, Rows, attach_reference, tree_logprobs
from twinloop.training.tree import collate, scored_logprobs

ROW_LENGTH = 32


@pytest.fixture
def pairs(texts):
    """Enough for several batches of rows, the last one partial."""
    pairs = texts.pairs(61)
    rows = len(pack(pairs, ROW_LENGTH).rows)
    assert rows > 2 * ROWS_AT_ONCE
    assert rows % ROWS_AT_ONCE
    return pairs


def test_each_of_many_trees_gets_what_it_scores_alone(tiny, pairs):
    found = tree_logprobs(tiny, pairs, Rows(ROW_LENGTH))
    assert len(found) == len(pairs)
    for tree, logprobs in zip(pairs, found, strict=True):
        alone = scored_logprobs(tiny, collate([(tree,)], ROW_LENGTH))
        torch.testing.assert_close(torch.from_numpy(logprobs), alone.detach(), atol=5e-6, rtol=1e-5)


def test_the_reference_cache_loses_no_tree_of_the_last_batch(tiny, pairs):
    for before, tree in zip(pairs, attach_reference(tiny, pairs, Rows(ROW_LENGTH)), strict=True):
        batch = collate([(tree,)], ROW_LENGTH)
        assert [len(s.reference_logprobs) for s in tree.segments] == [s.num_scored for s in before.segments]
        torch.testing.assert_close(batch.reference_logprobs_N, scored_logprobs(tiny, batch), atol=5e-6, rtol=1e-5)


def test_scoring_does_not_depend_on_the_order_of_the_trees(tiny, pairs):
    forwards = tree_logprobs(tiny, pairs, Rows(ROW_LENGTH))
    backwards = tree_logprobs(tiny, pairs[::-1], Rows(ROW_LENGTH))[::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
