import numpy as np
import pytest
import torch
from torch import nn

from holdfast.bellman.estimators.fitting import FitOptions
from holdfast.bellman.estimators.soft_q import fit_soft_q_network, fitted_soft_q, one_hot
from holdfast.bellman.mdp import TabularMDP
from holdfast.bellman.transitions import Transitions
from holdfast.errors import TrainingError

STATES, ACTIONS = 4, 3


class Table(nn.Module):
    """One parameter a pair of state and action, from 0."""

    def __init__(self, states: int = STATES, actions: int = ACTIONS) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(states, actions, dtype=torch.float64))

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.values[state]


def drawn(discount: float, n: int = 400, seed: int = 0) -> tuple[TabularMDP, Transitions]:
    problem = TabularMDP.random(STATES, ACTIONS, discount, seed=seed)
    return problem, problem.sample(n, seed=seed + 1)


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.95])
def test_on_a_table_it_is_soft_value_iteration_on_the_empirical_model(discount):
    _, rows = drawn(discount)
    fitted = fitted_soft_q(rows, actions=ACTIONS, discount=discount, basis=one_hot(STATES))
    exact = TabularMDP.empirical(rows, STATES, ACTIONS, discount).soft_policy_iteration(1e-12)
    np.testing.assert_allclose(fitted(np.arange(STATES)), exact.q, atol=1e-8)


def test_much_data_leads_to_the_true_values():
    """The error of Q falls as 1 / sqrt(n): five times smaller with 25 times the data."""
    errors = []
    for n in (2_000, 50_000):
        problem, rows = drawn(0.8, n)
        fitted = fitted_soft_q(rows, actions=ACTIONS, discount=0.8, basis=one_hot(STATES))
        exact = problem.soft_value_iteration(1e-12).q
        errors.append(np.sqrt(np.mean((fitted(np.arange(STATES)) - exact) ** 2)))
    assert errors[1] < 0.03
    assert errors[1] < errors[0] / 2


def test_a_change_of_basis_changes_nothing():
    _, rows = drawn(0.9)
    turn = np.random.default_rng(0).normal(size=(STATES, STATES))
    plain, turned = (
        fitted_soft_q(rows, actions=ACTIONS, discount=0.9, basis=basis)
        for basis in (one_hot(STATES), lambda state: turn[state])
    )
    state = np.arange(STATES)
    np.testing.assert_allclose(plain(state), turned(state), atol=1e-7)


def test_nothing_is_earned_after_the_end():
    problem = TabularMDP.gridworld(3, 3, 0.95, slip=0.2)
    rows = problem.sample(5000, seed=0)
    live = ~problem.terminal
    basis = one_hot(9)
    fitted = fitted_soft_q(
        rows, actions=4, discount=0.95, basis=lambda state: basis(state)[:, live]
    )
    exact = TabularMDP.empirical(rows, 9, 4, 0.95).soft_policy_iteration(1e-12)
    np.testing.assert_allclose(fitted(np.flatnonzero(live)), exact.q[live], atol=1e-8)


def test_a_network_with_a_parameter_a_pair_agrees_with_the_table():
    _, rows = drawn(0.6)
    exact = fitted_soft_q(rows, actions=ACTIONS, discount=0.6, basis=one_hot(STATES))
    network = Table()
    options = FitOptions(steps=250, batch_size=100, learning_rate=0.05)
    fits = fit_soft_q_network(network, rows, discount=0.6, rounds=14, options=options)
    error = abs(network.values.detach().numpy() - exact(np.arange(STATES))).max()
    assert error < 0.03
    assert len(fits) == 14


def test_a_network_is_fitted_alike_whatever_the_global_seed():
    _, rows = drawn(0.6)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        network = Table()
        fit_soft_q_network(network, rows, discount=0.6, rounds=2, options=FitOptions(steps=20))
        assert torch.equal(torch.get_rng_state(), state)
        found.append(network.values.detach())
    assert torch.equal(*found)


def test_divergence_is_told_with_what_to_do():
    """Two states with features 1 and 2 that both lead to the second, one action.

    Least squares on an even draw give ``w <- 6/5 discount w + reward``: it diverges at 0.9 and
    settles at 0.8 (Tsitsiklis & Van Roy, 1996).
    """
    rows = Transitions(np.array([0, 1]), np.array([0, 0]), np.array([1.0, 2.0]), np.array([1, 1]))

    def basis(state):
        return np.array([[1.0], [2.0]])[state]

    settled = fitted_soft_q(rows, actions=1, discount=0.8, basis=basis)
    assert settled.weights[0, 0] == pytest.approx(1 / (1 - 1.2 * 0.8))
    with pytest.raises(TrainingError, match="diverges.*discount 0.9"):
        fitted_soft_q(rows, actions=1, discount=0.9, basis=basis)
    with pytest.raises(TrainingError, match="did not settle in 10 rounds"):
        fitted_soft_q(rows, actions=1, discount=0.8, basis=basis, iterations=10)


def test_weights_that_the_data_do_not_determine_are_refused():
    _, rows = drawn(0.5)
    part = rows[(rows.state != 2) | (rows.action != 1)]
    with pytest.raises(ValueError, match="rows with action 1 do not determine its 4 weights"):
        fitted_soft_q(part, actions=ACTIONS, discount=0.5, basis=one_hot(STATES))
    fitted = fitted_soft_q(part, actions=ACTIONS, discount=0.5, basis=one_hot(STATES), ridge=1e-6)
    assert fitted.weights[2, 1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"discount": 1.0}, "discount"),
        ({"ridge": -1.0}, "ridge is -1"),
        ({"actions": 2}, "action is 2 in row"),
    ],
)
def test_bad_arguments_are_named(change, message):
    _, rows = drawn(0.5)
    arguments = {"actions": ACTIONS, "discount": 0.5, "ridge": 0.0} | change
    with pytest.raises(ValueError, match=message):
        fitted_soft_q(rows, basis=one_hot(STATES), **arguments)


def test_an_unobserved_reward_is_refused():
    rows = Transitions(np.array([0]), np.array([0]), np.array([np.nan]), np.array([0]))
    with pytest.raises(ValueError, match="reward is not observed in row 0"):
        fitted_soft_q(rows, actions=1, discount=0.5, basis=one_hot(1))
