import numpy as np
import pytest

from holdfast.bellman import mdp as problems
from holdfast.bellman.estimators.choice_model import ChoiceModel
from holdfast.bellman.estimators.maxent import Flow, demonstrated_flow, maximum_entropy_irl
from holdfast.bellman.estimators.nfxp import nested_fixed_point
from holdfast.bellman.transitions import Transitions
from holdfast.errors import TrainingError

STATES, ACTIONS, DISCOUNT = 5, 3, 0.9


def draw(seed: int):
    random = np.random.default_rng(seed)
    model = ChoiceModel(
        random.normal(size=(STATES, ACTIONS, 2)),
        random.dirichlet(np.ones(STATES), size=(STATES, ACTIONS)),
        DISCOUNT,
    )
    return model, random.normal(size=2)


def exact_flow(model: ChoiceModel, policy: np.ndarray, initial: np.ndarray) -> Flow:
    """Occupancy by pushing the initial distribution forward until nothing is left."""
    state, occupancy = initial.copy(), np.zeros_like(policy)
    while state.sum() > 1e-14:
        occupancy += state[:, None] * policy
        state = DISCOUNT * np.einsum("s,sa,sat->t", state, policy, model.transitions)
    return Flow(occupancy, initial)


def test_the_exact_occupancy_gives_the_true_parameters():
    model, theta = draw(0)
    flow = exact_flow(model, model.solve(theta).policy, np.full(STATES, 1 / STATES))
    found = maximum_entropy_irl(model, flow)
    np.testing.assert_allclose(found.parameters, theta, atol=1e-7)
    np.testing.assert_allclose(found.feature_gap, 0, atol=1e-7)


def test_expected_features_equal_those_of_the_policy_pushed_forward():
    model, theta = draw(1)
    initial = np.eye(STATES)[2]
    flow = exact_flow(model, np.full((STATES, ACTIONS), 1 / ACTIONS), initial)
    found = maximum_entropy_irl(model, flow, ridge=0.5)
    expected = exact_flow(model, found.solution.policy, initial).occupancy
    gap = np.einsum("sa,sak->k", flow.occupancy - expected, model.features)
    np.testing.assert_allclose(found.feature_gap, gap, atol=1e-10)
    np.testing.assert_allclose(found.parameters, found.feature_gap / 0.5, atol=1e-8)


def test_with_the_occupancys_own_inflow_it_is_the_nested_fixed_point():
    model, theta = draw(2)
    random = np.random.default_rng(2)
    counts = np.stack([random.multinomial(50, row) for row in model.solve(theta).policy])
    inflow = counts.sum(-1) - DISCOUNT * np.einsum("sa,sat->t", counts, model.transitions)
    found = maximum_entropy_irl(model, Flow(counts, inflow))
    best = nested_fixed_point(model, counts)
    np.testing.assert_allclose(found.parameters, best.parameters, atol=1e-6)


def test_short_demonstrations_are_not_biased_by_their_length():
    """20,000 trajectories of 5 steps at discount 0.9: half of all reward lies behind the cut.

    The spread of the estimate is found by halves: 20 parts of 1,000 trajectories each.
    """
    model, theta = draw(3)
    problem = problems.TabularMDP(model.transitions, model.rewards(theta), DISCOUNT)
    demonstrations = problem.sample_trajectories(20_000, 5, seed=4)
    found = maximum_entropy_irl(model, demonstrated_flow(demonstrations, STATES, ACTIONS, DISCOUNT))
    parts = []
    for part in range(20):
        rows = demonstrations[demonstrations.trajectory // 1000 == part]
        flow = demonstrated_flow(rows, STATES, ACTIONS, DISCOUNT)
        parts.append(maximum_entropy_irl(model, flow).parameters)
    error = np.std(parts, axis=0, ddof=1) / 20**0.5
    assert (error < 0.05).all()
    assert (abs(found.parameters - theta) < 4 * error).all()


def test_flow_by_hand():
    """0 -a1-> 1 -a0-> 2, cut off; and 1 -a1-> 0, ended. Discount 1/2."""
    rows = Transitions(
        np.array([0, 1, 1]),
        np.array([1, 0, 1]),
        np.zeros(3),
        np.array([1, 2, 0]),
        np.array([False, False, True]),
        np.array([7, 7, 9]),
    )
    flow = demonstrated_flow(rows, 3, 2, 0.5)
    np.testing.assert_allclose(flow.occupancy, [[0, 0.5], [0.25, 0.5], [0, 0]])
    np.testing.assert_allclose(flow.inflow, [0.5, 0.5, -0.125])


def test_a_terminal_state_is_worth_nothing():
    """A gridworld's own reward is found from demonstrations that end in its goal."""
    problem = problems.TabularMDP.gridworld(3, 3, 0.9, slip=0.2)
    dense = np.asarray(problem.kernel.todense()).reshape(9, 4, 9)
    reward = problem.rewards[..., None] * ~problem.terminal[:, None, None]
    model = ChoiceModel(reward, dense, 0.9, terminal=problem.terminal)
    exact = problem.soft_policy_iteration()
    live = ~problem.terminal
    np.testing.assert_allclose(model.solve([1.0]).q[live], exact.q[live], atol=1e-8)
    rows = problem.sample_trajectories(4000, 200, seed=0)
    found = maximum_entropy_irl(model, demonstrated_flow(rows, 9, 4, 0.9))
    assert found.parameters == pytest.approx([1.0], abs=0.1)


def test_a_constant_needs_a_ridge():
    model, theta = draw(5)
    constant = np.ones((STATES, ACTIONS, 1))
    wider = ChoiceModel(np.concatenate([model.features, constant], -1), model.transitions, DISCOUNT)
    flow = exact_flow(model, model.solve(theta).policy, np.full(STATES, 1 / STATES))
    with pytest.raises(TrainingError, match="parameter 2"):
        maximum_entropy_irl(wider, flow)
    found = maximum_entropy_irl(wider, flow, ridge=1e-6)
    np.testing.assert_allclose(found.parameters, [*theta, 0], atol=1e-3)


def test_bad_flows_are_refused():
    model, _ = draw(6)
    rows = Transitions(np.array([0]), np.array([0]), np.zeros(1), np.array([1]))
    with pytest.raises(ValueError, match="no trajectories"):
        demonstrated_flow(rows, STATES, ACTIONS, DISCOUNT)
    with pytest.raises(ValueError, match="flow has shapes"):
        maximum_entropy_irl(model, Flow(np.zeros((2, 2)), np.zeros(2)))
    with pytest.raises(ValueError, match="ridge"):
        maximum_entropy_irl(model, Flow(np.zeros((STATES, ACTIONS)), np.zeros(STATES)), ridge=-1.0)


def test_trajectories_that_are_interleaved_are_refused_with_the_row():
    rows = Transitions([0, 0, 0], [0, 0, 0], [0.0] * 3, [0, 0, 0], trajectory=[4, 7, 4])
    with pytest.raises(ValueError, match="trajectory 4 goes on in row 2"):
        demonstrated_flow(rows, 1, 1, 0.9)
