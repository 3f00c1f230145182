import numpy as np
import pytest
from scipy import sparse

from holdfast.bellman import TabularMDP, inverse_reward, inverse_values


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.95, 0.9999])
def test_the_reward_comes_back_from_choices(discount):
    model = TabularMDP.random(6, 3, discount, seed=4)
    solved = model.soft_policy_iteration(1e-12)
    found = inverse_reward(solved.policy, model.transitions, 1, model.rewards[:, 1], discount)
    np.testing.assert_allclose(found, model.rewards, atol=1e-9)
    q, v = inverse_values(solved.policy, model.transitions, 1, model.rewards[:, 1], discount)
    np.testing.assert_allclose(q, solved.q, atol=1e-10 / (1 - discount))
    np.testing.assert_allclose(v, solved.v, atol=1e-10 / (1 - discount))


def test_the_anchor_may_differ_by_state_and_the_model_be_sparse():
    model = TabularMDP.random(50, 3, 0.9, seed=4, successors=3)
    policy = model.soft_policy_iteration().policy
    anchor = np.arange(50) % 3
    known = model.rewards[np.arange(50), anchor]
    found = inverse_reward(policy, model.transitions, anchor, known, 0.9)
    assert sparse.issparse(model.transitions)
    np.testing.assert_allclose(found, model.rewards, atol=1e-8)


def test_a_large_sparse_model_is_inverted_to_rounding():
    """Factors of its system would fill gigabytes."""
    model = TabularMDP.random(20_000, 2, 0.99, seed=4, successors=4)
    policy = model.soft_value_iteration(1e-13).policy
    found = inverse_reward(policy, model.transitions, 1, model.rewards[:, 1], 0.99)
    np.testing.assert_allclose(found, model.rewards, atol=1e-12)


def test_terminal_states_have_no_reward():
    model = TabularMDP.gridworld(3, 3, 0.9)
    policy = model.soft_policy_iteration().policy
    found = inverse_reward(
        policy, model.transitions, 2, model.rewards[:, 2], 0.9, terminal=model.terminal
    )
    np.testing.assert_allclose(found[:8], model.rewards[:8], atol=1e-9)
    assert not found[8].any()


def test_a_wrong_anchor_shapes_the_reward():
    """Anchor rewards off by ``c(s)`` shift values by ``phi = (I - b P_anchor)^-1 c``.

    The recovered reward moves by ``phi(s) - b E[phi(s') | s, a]``, under which choices stay.
    """
    model = TabularMDP.random(5, 3, 0.9, seed=7)
    policy = model.soft_policy_iteration().policy
    c = np.random.default_rng(0).standard_normal(5)
    found = inverse_reward(policy, model.transitions, 0, model.rewards[:, 0] + c, 0.9)
    phi = np.linalg.solve(np.eye(5) - 0.9 * model.transitions[:, 0], c)
    shaping = phi[:, None] - 0.9 * model.transitions @ phi
    np.testing.assert_allclose(found - model.rewards, shaping, atol=1e-9)
    other = TabularMDP(model.transitions, found, 0.9).soft_policy_iteration().policy
    np.testing.assert_allclose(other, policy, atol=1e-10)


@pytest.mark.parametrize(
    ("policy", "anchor", "reward", "message"),
    [
        ([[1.0, 0.0], [0.5, 0.5]], 0, 0.0, "policy is 0.0 in state 0, action 1"),
        ([[0.5, 0.6], [0.5, 0.5]], 0, 0.0, "policy sums to 1.1 in state 0"),
        ([[0.5, 0.5], [0.5, 0.5]], 2, 0.0, "anchor_action is 2"),
        ([[0.5, 0.5], [0.5, 0.5]], 0.5, 0.0, "anchor_action must be an integer"),
        ([[0.5, 0.5], [0.5, 0.5]], 0, np.nan, "anchor_reward must be finite"),
        ([0.5, 0.5], 0, 0.0, "policy has shape"),
    ],
)
def test_what_cannot_be_inverted_is_refused(policy, anchor, reward, message):
    with pytest.raises(ValueError, match=message):
        inverse_reward(policy, np.full((2, 2, 2), 0.5), anchor, reward, 0.9)


def test_float32_inputs_are_taken():
    model = TabularMDP.random(30, 3, 0.9, seed=4)
    policy = model.soft_policy_iteration().policy.astype(np.float32)
    assert np.abs(policy.astype(np.float64).sum(1) - 1).max() > 1e-8
    found = inverse_reward(
        policy, model.transitions.astype(np.float32), 1, model.rewards[:, 1], 0.9
    )
    np.testing.assert_allclose(found, model.rewards, atol=1e-4)
