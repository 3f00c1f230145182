import numpy as np
import pytest
import torch

from holdfast.bellman import (
    Constant,
    Harmonic,
    Linear,
    SaddleProblem,
    Sgda,
    Tables,
    TabularMDP,
    Transitions,
    bellman_saddle,
    solve_saddle,
)
from holdfast.bellman.problem import Batch
from holdfast.bellman.sgda import descend_ascend, harmonic, row_curvature
from holdfast.errors import TrainingError

MODEL = TabularMDP.random(3, 2, 0.5, seed=0)


def run(datasets, settings: Sgda, **options):
    problem = SaddleProblem.tabular(datasets[0], 0.5, states=3, actions=2)
    return descend_ascend(problem, Batch.stack(datasets), settings, **options)


@pytest.mark.parametrize(
    ("optimiser", "discount"),
    [("adam", 0.0), ("adam", 0.8), ("adam", 0.9), ("sgd", 0.0), ("sgd", 0.8), ("sgd", 0.95)],
)
def test_defaults_reach_the_empirical_solution(optimiser, discount):
    model = TabularMDP.random(4, 2, discount, seed=1)
    data = model.sample(1000, seed=0)
    exact = TabularMDP.empirical(data, 4, 2, discount).soft_policy_iteration(1e-12)
    found = solve_saddle(data, discount=discount, optimiser=optimiser)
    np.testing.assert_allclose(found.q, exact.q, atol=1e-6)
    np.testing.assert_allclose(found.v, exact.v, atol=1e-6)
    np.testing.assert_allclose(found.policy, exact.policy, atol=1e-6)
    empirical = TabularMDP.empirical(data, 4, 2, discount)
    np.testing.assert_allclose(found.reward, empirical.rewards, atol=1e-6)
    assert found.gradient <= 1e-10


def test_defaults_reach_the_inverse_solution():
    model = TabularMDP.bus(4, 0.8, cost=0.3, replacement=1.0, drives_on=True)
    data = model.sample_trajectories(60, 40, seed=0)
    exact, _ = SaddleProblem.tabular(data, 0.8, anchor_action=1).exact()
    found = solve_saddle(data, discount=0.8, anchor_action=1)
    np.testing.assert_allclose(found.q, exact, atol=1e-6)


def test_terminal_states_are_worth_nothing():
    model = TabularMDP.gridworld(2, 2, 0.9, goal=3.0)
    data = model.sample(800, seed=0)
    exact = TabularMDP.empirical(data, 4, 4, 0.9).soft_policy_iteration(1e-12)
    np.testing.assert_allclose(solve_saddle(data, discount=0.9).q[:3], exact.q[:3], atol=1e-6)


def test_a_step_is_what_the_loss_says():
    """One step from 0 against the gradients of the pure loss: down in q, up in zeta."""
    data = MODEL.sample(40, seed=0)
    q, zeta = (torch.zeros(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    terms = bellman_saddle(q, zeta, data, discount=0.5)
    down, up = torch.autograd.grad(terms.total / terms.count, (q, zeta))
    settings = Sgda(steps=1, step=Constant(0.1), step_ratio=3.0, batch_size=None)
    found = run([data], settings)
    torch.testing.assert_close(found.primal[0], -0.1 * down.flatten())
    torch.testing.assert_close(found.dual[0], 0.3 * up.flatten())


def test_equal_rows_once_with_their_share_are_all_rows():
    data = MODEL.sample(300, seed=0)
    problem = SaddleProblem.tabular(data, 0.5)
    settings = Sgda(steps=30, step=Constant(0.3), batch_size=None)
    whole = descend_ascend(problem, Batch.stack([data]), settings)
    compact = descend_ascend(problem, problem.compact(), settings)
    assert problem.compact().action.shape[1] <= 18
    torch.testing.assert_close(whole.primal, compact.primal)


def test_single_rows_and_harmonic_steps_close_in_on_the_solution():
    data = MODEL.sample(200, seed=0)
    q, _ = SaddleProblem.tabular(data, 0.5).exact()
    settings = Sgda(steps=3000, step=Harmonic(40.0, 75.6), step_ratio=2.0)
    found = run([data], settings, record=(300,))

    def error(primal):
        return np.linalg.norm(primal[0].numpy() - q.ravel())

    assert error(found.primal) < 0.2 and error(found.primal) < 0.5 * error(found.record[300][0])


def test_replicas_do_not_mix():
    """Each run of a batch is, to the bit, what it is alone, or beside others."""
    datasets = [MODEL.sample(60, seed=i) for i in range(5)]
    for settings in (
        Sgda(steps=300, step=Harmonic(4.0, 20.0), batch_size=2, replacement=False),
        Sgda(steps=300, step=Constant(0.01), optimiser="adam"),
    ):
        together = run(datasets, settings, groups=range(5))
        for i in (0, 4):
            alone = run([datasets[i]], settings, groups=[i])
            assert torch.equal(alone.primal[0], together.primal[i])
            assert torch.equal(alone.dual[0], together.dual[i])


def test_coupled_runs_are_alike_until_they_meet_the_replaced_row():
    data = MODEL.sample(50, seed=0)
    other = MODEL.sample(1, seed=99, law=np.eye(6)[0].reshape(3, 2))
    row = int(np.flatnonzero(data.state != 0)[0])
    settings = Sgda(steps=60, step=Constant(0.05), replacement=False)
    found = run([data, data.replaced(row, other)], settings, record=range(1, 61))
    apart = [not torch.equal(*found.record[t][0]) for t in range(1, 61)]
    first = apart.index(True)
    # Shuffled, not drawn: within 50 steps every row is met, and this one but once.
    assert 0 <= first < 50 and not any(apart[:first]) and all(apart[first:])


def test_without_replacement_every_row_is_met_once_a_pass():
    """At a discount of 0, a step of 1/2 on a row sets its pair to the reward it holds."""
    data = Transitions([0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1], np.arange(6.0), [0] * 6)
    problem = SaddleProblem.tabular(data, 0.0)
    settings = Sgda(steps=6, step=Constant(0.5), replacement=False)
    found = descend_ascend(problem, Batch.stack([data]), settings, seed=5)
    np.testing.assert_allclose(found.primal[0].view(3, 2).numpy().T.ravel(), np.arange(6.0))


def test_parameters_stay_in_the_ball():
    settings = Sgda(steps=200, step=Constant(0.3), radius=0.5)
    found = run([MODEL.sample(60, seed=0)], settings, record=range(1, 201))
    norms = torch.stack([primal.norm() for primal, _ in found.record.values()])
    assert (norms <= 0.5 + 1e-12).all() and norms.max() > 0.49


def test_the_average_is_that_of_the_last_iterates():
    settings = Sgda(steps=40, step=Constant(0.2), averaging=0.25)
    found = run([MODEL.sample(60, seed=0)], settings, record=range(1, 41))
    last = torch.stack([found.record[t][0] for t in range(31, 41)])
    torch.testing.assert_close(found.primal, last.mean(0))


def test_adam_is_that_of_torch():
    data = MODEL.sample(30, seed=0)
    problem = SaddleProblem.tabular(data, 0.5)
    settings = Sgda(
        steps=25, step=Constant(0.05), step_ratio=2.0, optimiser="adam", batch_size=None
    )
    found = descend_ascend(problem, problem.compact(), settings)
    q, zeta = (torch.zeros(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    groups = [{"params": [q], "lr": 0.05}, {"params": [zeta], "lr": 0.1, "maximize": True}]
    optimiser = torch.optim.Adam(groups)
    for _ in range(25):
        optimiser.zero_grad()
        terms = bellman_saddle(q, zeta, data, discount=0.5)
        (terms.total / terms.count).backward()
        optimiser.step()
    torch.testing.assert_close(found.primal[0].view(3, 2), q.detach(), atol=1e-9, rtol=0)
    torch.testing.assert_close(found.dual[0].view(3, 2), zeta.detach(), atol=1e-9, rtol=0)


def test_a_setting_that_would_diverge_is_refused_before_it_does():
    data = TabularMDP.random(4, 2, 0.95, seed=0).sample(1000, seed=0)
    with pytest.raises(TrainingError, match="set step_ratio to"):
        solve_saddle(data, discount=0.95, step_ratio=1.0)
    with pytest.raises(TrainingError, match="is too large"):
        solve_saddle(data, discount=0.95, step=50.0, optimiser="sgd")


def test_a_divergence_is_told_unless_it_is_wanted():
    data = MODEL.sample(60, seed=0)
    settings = Sgda(steps=600, step=Constant(30.0), batch_size=None)
    with pytest.raises(TrainingError, match="diverged within"):
        run([data], settings)
    assert not (run([data], settings, may_diverge=True).primal.abs() < 1e9).all()


def test_a_pair_that_does_not_occur_is_named():
    data = Transitions([0, 0, 1], [0, 1, 0], [0.0, 0.0, 0.0], [1, 0, 0])
    with pytest.raises(ValueError, match="state 1 with action 1 does not occur"):
        solve_saddle(data, discount=0.5)


def test_an_anchor_never_taken_is_refused():
    with pytest.raises(ValueError, match="anchor_action is 5: it was never taken"):
        solve_saddle(MODEL.sample(60, seed=0), discount=0.5, anchor_action=5)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"step_ratio": 0.0},
        {"batch_size": 0},
        {"momentum": 1.0},
        {"averaging": -0.1},
        {"radius": 0.0},
        {"optimiser": "lion"},
    ],
)
def test_numbers_out_of_range_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Sgda(**({"steps": 1, "step": Constant(0.1)} | change))


def test_a_solution_says_how_far_it_may_be_and_warns():
    data = TabularMDP.random(4, 2, 0.8, seed=1).sample(1000, seed=0)
    exact, _ = SaddleProblem.tabular(data, 0.8).exact()
    found = solve_saddle(data, discount=0.8)
    assert found.converged and found.residual < 1e-7
    with pytest.warns(RuntimeWarning, match="not converged after 40 steps.*give more steps"):
        early = solve_saddle(data, discount=0.8, steps=40)
    assert not early.converged
    off = np.abs(early.q - exact).max()
    assert 1e-3 < off <= early.residual / (1 - 0.8)
    assert early.residual <= 2 * off, "no loose bound either"


def test_an_inverse_solution_says_how_far_it_may_be():
    model = TabularMDP.bus(4, 0.8, cost=0.3, replacement=1.0, drives_on=True)
    data = model.sample_trajectories(60, 40, seed=0)
    exact, _ = SaddleProblem.tabular(data, 0.8, anchor_action=1).exact()
    with pytest.warns(RuntimeWarning):
        early = solve_saddle(data, discount=0.8, anchor_action=1, steps=100)
    off = np.abs(early.q - exact).max()
    assert not early.converged and 1e-3 < off <= 3 * early.residual / (1 - 0.8)


def test_an_end_has_no_value():
    data = TabularMDP.gridworld(2, 2, 0.6).sample(400, seed=0)
    found = solve_saddle(data, discount=0.6)
    assert found.v[3] == 0.0 and (np.abs(found.v[:3]) > 0.1).all()


@pytest.mark.filterwarnings("ignore:solve_saddle has not converged")
def test_the_anchor_may_differ_by_state():
    model = TabularMDP.bus(4, 0.6, cost=0.3, replacement=1.0, drives_on=True)
    data = model.sample_trajectories(60, 40, seed=0)
    anchor = np.array([0, 1, 1, 0])
    exact, zeta = SaddleProblem.tabular(data, 0.6, anchor_action=anchor).exact()
    found = solve_saddle(data, discount=0.6, anchor_action=anchor)
    np.testing.assert_allclose(found.q, exact, atol=1e-6)
    known = model.rewards[np.arange(4), anchor]
    np.testing.assert_allclose((exact - 0.6 * zeta)[np.arange(4), anchor], known, atol=1e-10)


def test_harmonic_steps_have_twice_the_inverse_margin_as_scale():
    step = harmonic(0.5, 2.0, 0.1)
    assert (step.scale, step.offset) == (20.0, 20.0 * 2 * 2 * 1.5**2)
    assert harmonic(0.9, 10.0, 0.1).offset == pytest.approx(20.0 * 2 * 20 * 0.81)
    assert harmonic(0.5, 2.0, 0.1, curvature=50.0).offset == 2000.0


@pytest.mark.parametrize("anchor", [None, 1])
@pytest.mark.parametrize("linear", [False, True])
def test_the_curvature_of_a_row_is_bounded(anchor, linear):
    """Against the largest eigenvalues of the Hessians of single rows, at random parameters."""
    rng = np.random.default_rng(0)
    data = TabularMDP.random(3, 2, 0.9, seed=0).sample(40, seed=0)
    functions = Linear(3.0 * rng.standard_normal((3, 2, 4))) if linear else Tables(3, 2)
    problem = SaddleProblem(data, 0.9, functions, anchor, 1.0 if anchor is None else 5.0)
    ratio = 6.0
    largest = 0.0
    for row in range(len(data)):
        batch = Batch.stack([data[row : row + 1]])
        size = len(functions.initial()[0])
        w, v = (torch.tensor(rng.standard_normal(size)) for _ in range(2))

        def down(x, v=v, batch=batch):
            return problem.losses(x[None], v[None], batch)[0][0]

        def up(x, w=w, batch=batch):
            return problem.losses(w[None], x[None], batch)[1][0]

        for scale, curve, at in ((1.0, down, w), (ratio, up, v)):
            hessian = torch.autograd.functional.hessian(curve, at)
            largest = max(largest, scale * float(torch.linalg.eigvalsh(hessian).max()))
    bound = row_curvature(problem, ratio)
    assert 0.2 * bound < largest <= bound * (1 + 1e-12)


def test_the_dual_stays_in_the_ball_and_is_averaged_too():
    data = [MODEL.sample(60, seed=0)]
    settings = Sgda(steps=200, step=Constant(0.3), radius=0.5)
    found = run(data, settings, record=range(1, 201))
    norms = torch.stack([dual.norm() for _, dual in found.record.values()])
    assert (norms <= 0.5 + 1e-12).all() and norms.max() > 0.49
    settings = Sgda(steps=40, step=Constant(0.2), averaging=0.25)
    found = run(data, settings, record=range(1, 41))
    last = torch.stack([found.record[t][1] for t in range(31, 41)])
    torch.testing.assert_close(found.dual, last.mean(0))
