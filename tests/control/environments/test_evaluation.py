"""Evaluation: the same episodes however many environments there are, and honest intervals."""

import numpy as np
import pytest

from holdfast.control.environments import (
    EnvironmentOptions,
    bootstrap_interval,
    evaluate,
    make_environments,
    scripted_expert,
)
from holdfast.control.environments.point_mass import NAME


@pytest.mark.parametrize("horizon", [1, 3])
def test_the_result_does_not_depend_on_the_number_of_environments(horizon):
    """Of a policy with noise, too, if the noise is that of the environments."""
    found = []
    for count in (1, 5, 20):
        environments = make_environments(NAME, count, options=EnvironmentOptions(time_limit=60))

        def act(observations, environments=environments):
            noise = 0.6 * environments.noise(horizon, 2)
            return scripted_expert(NAME)(observations) + noise

        found.append(evaluate(act, environments, 12, seed=2))
    for other in found[1:]:
        assert other.seeds == found[0].seeds
        np.testing.assert_array_equal(other.success, found[0].success)
        np.testing.assert_array_equal(other.lengths, found[0].lengths)
        np.testing.assert_array_equal(other.returns, found[0].returns)
    assert 0.1 < found[0].success_rate < 1.0
    assert evaluate(act, environments, 12, seed=3).seeds != found[0].seeds


def test_any_of_the_episodes_can_be_run_by_their_numbers():
    """As several processes do, each with a share of them."""
    environments = make_environments(NAME, 3)
    whole = evaluate(scripted_expert(NAME), environments, 7, seed=2)
    for numbers in ([0, 2, 4, 6], [5, 1, 3]):
        part = evaluate(scripted_expert(NAME), environments, numbers, seed=2)
        assert part.seeds == [whole.seeds[number] for number in numbers]
        np.testing.assert_array_equal(part.returns, whole.returns[numbers])
        np.testing.assert_array_equal(part.lengths, whole.lengths[numbers])
    with pytest.raises(ValueError, match="at least 1"):
        evaluate(scripted_expert(NAME), environments, [])


def test_policies_that_remember_are_told_when_an_episode_begins():
    environments = make_environments(NAME, 3, options=EnvironmentOptions(time_limit=5))
    begun = []
    evaluate(
        lambda seen: np.zeros((3, 2, 2), dtype=np.float32),
        environments,
        7,
        begin=lambda which: begun.append(which.copy()),
    )
    assert np.sum(begun) == 7


def test_success_is_none_where_the_task_does_not_know_it():
    pytest.importorskip("mujoco")
    environments = make_environments("Hopper-v5", 2)
    found = evaluate(lambda seen: np.zeros((2, 4, 3), dtype=np.float32), environments, 3)
    assert found.success_rate is None and found.success_interval() is None
    assert found.mean_return > 0 and (found.lengths > 5).all()
    low, high = found.return_interval()
    assert low <= found.mean_return <= high


def test_the_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).exponential(size=400)
    low, high = bootstrap_interval(values)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)
    assert bootstrap_interval(values) == (low, high)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_a_constant_has_no_width():
    assert bootstrap_interval([2.0] * 5) == (2.0, 2.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap_interval([]),
        lambda: bootstrap_interval([1.0], confidence=0.0),
        lambda: evaluate(lambda seen: seen, make_environments(NAME, 1), 0),
    ],
)
def test_values_out_of_range_are_refused(call):
    with pytest.raises(ValueError, match="confidence|values|episodes"):
        call()
