"""Gymnasium tasks: against the bare environments, and against the batched route."""

import os
import sys
from functools import partial

import numpy as np
import pytest

from holdfast.control.environments import (
    EnvironmentOptions,
    SimulatorError,
    make_environments,
)
from holdfast.control.environments.batched import BatchedEnvironment
from holdfast.control.environments.point_mass import NAME, PointMass

gymnasium = pytest.importorskip("gymnasium")

from holdfast.control.environments.synchronous import GymnasiumEnvironment  # noqa: E402

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


class OnePoint(gymnasium.Env):
    """The point mass as an ordinary Gymnasium environment."""

    def __init__(self):
        self.observation_space = gymnasium.spaces.Box(-2, 2, (6,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        self.point = PointMass(1)

    def reset(self, *, seed=None, options=None):
        self.point.reset(np.array([0]), np.array([seed]))
        return self.point.observe()[0], {}

    def step(self, action):
        outcome = self.point.step(np.array([True]), action[None])
        info = {"success": bool(outcome.success[0])}
        reward, terminated = float(outcome.rewards[0]), bool(outcome.terminated[0])
        return self.point.observe()[0], reward, terminated, False, info


class Forgetful(OnePoint):
    """Begins somewhere else each time, whatever the seed."""

    begun = 0

    def reset(self, *, seed=None, options=None):
        Forgetful.begun += 1
        return super().reset(seed=Forgetful.begun)


def limited(kind, limit):
    return gymnasium.wrappers.TimeLimit(kind(), limit)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_batched_and_the_synchronous_route_agree_in_every_field(sparse):
    options = EnvironmentOptions(history=2, time_limit=25, sparse=sparse)
    batched = BatchedEnvironment(NAME, 4, PointMass(4), options=options, seed=3)
    single = GymnasiumEnvironment("p", 4, partial(limited, OnePoint, 25), options=options, seed=3)
    np.testing.assert_array_equal(batched.reset(), single.reset())
    draw = np.random.default_rng(0)
    ended = np.zeros(4, dtype=bool)
    for _ in range(40):
        chunk = (draw.uniform(-1, 1, (4, 3, 2)) + [0, 0.6]).astype(np.float32)
        one, other = batched.step(chunk), single.step(chunk)
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field), field)
        ended |= one.ended
    assert ended.all() and single.reports_success


def test_a_list_of_seeds_parks_both_routes_alike():
    options = EnvironmentOptions(time_limit=9)
    batched = BatchedEnvironment(NAME, 2, PointMass(2), options=options, seed=0)
    single = GymnasiumEnvironment("p", 2, partial(limited, OnePoint, 9), options=options, seed=0)
    chunk = np.zeros((2, 4, 2), dtype=np.float32)
    for environments in (batched, single):
        environments.reset([3, 4, 5])
        steps = 0
        while environments.running.any():
            environments.step(chunk)
            steps += 1
        assert steps == 6  # two episodes of three chunks, one after another
    np.testing.assert_array_equal(batched.episodes, single.episodes)


def test_what_does_not_repeat_itself_is_loaded_with_a_warning():
    make = partial(limited, Forgetful, 20)
    environments = GymnasiumEnvironment("p", 1, make, options=EnvironmentOptions(), seed=0)
    environments.reset(0)
    environments.step(np.zeros((1, 3, 2), dtype=np.float32))
    with pytest.warns(UserWarning, match="not restored exactly"):
        environments.load_state_dict(environments.state_dict())
    assert environments.episode_lengths[0] == 3


class Shorter(OnePoint):
    """Every episode after the first is over after two steps."""

    begun = 0

    def reset(self, *, seed=None, options=None):
        self.begun, self.taken = self.begun + 1, 0
        return super().reset(seed=seed, options=options)

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        self.taken += 1
        return observation, reward, terminated or (self.begun > 1 and self.taken == 2), False, info


def test_an_episode_that_ends_before_where_it_was_saved_begins_again():
    make = partial(limited, Shorter, 20)
    environments = GymnasiumEnvironment("p", 1, make, options=EnvironmentOptions(), seed=0)
    first = environments.reset(0)
    environments.step(np.zeros((1, 3, 2), dtype=np.float32))
    with pytest.warns(UserWarning, match=r"environments \[0\] were not restored .* begin again"):
        seen = environments.load_state_dict(environments.state_dict())
    np.testing.assert_array_equal(seen, first)
    assert environments.episode_lengths[0] == 0 == environments.episode_returns[0]
    step = environments.step(np.zeros((1, 1, 2), dtype=np.float32))
    assert step.episode_lengths[0] == 1 and not step.ended[0]


def test_sparse_needs_a_task_that_reports_success():
    pytest.importorskip("mujoco")
    environments = make_environments("Hopper-v5", 1, options=EnvironmentOptions(sparse=True))
    environments.reset(0)
    with pytest.raises(SimulatorError, match="does not report success"):
        environments.step(np.zeros((1, 1, 3), dtype=np.float32))


@pytest.mark.parametrize("name", ["Hopper-v5", "Walker2d-v5", "HalfCheetah-v5"])
class TestMuJoCo:
    """MuJoCo, through everything."""

    @pytest.fixture(autouse=True)
    def _needs_mujoco(self):
        pytest.importorskip("mujoco")

    def make(self, name, count=2, **options):
        return make_environments(name, count, options=EnvironmentOptions(**options))

    def test_it_is_the_bare_environment(self, name):
        # HalfCheetah does not fall: its episodes end by the limit alone.
        limit = 40 if name == "HalfCheetah-v5" else None
        environments = self.make(name, time_limit=limit)
        observations = environments.reset(1)
        bare = [gymnasium.make(name, max_episode_steps=limit) for _ in range(2)]
        for slot, env in enumerate(bare):
            first, _ = env.reset(seed=int(environments.seeds[slot]))
            np.testing.assert_array_equal(first.astype(np.float32), observations[slot, 0])
        draw = np.random.default_rng(0)
        ended = 0
        for _ in range(30):
            chunk = draw.uniform(-1, 1, (2, 3, environments.action_size)).astype(np.float32)
            step = environments.step(chunk)
            for slot, env in enumerate(bare):
                total = 0.0
                for action in chunk[slot, : step.lengths[slot]]:
                    seen, reward, terminated, truncated, _ = env.step(action)
                    total += reward
                assert total == pytest.approx(step.rewards[slot], rel=1e-6)
                assert (terminated, truncated) == (step.terminated[slot], step.truncated[slot])
                np.testing.assert_array_equal(
                    seen.astype(np.float32), step.final_observations[slot, 0]
                )
                if terminated or truncated:
                    ended += 1
                    first, _ = env.reset(seed=int(environments.seeds[slot]))
                    np.testing.assert_array_equal(
                        first.astype(np.float32), step.observations[slot, 0]
                    )
        assert ended > 2

    def test_a_loaded_state_goes_on_bit_for_bit(self, name):
        first, second = self.make(name, history=2), self.make(name, history=2)
        first.reset(0)
        draw = np.random.default_rng(1)
        chunks = draw.uniform(-1, 1, (30, 2, 2, first.action_size)).astype(np.float32)
        for chunk in chunks[:17]:
            first.step(chunk)
        state = first.state_dict()
        second.load_state_dict(state)
        for chunk in chunks[17:]:
            one, other = first.step(chunk), second.step(chunk)
            for field in FIELDS:
                np.testing.assert_array_equal(getattr(one, field), getattr(other, field), field)

    def test_it_does_not_report_success(self, name):
        environments = self.make(name, 1)
        environments.reset(0)
        environments.step(np.zeros((1, 1, environments.action_size), dtype=np.float32))
        assert not environments.reports_success


def test_options_and_keywords_reach_the_task():
    pytest.importorskip("mujoco")
    options = EnvironmentOptions(time_limit=60, keywords={"terminate_when_unhealthy": False})
    environments = make_environments("Hopper-v5", 1, options=options)
    environments.reset(0)
    step = environments.step(np.zeros((1, 100, 3), dtype=np.float32))
    assert step.truncated[0] and step.lengths[0] == 60


def test_other_actions_than_vectors_are_refused():
    with pytest.raises(SimulatorError, match="CartPole-v1 has actions Discrete"):
        make_environments("CartPole-v1", 1)


@pytest.mark.parametrize("name", ["Hoper-v5", "no_such_module:Thing-v0"])
def test_unknown_names_are_refused(name):
    with pytest.raises(SimulatorError, match=f"{name} cannot be made"):
        make_environments(name, 1)


def test_an_option_that_the_task_does_not_know_is_refused():
    with pytest.raises(SimulatorError, match="nonsense"):
        make_environments("Pendulum-v1", 1, options=EnvironmentOptions(keywords={"nonsense": 1}))


def test_a_task_without_a_time_limit_asks_for_one():
    gymnasium.register(id="Endless-v0", entry_point=OnePoint)
    try:
        with pytest.raises(SimulatorError, match="no time limit"):
            make_environments("Endless-v0", 1)
        assert make_environments("Endless-v0", 1, options=EnvironmentOptions(time_limit=5)).count
    finally:
        del gymnasium.registry["Endless-v0"]


def test_pictures_leave_a_chosen_renderer_alone(monkeypatch):
    from holdfast.control.environments.synchronous import prepare_rendering

    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    prepare_rendering()
    assert os.environ["MUJOCO_GL"] == "osmesa"
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(sys, "platform", "darwin")
    prepare_rendering()
    assert "MUJOCO_GL" not in os.environ
    monkeypatch.setattr(sys, "platform", "linux")
    prepare_rendering()
    assert os.environ["MUJOCO_GL"] == "egl"


def test_mujoco_is_imported_before_it_is_told_how_to_draw(monkeypatch):
    """Where there is no EGL, an import that is to use it fails; a picture alone may be missing."""
    from holdfast.control.environments import synchronous

    seen = []
    monkeypatch.setenv("MUJOCO_GL", "egl")  # What it is now comes back after the test.
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(
        synchronous.importlib,
        "import_module",
        lambda name: seen.append((name, os.environ.get("MUJOCO_GL"))),
    )
    synchronous.prepare_rendering()
    assert seen == [("mujoco", None)]


def test_without_gymnasium_the_message_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(SimulatorError, match=r"Hopper-v5 needs gymnasium.*holdfast\[control\]"):
        make_environments("Hopper-v5", 1)
