"""Imitation on gymnasium's tasks: episodes are whole, and rewards are read off values rightly."""

import numpy as np
import pytest
import torch

from benchmarks.gym_irl import study
from benchmarks.gym_irl.expert import TASKS, draw, play
from holdfast.bellman import TabularMDP, Transitions

CART = TASKS["CartPole-v1"]


class Rows(torch.nn.Module):
    """Values by the number of the state."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(torch.as_tensor(table))

    def forward(self, state):
        return self.table[state[:, 0].long()]


def test_choices_follow_the_softmax_of_values():
    q = torch.tensor([[0.0, 1.0, -1.0]]).expand(20_000, 3)
    chosen = draw(lambda state: q, np.zeros((20_000, 1)), np.random.default_rng(0))
    expected = torch.softmax(q[0], 0).numpy()
    assert np.bincount(chosen) / 20_000 == pytest.approx(expected, abs=0.01)


def test_episodes_are_whole_and_rewards_over_the_temperature():
    def uniform(state):
        return torch.zeros(len(state), 2)

    data, returns = play(CART, uniform, 3, seed=0)
    lengths = np.bincount(data.trajectory)
    assert lengths.tolist() == returns.tolist()  # one reward a step
    assert data.reward == pytest.approx(1.0 / CART.temperature)
    last = np.cumsum(lengths) - 1
    assert np.flatnonzero(data.terminal).tolist() == last.tolist()
    inside = np.setdiff1d(np.arange(len(data) - 1), last)
    assert (data.next_state[inside] == data.state[inside + 1]).all()
    again, _ = play(CART, uniform, 3, seed=0)
    assert (again.state == data.state).all() and (again.action == data.action).all()


def test_rewards_are_read_off_soft_values_where_what_follows_is_certain():
    model = TabularMDP.chain(5, 0.9, slip=0.0)
    data = model.sample(50, seed=0)
    rows = Transitions(
        data.state[:, None].astype(float),
        data.action,
        data.reward,
        data.next_state[:, None].astype(float),
    )
    found = study.rewards_of(Rows(model.soft_policy_iteration().q), rows, 0.9)
    assert found == pytest.approx(data.reward, abs=1e-8)


def test_errors_leave_out_the_anchor():
    data = Transitions(np.zeros((4, 1)), np.array([0, 1, 1, 1]), np.ones(4), np.zeros((4, 1)))
    found = study.reward_errors(np.array([9.0, 1.5, 1.0, 0.5]), data)
    assert found == {"error": pytest.approx(1 / 3, abs=1e-4), "correlation": None}


def test_every_method_has_as_many_settings_and_the_best_return_is_chosen():
    assert len({len(grid) for grid in study.GRIDS.values()}) == 1
    cells = {c.key: {"return": -abs(c.setting - 1) - c.seed} for c in study.tuning()}
    chosen = study.chosen_settings(cells)
    assert set(chosen.values()) == {1}
    evaluated = list(study.evaluation(chosen))
    assert len({cell.key for cell in evaluated}) == len(evaluated)
    assert not {c.seed for c in study.tuning()} & {c.seed for c in evaluated}
