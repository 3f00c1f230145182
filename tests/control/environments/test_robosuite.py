"""robosuite: what is asked of a user who has it not; the real thing where it is installed."""

import sys

import numpy as np
import pytest

from holdfast.control.environments import EnvironmentOptions, SimulatorError, make_environments


def test_without_it_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "robosuite", None)
    with pytest.raises(SimulatorError, match=r"lift needs robosuite.*holdfast\[robosuite\]"):
        make_environments("robosuite/lift", 1)


def test_an_unknown_task_is_answered_by_the_nearest():
    with pytest.raises(SimulatorError, match="did you mean 'square'"):
        make_environments("robosuite/squar", 1)


def test_lift_repeats_itself():
    pytest.importorskip("robosuite")
    chunks = np.random.default_rng(0).uniform(-1, 1, (4, 1, 3, 7)).astype(np.float32)
    seen = []
    for _ in range(2):
        environments = make_environments(
            "robosuite/lift", 1, options=EnvironmentOptions(time_limit=50)
        )
        environments.reset([3])
        seen.append([environments.step(chunk).observations for chunk in chunks])
    np.testing.assert_array_equal(*seen)


@pytest.mark.parametrize("task", ["lift", "can"])
def test_a_loaded_state_goes_on_bit_for_bit(task):
    pytest.importorskip("robosuite")
    options = EnvironmentOptions(time_limit=14, history=2)
    first, second = (make_environments(f"robosuite/{task}", 2, options=options) for _ in range(2))
    draw = np.random.default_rng(0)
    first.reset(0)
    for chunk in draw.uniform(-1, 1, (7, 2, 3, 7)).astype(np.float32):
        first.step(chunk)  # into the second episode
    second.load_state_dict(first.state_dict())
    for chunk in draw.uniform(-1, 1, (7, 2, 3, 7)).astype(np.float32):
        one, other = first.step(chunk), second.step(chunk)
        np.testing.assert_array_equal(one.final_observations, other.final_observations)
        np.testing.assert_array_equal(one.observations, other.observations)
        np.testing.assert_array_equal(one.rewards, other.rewards)
