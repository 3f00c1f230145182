"""The point mass, and with it what every environment promises: chunks, windows, ends, seeds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.control.environments import (
    EnvironmentOptions,
    SimulatorError,
    evaluate,
    make_environments,
    scripted_expert,
)
from holdfast.control.environments.point_mass import NAME, OBSTACLES, RADIUS

FIELDS = [
    "observations",
    "final_observations",
    "rewards",
    "terminated",
    "truncated",
    "success",
    "lengths",
    "episodes",
    "episode_lengths",
    "episode_returns",
]


def actions(count, horizon, seed=0):
    """Mostly upwards, so that episodes end in every way."""
    drawn = np.random.default_rng(seed).uniform(-1, 1, (count, horizon, 2))
    return (drawn + [0.0, 0.6]).astype(np.float32)


def make(count=3, **options):
    return make_environments(NAME, count, options=EnvironmentOptions(**options))


def test_a_chunk_is_its_actions_one_by_one():
    """Brute force: single steps of the same episodes, stopped at the first end."""
    whole, single = make(time_limit=30), make(time_limit=30)
    whole.reset([11, 12, 13])
    single.reset([11, 12, 13])
    ended = np.zeros(3, dtype=bool)
    for number in range(12):
        chunk = actions(3, 4, number)
        last = np.zeros((3, 1, 6), dtype=np.float32)
        rewards, lengths = np.zeros(3), np.zeros(3, dtype=int)
        before = single.running
        step = whole.step(chunk)
        for action in chunk.swapaxes(0, 1):
            running = single.running
            one = single.step(action[:, None])
            rewards += one.rewards
            lengths += one.lengths
            last[running] = one.final_observations[running]
        np.testing.assert_array_equal(rewards, step.rewards)
        np.testing.assert_array_equal(lengths, step.lengths)
        np.testing.assert_array_equal(last[before], step.final_observations[before])
        ended |= step.ended
    assert ended.all()


def test_the_window_holds_the_newest_observations_and_repeats_the_first():
    wide, narrow = make(history=3), make(history=1)
    first = wide.reset([4, 5, 6])
    seen = [narrow.reset([4, 5, 6])[:, 0]] * 3
    np.testing.assert_array_equal(first, np.stack(seen, axis=1))
    for number in range(10):
        step = wide.step(actions(3, 1, number))
        seen.append(narrow.step(actions(3, 1, number)).final_observations[:, 0])
        np.testing.assert_array_equal(step.final_observations, np.stack(seen[-3:], axis=1))


def test_after_an_end_come_the_first_observations_of_the_next_episode():
    environments = make(time_limit=7, history=2)
    environments.reset(0)
    for number in range(20):
        step = environments.step(actions(3, 3, number))
        assert not (step.terminated & step.truncated).any()
        for slot in np.flatnonzero(step.ended):
            fresh = make(1, history=2).reset([int(environments.seeds[slot])])
            np.testing.assert_array_equal(step.observations[slot], fresh[0])
            assert (step.final_observations[slot] != fresh[0]).any()
        alive = ~step.ended
        np.testing.assert_array_equal(step.observations[alive], step.final_observations[alive])
    assert (environments.episodes > 3).all()


def test_a_time_limit_truncates_at_its_step():
    environments = make(1, time_limit=5)
    environments.reset(0)
    still = np.zeros((1, 4, 2), dtype=np.float32)
    first, second = environments.step(still), environments.step(still)
    assert not first.ended[0]
    assert second.truncated[0] and second.lengths[0] == 1 and second.episode_lengths[0] == 5


def test_touching_an_obstacle_ends_the_episode_without_success():
    environments = make(1)
    observations = environments.reset(0)
    target = np.array(OBSTACLES[0])
    for _ in range(100):
        position = observations[0, -1, :2]
        push = np.clip(5 * (target - position), -1, 1).astype(np.float32)
        step = environments.step(push[None, None])
        observations = step.observations
        if step.ended[0]:
            break
    assert step.terminated[0] and not step.success[0] and step.episode_returns[0] == 0
    final = step.final_observations[0, -1, :2]
    assert np.hypot(*(final - target)) < RADIUS


def test_the_expert_always_succeeds_and_the_straight_way_does_not():
    def straight(observations):
        newest = observations[:, -1]
        return np.clip(5 * (newest[:, 4:6] - newest[:, :2]), -1, 1)[:, None]

    expert = evaluate(scripted_expert(NAME), make(32), 200)
    assert expert.success_rate == 1.0 and expert.mean_return == 1.0
    assert 0.1 < evaluate(straight, make(32), 200).success_rate < 0.5


def test_the_expert_passes_obstacles_on_both_sides():
    environments = make(64)
    seen = environments.reset(0)
    sides = np.zeros(64)
    for _ in range(25):
        seen = environments.step(scripted_expert(NAME)(seen)).final_observations
        beside = np.abs(seen[:, -1, 1] - OBSTACLES[0][1]) < 0.05
        sides[beside] = np.sign(seen[beside, -1, 0])
    assert (sides == 1).sum() > 10 and (sides == -1).sum() > 10


@settings(max_examples=12, deadline=None)
@given(count=st.integers(1, 9), horizon=st.integers(1, 5), seed=st.integers(0, 99))
def test_an_episode_does_not_depend_on_the_number_of_environments(count, horizon, seed):
    """Bit for bit."""
    one, many = make(1), make(count)
    observations, alone = many.reset([seed] * count), one.reset([seed])
    for number in range(6):
        chunk = actions(1, horizon, number)
        np.testing.assert_array_equal(observations, np.repeat(alone, count, axis=0))
        observations = many.step(np.repeat(chunk, count, axis=0)).final_observations
        alone = one.step(chunk).final_observations


@settings(max_examples=8, deadline=None)
@given(before=st.integers(0, 25), history=st.integers(1, 3), sparse=st.booleans())
def test_a_loaded_state_goes_on_bit_for_bit(before, history, sparse):
    options = {"history": history, "sparse": sparse, "time_limit": 20}
    first, second = make(**options), make(**options)
    observations = first.reset(5)
    for number in range(before):
        observations = first.step(actions(3, 2, number)).observations
    state = first.state_dict()
    expected = [first.step(actions(3, 2, 100 + number)) for number in range(15)]
    np.testing.assert_array_equal(second.load_state_dict(state), observations)
    for number, step in enumerate(expected):
        found = second.step(actions(3, 2, 100 + number))
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(found, field), getattr(step, field), field)


def test_sparse_changes_nothing_where_the_reward_is_sparse_already():
    plain, sparse = make(), make(sparse=True)
    plain.reset(2)
    sparse.reset(2)
    expert = scripted_expert(NAME)
    a, b = plain.reset(2), sparse.reset(2)
    for _ in range(60):
        one, other = plain.step(expert(a)), sparse.step(expert(b))
        a, b = one.observations, other.observations
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field), field)


def test_a_parked_environment_does_not_move():
    environments = make(3)
    environments.reset([8])
    assert environments.running.tolist() == [True, False, False]
    step = environments.step(actions(3, 2))
    assert step.lengths.tolist() == [2, 0, 0]
    assert not step.ended.any()


def test_actions_beyond_the_bounds_are_clipped():
    one, other = make(1), make(1)
    one.reset(0)
    other.reset(0)
    far = one.step(np.full((1, 2, 2), 9.0, dtype=np.float32))
    near = other.step(np.ones((1, 2, 2), dtype=np.float32))
    np.testing.assert_array_equal(far.observations, near.observations)


@pytest.mark.parametrize("shape", [(3, 2), (2, 1, 2), (3, 1, 3), (3, 0, 2)])
def test_chunks_of_another_shape_are_refused(shape):
    environments = make(3)
    environments.reset(0)
    with pytest.raises(ValueError, match="chunks has shape"):
        environments.step(np.zeros(shape, dtype=np.float32))


def test_what_is_not_a_number_is_refused_by_place():
    environments = make(3)
    environments.reset(0)
    chunk = np.zeros((3, 4, 2), dtype=np.float32)
    chunk[1, 2, 0] = np.nan
    with pytest.raises(SimulatorError, match="entry 0 of action 2 .* environment 1 is nan"):
        environments.step(chunk)


def test_a_step_before_a_reset_is_refused():
    with pytest.raises(SimulatorError, match="before it was reset"):
        make(1).step(np.zeros((1, 1, 2), dtype=np.float32))


def test_noise_follows_seed_and_step_alone():
    many, one = make(3), make(1)
    many.reset([7, 8, 9])
    one.reset([8])
    np.testing.assert_array_equal(many.noise(4, 2)[1], one.noise(4, 2)[0])
    before = one.noise(3)
    one.step(actions(1, 1))
    assert (one.noise(3) != before).all()


def test_pictures_show_where_the_point_is():
    environments = make(2)
    environments.reset(0)
    before = environments.render()
    environments.step(actions(2, 5))
    after = environments.render()
    assert before[0].shape == (128, 128, 3) and before[0].dtype == np.uint8
    assert (before[0] != after[0]).any() and (before[0] != before[1]).any()


@pytest.mark.parametrize("options", [{"history": 0}, {"time_limit": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="at least 1"):
        EnvironmentOptions(**options)
