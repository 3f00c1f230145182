"""Fetch: a dictionary of observations made flat, and an expert that picks and places."""

import numpy as np
import pytest

pytest.importorskip("gymnasium_robotics")

from holdfast.control.environments import (
    EnvironmentOptions,
    evaluate,
    make_environments,
    scripted_expert,
)

NAME = "FetchPickAndPlace-v4"


def test_the_expert_succeeds():
    environments = make_environments(NAME, 2, options=EnvironmentOptions(sparse=True))
    found = evaluate(scripted_expert(NAME), environments, 20)
    assert found.success_rate >= 0.95
    assert found.mean_length < 30


def test_a_loaded_state_goes_on_bit_for_bit():
    chunks = np.random.default_rng(1).uniform(-1, 1, (12, 2, 3, 4)).astype(np.float32)
    first, second = (make_environments(NAME, 2) for _ in range(2))
    first.reset(0)
    for chunk in chunks[:6]:
        first.step(chunk)
    second.load_state_dict(first.state_dict())
    for chunk in chunks[6:]:
        np.testing.assert_array_equal(
            first.step(chunk).observations, second.step(chunk).observations
        )
