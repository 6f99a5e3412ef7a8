"""The stream of batches: everything once an epoch, and a position that survives."""

import pytest

from twinloop.common.errors import UserError
from twinloop.training.stream import BatchStream
from twinloop.training.tree import document, example


def targets(step):
    return [batch.target_N.tolist() for batch in step.micro_batches]


def stream_of(trees, **kwargs):
    return BatchStream(trees, seq_len=64, batch_size=4, seed=1, **kwargs)


def test_every_tree_comes_once_an_epoch_and_the_last_partial_batch_is_not_dropped(texts):
    trees = texts.documents(56)
    stream = stream_of(trees, epochs=2)
    assert len(stream.packing.rows) % 4, "the last batch must be a partial one for this test to mean anything"
    scored = sum(tree.num_scored for tree in trees)
    for _ in range(2):
        steps = [stream.next() for _ in range(stream.steps_per_epoch)]
        assert sum(len(batch.target_N) for step in steps for batch in step.micro_batches) == scored


def test_epochs_differ_in_order_and_seeds_decide_it(texts):
    trees = texts.documents(56)
    stream, twin = stream_of(trees, epochs=2), stream_of(trees, epochs=2)
    steps = [targets(stream.next()) for _ in range(stream.total_steps)]
    assert steps == [targets(twin.next()) for _ in range(twin.total_steps)]
    half = stream.steps_per_epoch
    assert steps[:half] != steps[half:]


def test_restored_at_any_step_the_stream_goes_on_also_at_an_epochs_edge(texts):
    trees = texts.documents(56)
    stream = stream_of(trees, steps=11)
    assert 0 < stream.steps_per_epoch < 10
    states, steps = [stream.state()], []
    for _ in range(11):
        steps.append(targets(stream.next()))
        states.append(stream.state())
    for position, state in enumerate(states):
        resumed = stream_of(trees, steps=11)
        resumed.restore(state)
        assert [targets(resumed.next()) for _ in range(position, 11)] == steps[position:]


def test_an_example_that_does_not_fit_is_named_by_its_place_in_the_data(texts):
    trees = texts.documents(56)
    for place in (0, 17, 56):
        broken = [*trees[:place], example([7] * 40, [8] * 40), *trees[place:]]
        with pytest.raises(UserError, match=f"training example {place}: 80 tokens do not fit a row of 64"):
            stream_of(broken, epochs=1)


def test_documents_longer_than_a_row_are_trained_whole(texts):
    trees = [document(texts.run(200, 200)), *texts.documents(20)]
    stream = stream_of(trees, epochs=1)
    scored = sum(len(b.target_N) for _ in range(stream.total_steps) for b in stream.next().micro_batches)
    assert scored == sum(tree.num_scored for tree in trees)


def test_tokens_are_those_that_are_trained_on_not_places_in_rows(texts):
    """Trees of 40 leave a third of each row of 64 empty."""
    trees = [example([7] * 30, [8] * 10) for _ in range(50)]
    stream = stream_of(trees, tokens=5000)
    seen = sum(batch.num_tokens for _ in range(stream.total_steps) for batch in stream.next().micro_batches)
    assert seen == pytest.approx(5000, abs=4 * 64)


def test_no_examples_is_the_users_mistake():
    with pytest.raises(UserError, match="no examples are left"):
        stream_of([], epochs=1)
