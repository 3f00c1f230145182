"""Rows to clone from, against their definition written out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.control.demonstrations import Chunks, Demonstrations, Episode, stack
from holdfast.joint.batches import Batches


def demonstrations(lengths, extra=0):
    draw = np.random.default_rng(0)
    return Demonstrations(
        tuple(
            Episode(
                observations=draw.normal(size=(steps + extra, 3)).astype(np.float32),
                actions=draw.normal(size=(steps, 2)).astype(np.float32),
                rewards=np.zeros(steps, dtype=np.float32),
                terminated=True,
                truncated=False,
            )
            for steps in lengths
        ),
        "here",
    )


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    extra=st.integers(0, 1),
    history=st.integers(1, 3),
    horizon=st.integers(1, 5),
)
def test_a_row_is_what_was_seen_and_what_was_done_next(lengths, extra, history, horizon):
    given_ = demonstrations(lengths, extra)
    rows = Chunks(given_, history=history, horizon=horizon)
    assert len(rows) == sum(lengths)
    number = 0
    for episode in given_:
        for step in range(len(episode)):
            row = rows[number]
            number += 1
            for back in range(history):
                expected = episode.observations[max(step - back, 0)]
                np.testing.assert_array_equal(row.observations[-1 - back], expected)
            for ahead in range(horizon):
                inside = step + ahead < len(episode)
                expected = episode.actions[min(step + ahead, len(episode) - 1)]
                np.testing.assert_array_equal(row.actions[ahead], expected)
                assert row.mask[ahead] == inside


def test_gathering_is_stacking():
    rows = Chunks(demonstrations([4, 1, 6]), history=2, horizon=3)
    indices = torch.tensor([0, 10, 4, 4, 7])
    for one, other in zip(
        rows.gather(indices), stack([rows[i] for i in indices.tolist()]), strict=True
    ):
        assert torch.equal(one, other)


def test_rows_serve_the_engines_batches():
    rows = Chunks(demonstrations([4, 3]), horizon=2)
    batch = stack(Batches(rows, 5, seed=0).next())
    assert batch.actions.shape == (5, 2, 2) and batch.mask.shape == (5, 2)
    assert len(rows[2:5]) == 3 and torch.equal(rows[-1].actions, rows[6].actions)
    with pytest.raises(IndexError):
        rows[7]


@pytest.mark.parametrize("options", [{"history": 0}, {"horizon": 0}])
def test_windows_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="at least 1"):
        Chunks(demonstrations([2]), **options)


@settings(max_examples=20, deadline=None)
@given(count=st.integers(2, 12), share=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_a_split_is_by_whole_episodes_and_loses_none(count, share, seed):
    whole = demonstrations(range(1, count + 1))
    train, held_out = whole.split(share, seed=seed)
    assert len(train) >= 1 and len(held_out) >= 1
    lengths = sorted(len(episode) for part in (train, held_out) for episode in part)
    assert lengths == list(range(1, count + 1))
    assert abs(len(held_out) - share * count) <= 1
    again = whole.split(share, seed=seed)[1]
    assert [len(e) for e in again] == [len(e) for e in held_out]


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="held_out is 1.0"):
        demonstrations([1, 2]).split(1.0, seed=0)
    with pytest.raises(ValueError, match="one episode cannot be split"):
        demonstrations([1]).split(0.5, seed=0)
