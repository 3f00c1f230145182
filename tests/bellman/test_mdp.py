import numpy as np
import pytest
from scipy import sparse

from holdfast.bellman import TabularMDP, Transitions


def test_a_dense_and_a_sparse_model_are_the_same():
    dense = TabularMDP.random(6, 3, 0.9, seed=1)
    thin = TabularMDP(sparse.csr_array(dense.kernel), dense.rewards, 0.9)
    q = np.random.default_rng(0).standard_normal((6, 3))
    np.testing.assert_allclose(dense.backup(q), thin.backup(q), atol=1e-14)
    first, second = dense.sample(100, seed=3), thin.sample(100, seed=3)
    np.testing.assert_array_equal(first.next_state, second.next_state)


def test_the_backup_is_the_formula_of_the_soft_operator():
    model = TabularMDP.random(4, 2, 0.7, seed=0)
    q = np.random.default_rng(1).standard_normal((4, 2))
    for s in range(4):
        for a in range(2):
            ahead = sum(model.transitions[s, a, x] * np.log(np.exp(q[x]).sum()) for x in range(4))
            expected = model.rewards[s, a] + 0.7 * ahead
            assert model.backup(q)[s, a] == pytest.approx(expected)


def test_frequencies_of_draws_approach_the_model():
    model = TabularMDP.random(5, 3, 0.8, seed=1)
    drawn = model.sample(100_000, seed=0)
    found = TabularMDP.empirical(drawn, 5, 3, 0.8)
    # Six standard errors of a share, of some 6,700 draws a pair.
    assert np.abs(found.kernel - model.kernel).max() < 6 * 0.5 / np.sqrt(100_000 / 15)
    np.testing.assert_allclose(found.rewards, model.rewards)


def test_draws_follow_the_law_and_the_seed():
    model = TabularMDP.random(3, 2, 0.8, seed=1)
    law = np.zeros((3, 2))
    law[2, 1] = 1.0
    drawn = model.sample(20, seed=0, law=law)
    assert set(zip(drawn.state.tolist(), drawn.action.tolist(), strict=True)) == {(2, 1)}
    np.testing.assert_array_equal(
        model.sample(50, seed=4).next_state, model.sample(50, seed=4).next_state
    )
    assert (model.sample(50, seed=4).next_state != model.sample(50, seed=5).next_state).any()


def test_impossible_transitions_are_never_drawn():
    model = TabularMDP.chain(7, 0.9, slip=0.2)
    drawn = model.sample(20_000, seed=0)
    assert np.abs(drawn.next_state - drawn.state).max() == 1
    slipped = drawn.next_state[(drawn.state == 3) & (drawn.action == 1)] == 2
    assert slipped.mean() == pytest.approx(0.2, abs=0.04)


def test_trajectories_hang_together_and_stop_at_the_end():
    model = TabularMDP.gridworld(3, 3, 0.9, goal=5.0)
    drawn = model.sample_trajectories(40, 60, seed=2)
    same = drawn.trajectory[1:] == drawn.trajectory[:-1]
    assert (drawn.state[1:][same] == drawn.next_state[:-1][same]).all()
    assert drawn.terminal.any() and not drawn.terminal[:-1][same].any()
    assert (drawn.next_state[drawn.terminal] == 8).all() and (drawn.state != 8).all()


def test_trajectories_choose_as_the_policy():
    model = TabularMDP.bus(5, 0.8, cost=0.3, replacement=1.0)
    policy = model.soft_policy_iteration().policy
    drawn = model.sample_trajectories(400, 50, seed=0)
    counts = drawn.counts(5, 2)
    shares = counts / counts.sum(1, keepdims=True)
    error = np.sqrt(policy * (1 - policy) / counts.sum(1, keepdims=True))
    assert (np.abs(shares - policy) < 5 * error).all()


def test_an_empirical_model_needs_every_pair_or_a_fallback():
    model = TabularMDP.random(3, 2, 0.8, seed=0)
    drawn = Transitions([0, 0], [0, 0], [1.0, 3.0], [1, 2])
    with pytest.raises(ValueError, match="state 0 with action 1 does not occur"):
        TabularMDP.empirical(drawn, 3, 2, 0.8)
    found = TabularMDP.empirical(drawn, 3, 2, 0.8, fallback=model)
    np.testing.assert_allclose(found.transitions[0, 0], [0.0, 0.5, 0.5])
    assert found.rewards[0, 0] == 2.0
    np.testing.assert_allclose(found.transitions[2], model.transitions[2])


def test_terminal_states_are_learned_from_data():
    model = TabularMDP.gridworld(2, 2, 0.9)
    found = TabularMDP.empirical(model.sample(2000, seed=0), 4, 4, 0.9)
    np.testing.assert_array_equal(found.terminal, model.terminal)
    with pytest.raises(ValueError, match="terminal in some rows but not in row 1"):
        TabularMDP.empirical(
            Transitions([0, 0], [0, 0], [0, 0], [1, 1], terminal=[True, False]), 2, 1, 0.9
        )


def test_the_bus_is_the_task_it_is_named_after():
    model = TabularMDP.bus()
    assert model.rewards[3].tolist() == [-4.0, -5.0]
    assert model.transitions[3, 0].nonzero()[0].tolist() == [4, 5, 6, 7]
    assert model.transitions[18, 0, 19] == pytest.approx(1.0)
    assert model.transitions[:, 1, 0].tolist() == [1.0] * 20
    driven = TabularMDP.bus(drives_on=True)
    np.testing.assert_allclose(driven.transitions[7, 1], driven.transitions[0, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"discount": 1.0}, "discount is 1.0"),
        ({"discount": -0.1}, "discount"),
        ({"discount": float("nan")}, "discount"),
        ({"rewards": np.full((2, 1), np.nan)}, "rewards is nan in state 0"),
        ({"rewards": np.zeros(2)}, "rewards has shape"),
        ({"transitions": np.full((2, 1, 2), 0.4)}, "sum to 0.8 in state 0, action 0"),
        ({"transitions": np.full((2, 2), 0.5)}, "transitions has shape"),
        ({"transitions": np.array([[[1.5, -0.5]], [[0.5, 0.5]]])}, "entry -0.5"),
        ({"transitions": np.full((2, 1, 2), np.inf)}, "not finite"),
        ({"terminal": [True]}, "terminal has shape"),
        ({"terminal": [True, True]}, "terminal is true of every state"),
    ],
)
def test_what_is_no_decision_problem_is_refused(change, message):
    given = {
        "transitions": np.full((2, 1, 2), 0.5),
        "rewards": np.zeros((2, 1)),
        "discount": 0.9,
    }
    with pytest.raises(ValueError, match=message):
        TabularMDP(**(given | change))


def test_rows_that_were_rounded_to_float32_are_taken_and_sum_to_one():
    exact = TabularMDP.random(50, 3, 0.9, seed=0)
    rough = TabularMDP(exact.transitions.astype(np.float32), exact.rewards, 0.9)
    assert np.abs(exact.kernel.astype(np.float32).sum(1) - 1).max() > 1e-8, "rounding shows"
    np.testing.assert_allclose(rough.kernel.sum(1), 1.0, atol=1e-15)
    np.testing.assert_allclose(rough.kernel, exact.kernel, atol=1e-7)
    thin = TabularMDP(sparse.csr_array(exact.kernel.astype(np.float32)), exact.rewards, 0.9)
    np.testing.assert_allclose(thin.kernel.toarray(), rough.kernel, atol=1e-15)
    policy = rough.soft_policy_iteration().policy.astype(np.float32)
    law = (policy / np.float32(50)).astype(np.float32)
    assert len(rough.sample(5, seed=0, law=law)) == 5
    assert len(rough.sample_trajectories(2, 3, seed=0, policy=policy)) == 6


def test_moves_in_a_grid_cost_as_told():
    """Two by two, slip 0.2, the end in the corner: a share of the goal where a move may lead."""
    model = TabularMDP.gridworld(2, 2, 0.9, slip=0.2, goal=5.0)
    up, right, down, left = (-0.04, -0.04, -0.04, -0.04)
    np.testing.assert_allclose(model.rewards[0], [up, right, down, left])  # the end is not near
    # State 1 is above the end: down leads there, and slips of the moves across do.
    np.testing.assert_allclose(model.rewards[1], [-0.04, 0.46, 3.96, 0.46])
    np.testing.assert_allclose(model.transitions.toarray()[1 * 4 + 1], [0.0, 0.9, 0.0, 0.1])
    np.testing.assert_allclose(model.transitions.toarray()[1 * 4 + 3], [0.8, 0.1, 0.0, 0.1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.sample(-1, seed=0), "n is -1: it must be at least 1"),
        (lambda m: m.sample_trajectories(1, 0, seed=0), "length is 0"),
        (lambda m: m.sample(3, seed=0, law=np.full((2, 1), 0.4)), "law sums to 0.8"),
        (lambda m: m.sample(3, seed=0, law=np.ones(2)), "law has shape"),
        (lambda m: m.sample_trajectories(1, 1, seed=0, policy=[[1.0], [2.0]]), "in state 1"),
        (lambda m: m.sample_trajectories(1, 1, seed=0, policy=[[1.0]]), "policy has shape"),
        (lambda m: m.sample_trajectories(1, 1, seed=0, initial=[1.5, -0.5]), "initial sums to 1"),
        (lambda m: m.sample_trajectories(1, 1, seed=0, initial=[1.0]), "initial has shape"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(call, message):
    model = TabularMDP(np.full((2, 1, 2), 0.5), np.zeros((2, 1)), 0.9)
    with pytest.raises(ValueError, match=message):
        call(model)
