"""FurnitureBench's adapter, against a stand-in with the interface of its vector environment."""

import sys
import types

import numpy as np
import pytest
import torch

from holdfast.control.environments import EnvironmentOptions, SimulatorError, make_environments

NAME = "furniture/one_leg"


class Part:
    def __init__(self):
        self.done = 0

    def all_assembled(self):
        return self.done >= 3


class StandIn:
    """Each environment counts the steps in which its first action was positive."""

    def __init__(self, furniture, num_envs, obs_keys, **keywords):
        assert furniture == "one_leg" and "parts_poses" in obs_keys
        assert keywords["concat_robot_state"] and keywords["max_env_steps"] > 10**6
        self.device = torch.device("cpu")
        self.furnitures = [Part() for _ in range(num_envs)]
        self.places = np.zeros(num_envs)
        self.action_space = types.SimpleNamespace(
            low=np.full((num_envs, 8), -1.0), high=np.ones((num_envs, 8))
        )
        self.unwrapped = self

    def reset(self):
        return self.get_observation()

    def reset_env(self, index):
        self.furnitures[index].done = 0
        self.places[index] = np.random.uniform()

    def refresh(self):
        pass

    def get_observation(self):
        done = torch.tensor([[float(p.done)] for p in self.furnitures])
        return {"robot_state": done, "parts_poses": torch.tensor(self.places)[:, None]}

    def step(self, action):
        assert action.shape == (len(self.furnitures), 8)
        before = [part.done for part in self.furnitures]
        for part, row in zip(self.furnitures, action, strict=True):
            part.done += int(row[0] > 0)
        gained = [[float(p.done - b)] for p, b in zip(self.furnitures, before, strict=True)]
        return self.get_observation(), torch.tensor(gained), None, {}


@pytest.fixture
def stand_in(monkeypatch):
    gym = types.ModuleType("gym")
    gym.make = lambda name, **keywords: StandIn(**keywords)
    for name, module in (
        ("gym", gym),
        ("isaacgym", types.ModuleType("isaacgym")),
        ("furniture_bench", types.ModuleType("furniture_bench")),
    ):
        monkeypatch.setitem(sys.modules, name, module)


def test_it_assembles_terminates_in_success_and_begins_anew(stand_in):
    environments = make_environments(NAME, 2)
    first = environments.reset(0)
    assert first.shape == (2, 1, 2)
    chunk = np.zeros((2, 5, 8), dtype=np.float32)
    chunk[0, :, 0] = 1
    step = environments.step(chunk)
    assert step.lengths.tolist() == [3, 5]
    assert step.rewards.tolist() == [3.0, 0.0]
    assert step.terminated.tolist() == [True, False] == step.success.tolist()
    assert step.final_observations[0, 0, 0] == 3 and step.observations[0, 0, 0] == 0


def test_an_environment_that_has_ended_rests_for_the_rest_of_the_chunk(stand_in):
    environments = make_environments(NAME, 2, options=EnvironmentOptions(time_limit=4))
    environments.reset(0)
    chunk = np.ones((2, 5, 8), dtype=np.float32)
    chunk[1] = 0
    step = environments.step(chunk)
    assert step.final_observations[0, 0, 0] == 3
    assert step.truncated.tolist() == [False, True]


def test_placements_follow_the_seed_and_leave_numpys_state_alone(stand_in):
    environments = make_environments(NAME, 2)
    before = np.random.get_state()[1].copy()
    first, again = environments.reset([4, 5]), environments.reset([5, 4])
    np.testing.assert_array_equal(first, again[::-1])
    assert (first[0] != first[1]).any()
    np.testing.assert_array_equal(before, np.random.get_state()[1])


def test_without_a_state_the_running_episodes_begin_again_from_their_seeds(stand_in):
    environments = make_environments(NAME, 2)
    first = environments.reset(3)
    seeds = environments.seeds
    chunk = np.ones((2, 2, 8), dtype=np.float32)
    environments.step(chunk)
    state = environments.state_dict()
    for other in (environments, make_environments(NAME, 2)):
        with pytest.warns(UserWarning, match="furniture/one_leg cannot save its state"):
            seen = other.load_state_dict(state)
        np.testing.assert_array_equal(seen, first)
        np.testing.assert_array_equal(other.seeds, seeds)
        step = other.step(chunk)
        assert step.episode_lengths.tolist() == [2, 2] == step.lengths.tolist()
        assert not step.ended.any() and step.episode_returns.tolist() == [2.0, 2.0]


def test_without_isaac_gym_the_message_says_what_it_takes(monkeypatch):
    monkeypatch.setitem(sys.modules, "isaacgym", None)
    with pytest.raises(SimulatorError, match="needs isaacgym.*Isaac Gym by hand from NVIDIA"):
        make_environments(NAME, 1)
