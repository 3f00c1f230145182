import numpy as np
import pytest

from holdfast.bellman import (
    Constant,
    Harmonic,
    Linear,
    Networks,
    SaddleProblem,
    Sgda,
    TabularMDP,
    Transitions,
    measure_influence,
    mlp,
    rank_influence,
    stability_margin,
)

MODEL = TabularMDP.bus(
    3, 0.6, cost=0.5, replacement=0.6, increments=(0.6, 0.3, 0.1), drives_on=True
)


def test_shifts_are_those_of_solving_again():
    """Against a loop over rows and replacements, with the drawn replacements redone."""
    data = MODEL.sample_trajectories(8, 25, seed=1)
    problem = SaddleProblem.tabular(data, 0.6, anchor_action=1)
    found = rank_influence(problem, draws=2, seed=5)
    others = np.random.default_rng(5).integers(len(data), size=2)

    def reward(rows: Transitions) -> np.ndarray:
        q, zeta = problem.with_transitions(rows).exact()
        return q - 0.6 * zeta

    base = reward(data)
    np.testing.assert_allclose(found.estimate, base)
    changes = np.array(
        [
            [reward(data.replaced(i, data[j : j + 1])) - base for j in others]
            for i in range(len(data))
        ]
    )
    np.testing.assert_allclose(found.influence, np.abs(changes).max((2, 3)).mean(1), atol=1e-10)
    np.testing.assert_allclose(found.shift, np.abs(changes).mean((0, 1)), atol=1e-10)
    low, high = np.quantile(changes.reshape(-1, 3, 2), [0.025, 0.975], axis=0)
    np.testing.assert_allclose(found.interval, [low, high], atol=1e-10)
    assert (np.diff(found.influence[found.ranking]) <= 0).all()
    assert sorted(found.ranking) == list(range(len(data)))


def test_an_outlier_ranks_first():
    model = TabularMDP.random(2, 2, 0.5, seed=0)
    data = model.sample(80, seed=0)
    reward = data.reward.copy()
    reward[17] += 30.0
    odd = Transitions(data.state, data.action, reward, data.next_state)
    found = rank_influence(SaddleProblem.tabular(odd, 0.5), draws=3)
    assert found.ranking[0] == 17
    assert found.influence[17] > 5 * np.median(found.influence)


def test_the_known_reward_of_an_anchor_does_not_move():
    data = MODEL.sample_trajectories(8, 25, seed=1)
    found = rank_influence(SaddleProblem.tabular(data, 0.6, anchor_action=1), draws=2)
    np.testing.assert_allclose(found.shift[:, 1], 0.0, atol=1e-12)
    assert (found.shift[:, 0] > 0).all()


def test_the_only_row_of_a_pair_is_what_the_answer_hangs_on():
    data = MODEL.sample_trajectories(8, 25, seed=1)
    first = np.flatnonzero((data.state == 0) & (data.action == 1))
    kept = np.delete(np.arange(len(data)), first[1:])
    found = rank_influence(SaddleProblem.tabular(data[kept], 0.6, anchor_action=1), draws=2)
    assert kept[found.ranking[0]] == first[0] and np.isinf(found.influence).sum() == 1
    assert np.isfinite(found.shift).all() and np.isfinite(found.interval).all()


def test_only_tables_are_solved_exactly():
    data = MODEL.sample(50, seed=0)
    with pytest.raises(ValueError, match="only tables"):
        rank_influence(SaddleProblem(data, 0.6, Linear(np.ones((3, 2, 1)))))


def test_a_part_of_the_rows_is_measured_as_all_are():
    problem = SaddleProblem.tabular(MODEL.sample_trajectories(8, 25, seed=1), 0.6, anchor_action=1)
    whole = rank_influence(problem, draws=2, seed=5)
    part = rank_influence(problem, rows=20, draws=2, seed=5)
    assert len(part.ranking) == 20 == np.isfinite(part.influence).sum()
    np.testing.assert_allclose(part.influence[part.ranking], whole.influence[part.ranking])


def test_coupled_runs_that_converge_move_as_the_exact_solution_does():
    model = TabularMDP.random(2, 2, 0.5, seed=0)
    data = model.sample(60, seed=0)
    problem = SaddleProblem.tabular(data, 0.5)
    step, momentum = stability_margin(problem, 4.0).tuned()
    settings = Sgda(400, Constant(0.5 * step), batch_size=None, momentum=momentum)
    found = measure_influence(problem, settings, rows=5, draws=2, seed=3)
    rng = np.random.default_rng(3)
    rows = np.sort(rng.choice(60, 5, replace=False))
    others = rng.integers(60, size=(5, 2))
    base = problem.exact()[0]
    changes = np.array(
        [
            [
                problem.with_transitions(data.replaced(i, data[j : j + 1])).exact()[0] - base
                for j in own
            ]
            for i, own in zip(rows, others, strict=True)
        ]
    )
    assert found.control == 0.0
    np.testing.assert_allclose(found.estimate, base, atol=1e-6)
    wanted = np.abs(changes).max((2, 3)).mean(1)
    np.testing.assert_allclose(found.influence[rows], wanted, atol=1e-6)
    np.testing.assert_allclose(found.shift, np.abs(changes).mean((0, 1)), atol=1e-6)
    assert np.isnan(np.delete(found.influence, rows)).all()


def test_networks_are_looked_at_where_the_data_are():
    rng = np.random.default_rng(0)
    state, ahead = rng.standard_normal((2, 40, 2))
    data = Transitions(state, rng.integers(2, size=40), np.ones(40), ahead)
    nets = Networks(mlp(2, (4,), 2, seed=0), mlp(2, (4,), 2, seed=1))
    problem = SaddleProblem(data, 0.5, nets, anchor_action=0)
    settings = Sgda(60, Harmonic(4.0, 40.0), batch_size=8)
    found = measure_influence(problem, settings, rows=3, probe=10)
    assert found.control == 0.0 and found.states.shape == (10, 2)
    assert found.shift.shape == (10, 2) and (found.shift > 0).all()
    assert {tuple(row) for row in found.states} <= {tuple(row) for row in state}
    with pytest.raises(ValueError, match="probe is 0"):
        measure_influence(problem, settings, probe=0)
