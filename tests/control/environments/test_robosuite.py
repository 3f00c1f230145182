"""robosuite: what is asked of a user who has it not; the real thing where it is installed."""

import sys

import numpy as np
import pytest

from holdfast.control.environments import EnvironmentOptions, SimulatorError, make_environments


def test_without_it_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "robosuite", None)
    with pytest.raises(SimulatorError, match=r"robosuite/lift needs robosuite.*numpy<2"):
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
