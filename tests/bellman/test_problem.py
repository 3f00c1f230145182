import numpy as np
import pytest
import torch

from holdfast.bellman import SaddleProblem, Tables, TabularMDP, Transitions
from holdfast.bellman.problem import Batch

BUS = TabularMDP.bus(4, 0.8, cost=0.3, replacement=1.0, drives_on=True)
GRID = TabularMDP.gridworld(2, 3, 0.9, slip=0.3, goal=2.0)


def posed(name: str) -> SaddleProblem:
    if name == "offline":
        return SaddleProblem.tabular(GRID.sample(200, seed=0), 0.9)
    data = BUS.sample_trajectories(20, 20, seed=0)
    anchor = 1 if name == "anchor" else np.array([1, 0, 1, 0])
    return SaddleProblem.tabular(data, 0.8, anchor_action=anchor, weight=2.5)


@pytest.mark.parametrize("name", ["offline", "anchor", "anchor of each state"])
@pytest.mark.parametrize("compact", [False, True])
def test_written_out_gradients_are_those_of_the_losses(name, compact):
    """Against autograd on the losses, for two replicas at random tables."""
    problem = posed(name)
    data = problem.transitions
    batch = problem.compact() if compact else Batch.stack([data[::2], data[1::2]])
    rng = np.random.default_rng(1)
    size = (len(batch.action), problem.approximator.states * problem.approximator.actions)
    primal, dual = (torch.tensor(rng.standard_normal(size), requires_grad=True) for _ in range(2))
    down, up = problem.losses(primal, dual, batch)
    (first,) = torch.autograd.grad(down.sum(), primal, retain_graph=True)
    (second,) = torch.autograd.grad(up.sum(), dual)
    found = problem.directions(primal, dual, batch)
    torch.testing.assert_close(found[0], first, atol=1e-13, rtol=0)
    torch.testing.assert_close(found[1], second, atol=1e-13, rtol=0)


@pytest.mark.parametrize("name", ["offline", "anchor", "anchor of each state"])
def test_the_exact_solution_is_where_all_gradients_vanish(name):
    problem = posed(name)
    q, zeta = (torch.as_tensor(each).reshape(1, -1) for each in problem.exact())
    for slope in problem.directions(q, zeta, problem.compact()):
        assert float(slope.abs().max()) < 1e-12
    assert np.abs(problem.residuals(problem.exact()[0])).max() < 1e-10


def test_residuals_are_those_of_the_empirical_model():
    problem = posed("offline")
    q = np.random.default_rng(0).standard_normal((6, 4))
    model = TabularMDP.empirical(problem.transitions, 6, 4, 0.9)
    wanted = (model.backup(q) - q)[:5]
    np.testing.assert_allclose(problem.residuals(q)[:5], wanted, atol=1e-12)
    assert not problem.residuals(q)[5].any(), "nothing is decided at the end"


def test_a_row_may_end_in_a_state_that_others_go_on_from():
    """As files without a next state have it: the last row of an episode leads to its own state.

    One state, two actions: 0 goes on with reward 1, 1 ends with reward 2. Q(1) = 2 and Q(0) = 1 +
    0.5 log(e^Q(0) + e^2).
    """
    data = Transitions([0, 0], [0, 1], [1.0, 2.0], [0, 0], terminal=[False, True])
    q, zeta = SaddleProblem.tabular(data, 0.5).exact()
    assert q[0, 1] == pytest.approx(2.0)
    assert q[0, 0] == pytest.approx(1.0 + 0.5 * np.logaddexp(q[0, 0], 2.0))
    np.testing.assert_allclose(zeta, [[np.logaddexp(*q[0]), 0.0]])


@pytest.mark.parametrize("anchor", [None, 1])
def test_states_that_never_occur_have_0_and_change_nothing(anchor):
    data = BUS.sample_trajectories(30, 20, seed=0)
    small = SaddleProblem.tabular(data, 0.8, anchor_action=anchor).exact()
    large = SaddleProblem.tabular(data, 0.8, states=9, anchor_action=anchor).exact()
    for one, other in zip(small, large, strict=True):
        np.testing.assert_allclose(other[:4], one, atol=1e-10)
        assert not other[4:].any()


def test_large_models_are_sparse_and_solved_alike(monkeypatch):
    problem = posed("offline")
    dense = problem.exact()
    monkeypatch.setattr("holdfast.bellman.problem.DENSE", 0)
    for one, other in zip(dense, problem.exact(), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0.0}, "weight is 0.0"),
        ({"weight": np.inf}, "weight is inf"),
        ({"discount": 1.0}, "discount is 1.0"),
        ({"anchor_action": 1.0}, "anchor_action has dtype float64"),
        ({"anchor_action": np.array([1, 0])}, r"anchor_action has shape \(2,\)"),
        ({"anchor_action": 7}, "was never taken"),
        ({"transitions": BUS.sample(10, seed=0)[:0]}, "has no rows"),
        ({"approximator": Tables(2, 2)}, "must lie in 0 ... 1"),
    ],
)
def test_what_is_no_problem_is_refused(change, message):
    given = {"transitions": BUS.sample(60, seed=0), "discount": 0.8, "approximator": Tables(4, 2)}
    with pytest.raises(ValueError, match=message):
        SaddleProblem(**(given | change))
