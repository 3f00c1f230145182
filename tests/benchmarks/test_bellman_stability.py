"""The bed's constants against autograd, coupled runs, and the counterexamples."""

import numpy as np
import pytest
import torch

from benchmarks.bellman_convergence.dynamics import Models
from benchmarks.bellman_stability import bed, coupled, run, steps
from holdfast.bellman import Transitions, bellman_saddle
from holdfast.bellman.generalization import empirical_risk

LAW = np.full(6, 1 / 6)


def loss(z, one, s, a, ahead):
    row = Transitions([s], [a], [one.rewards[s, a]], [ahead])
    q, zeta = z.reshape(2, bed.STATES, bed.ACTIONS)
    return bellman_saddle(q, zeta, row, discount=one.discount).total


# The bed ------------------------------------------------------------------------------------------


def test_gradients_and_curvature_of_single_samples_are_those_of_autograd():
    one = bed.model()
    w, v = np.random.default_rng(0).standard_normal((2, 6))
    first, second = bed.per_sample(one, w, v)
    most = 0.0
    for s, a, ahead in np.ndindex(3, 2, 3):
        z = torch.tensor(np.concatenate([w, v]), requires_grad=True)
        (slope,) = torch.autograd.grad(loss(z, one, s, a, ahead), z)
        found = np.concatenate([first[2 * s + a, ahead], second[2 * s + a, ahead]])
        np.testing.assert_allclose(found, slope.numpy(), rtol=1e-12, atol=1e-13)
        hessian = torch.autograd.functional.hessian(
            lambda z, s=s, a=a, ahead=ahead: loss(z, one, s, a, ahead), z.detach()
        )
        most = max(most, float(torch.linalg.matrix_norm(hessian, 2)))
    assert bed.largest_curvature(one, w, v) == pytest.approx(most, rel=1e-10)


def test_pl_constant_bounds_below_and_is_above_its_own_floor():
    one = bed.model()
    mu = bed.pl_constant(one, LAW)
    assert mu >= 2 * (1 / 6) * 0.25 / 6
    checked = bed.pl_check(one, 100)
    assert checked["pl"] >= 1 and checked["growth"] >= 1
    # A finer grid of policies finds little that is smaller.
    assert bed.pl_constant(one, LAW, grid=31) == pytest.approx(mu, rel=0.01)


def test_strong_concavity_is_the_least_curvature_of_the_dual():
    _, _, dual = Models.stack([bed.model()]).hessian()
    assert -np.linalg.eigvalsh(dual[0]).max() == pytest.approx(bed.strong_concavity(0.5, LAW))


def test_variances_are_sums_over_next_states():
    one = bed.model()
    v = one.soft_policy_iteration(1e-12).v
    mean = one.transitions @ v
    expected = (one.transitions * (v - mean[..., None]) ** 2).sum(-1)
    np.testing.assert_allclose(bed.variances(one), expected, atol=1e-12)


# Coupled runs -------------------------------------------------------------------------------------


def test_coupled_runs_of_one_data_set_are_equal_and_others_are_not():
    setting = coupled.Setting(cap=200)
    found = coupled.measure(setting, 40, datasets=2, replaced=3, seed=0)
    assert found["control"] == 0.0 and found["least_count"] >= 3
    assert found["marks"] == {"n": 40, "10n": 400, "n2": 200}
    assert all(len(found[mark]["distance"]) == 2 for mark in ("n", "10n", "n2"))
    assert np.mean(found["10n"]["error"]) < np.mean(found["n"]["error"])
    free = coupled.measure(coupled.Setting(coupled=False), 40, datasets=2, replaced=3, seed=0)
    assert free["control"] > 0.0
    assert free["shift"] == found["shift"]  # The same data.


def test_long_runs_are_as_far_apart_as_their_saddles():
    """Full steps without noise would be exactly so; harmonic ones come near."""
    setting = coupled.Setting(ratio=4.0, scale=16.0)
    found = coupled.measure(setting, 100, datasets=4, replaced=6, seed=1)
    assert np.mean(found["10n"]["distance"]) == pytest.approx(np.mean(found["shift"]), rel=0.6)


def test_rows_that_were_never_visited_leave_no_trace():
    found = coupled.measure(coupled.Setting(), 50, datasets=2, replaced=40, seed=0)
    line = run.line_of({50: found, 51: found})["marks"]["n"]
    assert line["same"][0] == pytest.approx(line["same_expected"][0], abs=0.15)
    assert found["10n"]["same"] < found["n"]["same"]


def test_several_models_take_turns():
    found = coupled.measure(coupled.Setting(models=2), 60, datasets=2, replaced=2, seed=0)
    assert found["shift"][0] != found["shift"][1]


def test_every_job_is_named_once_and_sizes_are_those_of_its_setting():
    keys = list(run.jobs())
    assert len(keys) == len(set(keys)) == 4 + sum(len(run.sizes(name)) for name in run.SETTINGS)


def test_slopes_of_inverse_sizes():
    ns = np.array([64, 128, 256, 512, 1024])
    line = run.describe(ns, 3.0 / ns[:, None] * np.ones((5, 4)))
    assert line["slope"] == pytest.approx([-1, -1, -1])
    assert line["n_times"] == pytest.approx([3.0] * 5)


# Counterexamples ----------------------------------------------------------------------------------


def test_the_recursion_grows_by_the_power_that_its_sign_gives():
    found = steps.lost_sign(0.2, 5.0, 10.0)
    assert found["exponent"] == pytest.approx(found["expected"], rel=0.02)
    last = found["rows"]["100000"]
    assert last["turned"] < 1 / (2 * 0.2) * 1.1 < last["recursion"]


def test_a_first_order_term_leaves_a_floor_and_a_second_order_term_does_not():
    found = steps.floor(0.5, 10.0, 20.0)
    assert found["100000"][0] == pytest.approx(1.0, abs=1e-3)
    assert found["100000"][1] < 1e-3 < found["1000"][1]


def test_mean_square_of_a_single_ascent_step_is_that_of_draws():
    step = 0.4
    found = steps.single_ascent(step)
    one = bed.model()
    solved = one.soft_policy_iteration(1e-12)
    best = one.expected(solved.v).ravel()
    rng = np.random.default_rng(0)
    error = rng.standard_normal(6)
    error *= found["radius"] / np.linalg.norm(error)
    data = one.sample(40_000, seed=0)
    pair = data.state * 2 + data.action
    pulled = (best + error)[pair]
    moved = error[pair] + step * 2 * 0.25 * (solved.v[data.next_state] - pulled)
    squares = (error**2).sum() - error[pair] ** 2 + moved**2
    mean, spread = squares.mean(), squares.std() / 200
    # At this radius what is lost to noise is what is won by the pull.
    assert mean == pytest.approx(found["radius"] ** 2, abs=4 * spread)


def test_risk_of_the_truth_on_data_is_what_is_computed():
    one, n = bed.model(), 30
    truth = one.soft_policy_iteration(1e-12).q
    risks = [empirical_risk(one.sample(n, seed=s), truth, one.discount) for s in range(300)]
    expected = steps.optimum_on_data(n)["n_times"] / n
    assert np.mean(risks) == pytest.approx(expected, abs=4 * np.std(risks) / 300**0.5)


def test_curvature_along_the_constant_is_the_closed_form():
    for measured, closed in steps.concave_along_the_constant().values():
        assert measured == pytest.approx(closed, abs=1e-8)


def test_gradients_grow_with_the_radius():
    found = list(steps.unbounded_gradients().values())
    assert found[3] > 50 * found[1] > 50 * found[0]


def test_corollary_is_slower_than_the_inverse_root_after_one_pass():
    found = steps.corollary(0.05, 0.5)
    assert found["exponent"] == pytest.approx(0.5)
    assert -0.5 < found["slope"]["n"] < found["slope"]["n2"] + 1
    offset = 4 * 0.5 * found["largest_scale"]
    assert (offset / (offset + found["steps_for_1/n"]["64"])) ** 0.5 == pytest.approx(1 / 64)
