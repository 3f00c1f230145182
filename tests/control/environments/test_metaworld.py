"""Meta-World: goals from seeds, ends at success, and limits that hold."""

import numpy as np
import pytest

pytest.importorskip("metaworld")

from holdfast.control.environments import (
    EnvironmentOptions,
    SimulatorError,
    evaluate,
    make_environments,
    scripted_expert,
)

NAME = "metaworld/push"


def make(count=1, **options):
    return make_environments(NAME, count, options=EnvironmentOptions(**options))


def test_goals_are_a_continuous_function_of_the_seed():
    environments = make(2)
    first = environments.reset([3, 4])[:, 0]
    again = environments.reset([4, 3])[:, 0]
    np.testing.assert_array_equal(first, again[::-1])
    goals = np.concatenate([environments.reset([s, s + 1])[:, 0, -3:] for s in range(0, 8, 2)])
    assert len(np.unique(goals.round(4), axis=0)) == 8
    assert (np.abs(goals).max(axis=1) > 0.1).all()  # a clipped goal would be zero


def test_the_goal_stays_visible_after_a_step():
    environments = make()
    goal = environments.reset([3])[0, 0, -3:]
    step = environments.step(np.zeros((1, 2, 4), dtype=np.float32))
    np.testing.assert_array_equal(step.observations[0, 0, -3:], goal)


def test_an_episode_does_not_depend_on_the_one_before():
    chunk = np.random.default_rng(0).uniform(-1, 1, (1, 30, 4)).astype(np.float32)
    fresh, used = make(), make()
    fresh.reset([9])
    used.reset([5])
    used.step(chunk)
    used.reset([9])
    np.testing.assert_array_equal(fresh.step(chunk).observations, used.step(chunk).observations)


def test_a_loaded_state_goes_on_bit_for_bit():
    chunks = np.random.default_rng(1).uniform(-1, 1, (8, 1, 5, 4)).astype(np.float32)
    first, second = make(1, time_limit=12), make(1, time_limit=12)
    first.reset(0)
    for chunk in chunks[:4]:
        first.step(chunk)
    second.load_state_dict(first.state_dict())
    for chunk in chunks[4:]:
        np.testing.assert_array_equal(
            first.step(chunk).observations, second.step(chunk).observations
        )


def test_the_expert_succeeds_and_a_sparse_episode_ends_there():
    found = evaluate(scripted_expert(NAME), make(2, sparse=True), 4)
    assert found.success_rate == 1.0
    np.testing.assert_array_equal(found.returns, 1.0)
    assert found.lengths.max() < 200


def test_the_expert_keeps_to_the_bounds():
    environments = make(2)
    observations = environments.reset(0)
    for _ in range(20):
        chunk = scripted_expert(NAME)(observations)
        assert chunk.shape == (2, 1, 4) and np.abs(chunk).max() <= 1
        observations = environments.step(chunk).observations


def test_the_longest_episode_ends_without_an_error():
    environments = make()
    environments.reset(0)
    step = environments.step(np.zeros((1, 600, 4), dtype=np.float32))
    assert step.truncated[0] and step.lengths[0] == 500


def test_a_longer_time_limit_is_refused():
    with pytest.raises(SimulatorError, match="stops at 500"):
        make(time_limit=501)


@pytest.mark.parametrize("name", ["metaworld/peg-insert-sidee", "metaworld/peg-insert-sidee-v3"])
def test_an_unknown_task_is_answered_by_the_nearest(name):
    for find in (lambda: make_environments(name, 1), lambda: scripted_expert(name)):
        with pytest.raises(SimulatorError, match="did you mean 'peg-insert-side'"):
            find()
