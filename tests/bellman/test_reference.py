import numpy as np
import pytest
import torch

from holdfast.bellman import SaddleProblem, TabularMDP
from holdfast.bellman.generalization import empirical_risk
from holdfast.bellman.reference import SaddleReference

BUS = TabularMDP.bus(3, 0.6, cost=0.5, replacement=0.6, increments=(0.6, 0.3, 0.1), drives_on=True)


def test_at_the_saddle_all_distances_are_0():
    data = BUS.sample_trajectories(10, 30, seed=0)
    problem = SaddleProblem.tabular(data, 0.6, anchor_action=1)
    at = (torch.as_tensor(each) for each in problem.exact())
    found = SaddleReference(problem).distances(*at)
    assert found.keys() == {"bellman/q_error", "bellman/reward_error", "bellman/residual"}
    assert max(found.values()) < 1e-12


def test_distances_are_largest_differences_and_the_empirical_risk():
    model = TabularMDP.gridworld(2, 2, 0.8, slip=0.2)
    data = model.sample(200, seed=0)
    problem = SaddleProblem.tabular(data, 0.8)
    rng = np.random.default_rng(0)
    q, zeta = rng.standard_normal((2, 4, 4))
    q[3] = 0.0  # an end, whose value is 0 in the empirical model as well
    found = SaddleReference(problem).distances(torch.as_tensor(q), torch.as_tensor(zeta))
    exact, _ = problem.exact()
    assert found["bellman/q_error"] == pytest.approx(np.abs(q - exact)[:3].max())
    assert found["bellman/residual"] == pytest.approx(empirical_risk(data, q, 0.8))
    assert "bellman/reward_error" not in found


def test_with_an_anchor_rewards_are_compared_and_its_rows_alone_count():
    data = BUS.sample_trajectories(10, 30, seed=0)
    problem = SaddleProblem.tabular(data, 0.6, anchor_action=1)
    q, zeta = problem.exact()
    q, zeta = torch.as_tensor(q), torch.as_tensor(zeta)
    zeta[0, 0] += 0.5
    moved = SaddleReference(problem).distances(q, zeta)
    assert moved["bellman/reward_error"] == pytest.approx(0.3)
    assert moved["bellman/q_error"] < 1e-12 and moved["bellman/residual"] < 1e-20
    q[0] += 0.2
    level = SaddleReference(problem).distances(q, zeta)["bellman/residual"]
    counts = data.counts(3, 2)
    kernel = TabularMDP.empirical(data, 3, 2, 0.6).transitions
    moves = 0.6 * kernel[:, 1, 0] * 0.2 - 0.2 * np.eye(3)[0]
    wanted = (counts[:, 1] / len(data) * moves**2).sum()
    assert level == pytest.approx(wanted)
