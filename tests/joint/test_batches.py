import json
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.joint.batches import Batches

shapes = st.fixed_dictionaries(
    {
        "count": st.integers(1, 40),
        "batch_size": st.integers(1, 12),
        "seed": st.integers(0, 5),
        "grouped": st.booleans(),
        "window": st.integers(1, 4),
    }
)


def make(count, batch_size, seed, grouped, window):
    # Lengths repeat, so that ties are common.
    length = (lambda row: row * 7 % 5) if grouped else None
    return Batches(range(count), batch_size, seed=seed, length=length, window=window)


@settings(deadline=None)
@given(shapes, st.integers(0, 30), st.integers(1, 30))
def test_a_restored_source_continues_with_the_same_batches(shape, before, after):
    original = make(**shape)
    for _ in range(before):
        original.next()
    restored = make(**shape)
    restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
    assert restored.epoch == original.epoch
    for _ in range(after):
        assert restored.next() == original.next()
        assert restored.state_dict() == original.state_dict()


@settings(deadline=None)
@given(shapes, st.integers(0, 20))
def test_state_can_be_loaded_into_a_source_that_has_moved_on(shape, extra):
    source = make(**shape)
    state = source.state_dict()
    first = [source.next() for _ in range(3)]
    for _ in range(extra):
        source.next()
    source.load_state_dict(state)
    assert [source.next() for _ in range(3)] == first


@settings(deadline=None)
@given(shapes)
def test_every_row_comes_once_an_epoch_and_batches_are_full(shape):
    source = make(**shape)
    epochs, count = 3, shape["count"]
    stream = []
    while len(stream) < epochs * count:
        batch = source.next()
        assert len(batch) == shape["batch_size"]
        stream += batch
        assert (source.epoch, source.position) == divmod(len(stream), count)
    for epoch in range(epochs):
        assert Counter(stream[epoch * count : (epoch + 1) * count]) == Counter(range(count))


def test_epochs_and_seeds_differ_in_their_order():
    source = Batches(range(50), 50, seed=1)
    first, second = source.next(), source.next()
    other = Batches(range(50), 50, seed=2).next()
    assert sorted(first) == sorted(second) == sorted(other)
    assert len({tuple(first), tuple(second), tuple(other), tuple(range(50))}) == 4


def test_an_epochs_order_depends_on_seed_and_epoch_alone():
    walked, jumped = Batches(range(30), 3, seed=4), Batches(range(30), 3, seed=4)
    for _ in range(20):
        walked.next()
    jumped.load_state_dict({"epoch": 2, "position": 0})
    assert walked.epoch == 2
    assert [walked.next() for _ in range(10)] == [jumped.next() for _ in range(10)]


@pytest.mark.parametrize("count", [64, 61])
def test_grouping_by_length_gives_batches_of_neighbouring_lengths_in_every_epoch(count):
    # One window holds all rows: batches partition the sorted lengths, except the one batch an
    # epoch that crosses its end.
    source = Batches(range(count), 4, seed=0, length=lambda row: row, window=32)
    loose = 0
    for _ in range(3 * count // 4):
        batch = source.next()
        loose += any(b - a > 4 for a, b in pairwise(sorted(batch)))
    assert loose <= (0 if count % 4 == 0 else 3)


def test_order_of_grouped_batches_is_shuffled():
    source = Batches(range(64), 4, seed=0, length=lambda row: row)
    shortest = [min(source.next()) for _ in range(16)]
    assert sorted(shortest) == list(range(0, 64, 4))
    assert shortest != sorted(shortest)


def test_grouping_stays_within_a_window():
    rows = range(40)
    plain = Batches(rows, 2, seed=3)
    grouped = Batches(rows, 2, seed=3, length=lambda row: row, window=1)
    as_sets = {frozenset(plain.next()) for _ in range(20)}
    assert {frozenset(grouped.next()) for _ in range(20)} == as_sets


def test_a_batch_larger_than_the_rows_spans_several_epochs():
    source = Batches("abc", 7, seed=0)
    batch = source.next()
    assert Counter(batch[:3]) == Counter(batch[3:6]) == Counter("abc")
    assert source.state_dict() == {"epoch": 2, "position": 1}


def test_global_random_state_is_left_alone():
    import random

    random.seed(0)
    expected = random.random()
    random.seed(0)
    Batches(range(9), 2, seed=0, length=lambda row: row).next()
    assert random.random() == expected


@pytest.mark.parametrize(
    ("rows", "batch_size", "window", "named"),
    [([], 1, 1, "rows"), ([1], 0, 1, "batch_size"), ([1], 1, 0, "window")],
)
def test_impossible_arguments_are_named(rows, batch_size, window, named):
    with pytest.raises(ValueError, match=f"^{named} is"):
        Batches(rows, batch_size, seed=0, window=window)


@pytest.mark.parametrize("state", [{"epoch": 0, "position": 3}, {"epoch": -1, "position": 0}])
def test_a_state_of_other_data_is_refused(state):
    with pytest.raises(ValueError, match="has 3 rows"):
        Batches("abc", 1, seed=0).load_state_dict(state)
