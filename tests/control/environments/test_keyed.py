"""Random numbers by key: the published generator, and no dependence on what stands beside."""

import numpy as np
import pytest
from scipy import stats

from holdfast.control.environments.keyed import (
    _STEP,
    _mixed,
    episode_seeds,
    keyed_normal,
    keyed_uniform,
    training_seed,
)


def test_the_mixer_is_splitmix64():
    """The first outputs of SplitMix64 from 1234567, as they are published for comparison."""
    states = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * _STEP
    assert _mixed(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_a_row_does_not_depend_on_the_rows_beside_it():
    keys = np.array([[3, 1], [4, 1], [-1, 5]])
    whole = keyed_uniform(keys, 4)
    for key, row in zip(keys, whole, strict=True):
        np.testing.assert_array_equal(keyed_uniform([key], 4)[0], row)
    np.testing.assert_array_equal(keyed_uniform(keys, 2), whole[:, :2])


def test_neighbouring_keys_draw_independent_numbers():
    drawn = keyed_uniform(np.stack([np.arange(4000) // 40, np.arange(4000) % 40], axis=1), 2)
    assert ((drawn > 0) & (drawn < 1)).all()
    assert stats.kstest(drawn.ravel(), "uniform").pvalue > 0.01
    assert abs(np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1]) < 0.05
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.05


def test_normal_numbers_are_normal():
    drawn = keyed_normal(np.arange(3000)[:, None], 2)
    assert stats.kstest(drawn.ravel(), "norm").pvalue > 0.01


def test_training_evaluation_and_recording_never_share_episodes():
    evaluation = set(episode_seeds(0, 200, stream="evaluation"))
    recording = set(episode_seeds(0, 200, stream="recording"))
    training = {training_seed(0, slot, number) for slot in range(4) for number in range(50)}
    assert len(evaluation | recording | training) == 600
    assert all(0 <= seed < 2**31 for seed in evaluation | recording | training)


@pytest.mark.parametrize("stream", ["evaluation", "recording"])
def test_more_episodes_begin_with_the_same(stream):
    assert episode_seeds(7, 9, stream=stream)[:4] == episode_seeds(7, 4, stream=stream)
    assert episode_seeds(7, 0, stream=stream) == []
