import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.bellman import TabularMDP, solve
from holdfast.bellman.solve import soft_policy, soft_value, soft_value_iteration
from holdfast.errors import HoldfastError

MODELS = {
    "random": lambda b: TabularMDP.random(8, 3, b, seed=2),
    "sparse": lambda b: TabularMDP.random(300, 3, b, seed=2, successors=4),
    "chain": lambda b: TabularMDP.chain(40, b),
    "grid": lambda b: TabularMDP.gridworld(5, 6, b, goal=8.0),
    "bus": lambda b: TabularMDP.bus(30, b, drives_on=True),
}


def plain_iteration(model: TabularMDP, sweeps: int) -> np.ndarray:
    """Value iteration as a text book has it, with nothing extrapolated."""
    q = np.zeros_like(model.rewards)
    for _ in range(sweeps):
        v = np.where(model.terminal, 0.0, np.log(np.exp(q).sum(1)))
        q = model.rewards + model.discount * (model.kernel @ v).reshape(q.shape)
    return q


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("discount", [0.0, 0.5, 0.9])
def test_both_routes_agree_with_plain_iteration(name, discount):
    model = MODELS[name](discount)
    expected = plain_iteration(model, 400)
    live = ~model.terminal
    for found in (model.soft_value_iteration(1e-11), model.soft_policy_iteration(1e-11)):
        assert found.residual <= 1e-11
        np.testing.assert_allclose(found.q[live], expected[live], atol=1e-9)
        np.testing.assert_allclose(found.policy.sum(1), 1.0)


@pytest.mark.parametrize("name", MODELS)
def test_newton_reaches_1e_10_at_a_discount_of_0_9999(name):
    model = MODELS[name](0.9999)
    found = model.soft_policy_iteration(1e-10)
    residual = np.abs(model.backup(found.q) - found.q)[~model.terminal].max()
    assert residual < 1e-10 and found.iterations < 30


def test_value_iteration_reaches_1e_10_at_a_discount_of_0_9999():
    model = MODELS["bus"](0.9999)
    found = model.soft_value_iteration(1e-10)
    exact = model.soft_policy_iteration(1e-10)
    assert np.abs(model.backup(found.q) - found.q).max() <= 1e-10
    assert np.abs(found.q - exact.q).max() <= 2e-10 / (1 - 0.9999)


def test_values_are_nearer_than_their_residual_tells():
    """The part of the last change that all states share goes into the result too."""
    model = MODELS["random"](0.99)
    found, exact = model.soft_value_iteration(1e-10), model.soft_policy_iteration(1e-13)
    assert np.abs(found.q - exact.q).max() <= 1e-9 < 1e-10 / (1 - 0.99)


def test_one_state_in_closed_form():
    """One state, two actions of reward r: V = r + log 2 + b V."""
    model = TabularMDP(np.ones((1, 2, 1)), [[0.3, 0.3]], 0.9)
    found = model.soft_value_iteration(1e-12)
    assert found.v[0] == pytest.approx((0.3 + np.log(2)) / 0.1)
    assert found.policy.tolist() == [[0.5, 0.5]]


def test_an_end_is_worth_nothing():
    """From state 0, both actions end: Q is the reward alone."""
    kernel = np.zeros((2, 2, 2))
    kernel[:, :, 1] = 1.0
    model = TabularMDP(kernel, [[1.0, 2.0], [50.0, 50.0]], 0.9, terminal=[False, True])
    for found in (model.soft_value_iteration(), model.soft_policy_iteration()):
        np.testing.assert_allclose(found.q, [[1.0, 2.0], [0.0, 0.0]])
        assert found.v[0] == pytest.approx(np.log(np.e + np.e**2)) and found.v[1] == 0.0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(-5, 5), st.floats(0, 0.98))
def test_a_constant_reward_moves_values_by_its_discounted_sum(seed, shift, discount):
    model = TabularMDP.random(4, 3, discount, seed=seed)
    moved = TabularMDP(model.transitions, model.rewards + shift, discount)
    first, second = model.soft_policy_iteration(), moved.soft_policy_iteration()
    np.testing.assert_allclose(second.q - first.q, shift / (1 - discount), atol=1e-8)
    np.testing.assert_allclose(second.policy, first.policy, atol=1e-9)


def test_large_values_do_not_overflow():
    q = np.array([[1000.0, 1000.0], [-1000.0, 0.0]])
    np.testing.assert_allclose(soft_value(q), [1000.0 + np.log(2), 0.0])
    np.testing.assert_allclose(soft_policy(q), [[0.5, 0.5], [0.0, 1.0]])


def test_a_bad_tolerance_and_too_few_sweeps_are_told():
    model = TabularMDP.chain(20, 0.99)
    with pytest.raises(ValueError, match="tolerance is 0"):
        model.soft_value_iteration(0.0)
    with pytest.raises(HoldfastError, match="after 3 sweeps.*soft_policy_iteration"):
        soft_value_iteration(model, 1e-10, max_sweeps=3)


def test_what_stands_in_the_row_of_an_end_is_never_read():
    """A huge number there must not pass for rounding error elsewhere."""
    kernel = np.zeros((3, 1, 3))
    kernel[[0, 1, 2], 0, [1, 0, 2]] = 1.0
    kernel[0, 0] = [0.0, 0.5, 0.5]
    model = TabularMDP(kernel, [[1.0], [2.0], [1e14]], 0.9, terminal=[False, False, True])
    first = 1.9 / (1 - 0.9 * 0.45)  # q0 = 1 + 0.45 q1 and q1 = 2 + 0.9 q0
    for found in (model.soft_value_iteration(1e-12), model.soft_policy_iteration(1e-12)):
        np.testing.assert_allclose(found.q[:, 0], [first, 2 + 0.9 * first, 0.0], atol=1e-11)


def test_where_products_do_not_settle_factors_do(monkeypatch):
    sparse_model = TabularMDP.random(40, 2, 0.95, seed=3, successors=3)
    wanted = TabularMDP(
        sparse_model.kernel.toarray().reshape(40, 2, 40), sparse_model.rewards, 0.95
    )
    monkeypatch.setattr(solve, "bicgstab", lambda system, rewards, **_: (0.0 * rewards, 1))
    found = sparse_model.soft_policy_iteration(1e-12)
    np.testing.assert_allclose(found.q, wanted.soft_policy_iteration(1e-12).q, atol=1e-9)
