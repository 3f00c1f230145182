"""The dynamics in closed form, against autograd, the library, and what is proved of them."""

import numpy as np
import pytest
import torch

from benchmarks.bellman_convergence import dynamics, run, stochastic
from holdfast.bellman import SaddleProblem, TabularMDP, stability_margin


def objective(models, w, v, form="zeta"):
    kernel, rewards, law = (
        torch.as_tensor(x[0]) for x in (models.kernel, models.rewards, models.law)
    )
    ahead = kernel @ torch.logsumexp(w.reshape(kernel.shape[1], -1), -1)
    residual = rewards + models.discount * ahead - w
    if form == "h":
        return (law * (2 * v * residual - v**2)).sum()
    return (law * (residual**2 - models.discount**2 * (ahead - v) ** 2)).sum()


def field(models, w, v, ratio, form="zeta"):
    """What steps of size one take off, by autograd."""
    w, v = (torch.as_tensor(x).requires_grad_() for x in (w, v))
    down, up = torch.autograd.grad(objective(models, w, v, form), (w, v))
    return torch.cat([down, -ratio * up]).numpy()


def test_gradients_are_those_of_autograd():
    models = dynamics.draw(1, 4, 2, 0.8, family="all")
    w, v = np.random.default_rng(0).standard_normal((2, 8))
    down, up = models.gradients(w[None], v[None])
    np.testing.assert_allclose(
        np.concatenate([down[0], -up[0]]), field(models, w, v, 1.0), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("form", ["zeta", "h"])
def test_jacobians_are_derivatives_of_the_field_at_the_saddle(form):
    models = dynamics.draw(1, 3, 2, 0.9, family="skewed")
    w, v = models.w[0], models.v[0] if form == "zeta" else np.zeros(6)
    columns = []
    for i in range(12):
        move = 1e-5 * np.eye(12)[i]
        ends = [field(models, w + s * move[:6], v + s * move[6:], 3.0, form) for s in (1, -1)]
        columns.append((ends[0] - ends[1]) / 2e-5)
    jacobian = models.jacobian(3.0) if form == "zeta" else models.jacobian_of_h(3.0)
    np.testing.assert_allclose(jacobian[0], np.array(columns).T, atol=1e-8)


def test_margins_are_those_of_the_library():
    data = TabularMDP.random(3, 2, 0.9, seed=0).sample(200, seed=0)
    model = TabularMDP.empirical(data, 3, 2, 0.9)
    law = (data.counts(3, 2) / 200).reshape(1, -1)
    models = dynamics.Models.stack([model], law)
    problem = SaddleProblem.tabular(data, 0.9)
    for ratio in (2.0, 0.9**-2):
        found = stability_margin(problem, ratio).margin
        assert models.margins(ratio)[0] == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("family", run.FAMILIES)
@pytest.mark.parametrize("discount", [0.3, 0.9])
def test_ratio_of_one_over_the_discount_squared_is_stable_with_a_known_margin(family, discount):
    models = dynamics.draw(10, 4, 3, discount, family=family)
    bound = 2 * models.law.min(1) * (1 - discount)
    # At this ratio eigenvalues come in nearly equal pairs, which costs half of the digits.
    assert (models.margins(discount**-2) >= bound * (1 - 1e-5) - 1e-8).all()
    for ratio in (0.3, 1.0, 10.0):
        assert (dynamics.least_real_part(models.jacobian_of_h(ratio)) > 0).all()


def test_at_that_ratio_one_part_goes_its_own_way_and_shrinks():
    """The step of the proof, far from the saddle: ``w - b v - r`` does not feel the rest."""
    models, step = dynamics.draw(3, 4, 2, 0.9, family="skewed"), 0.3
    w, v = 5 * np.random.default_rng(0).standard_normal((2, 3, 8))
    down, up = models.gradients(w, v)
    next_w, next_v = w - step * down, v + step * 0.9**-2 * up

    def apart(w, v):
        return w - 0.9 * v - models.rewards

    p = apart(w, v)
    back = np.einsum("mkl,mk->ml", models.moves(w), models.law * p)
    expected = p - 2 * step * (models.law * p - 0.9 * back)
    np.testing.assert_allclose(apart(next_w, next_v), expected, rtol=1e-10, atol=1e-12)
    shrunk = 1 - 2 * step * 0.1 * models.law.min(1)
    assert (np.abs(expected).sum(1) <= shrunk * np.abs(p).sum(1)).all()


def test_then_the_rest_is_soft_q_learning_row_by_row():
    assert stochastic.beside_q_learning(0.9, 500) < 1e-12


def test_funnels_need_nearly_that_ratio_and_never_more():
    needed = [dynamics.critical_ratio(dynamics.funnel(pairs, 0.5))[0] for pairs in (4, 20, 60)]
    assert needed == sorted(needed)
    assert 3.5 < needed[-1] < 4.0
    below = dynamics.funnel(20, 0.5)
    assert below.margins(0.99 * needed[1])[0] <= 0 < below.margins(1.01 * needed[1])[0]


def test_search_finds_unstable_chains_below_that_ratio_only():
    found = run.search(60)
    assert found["0.5"] > 0
    assert all(found[ratio] == 0 for ratio in ("1", "1.1", "10", "100"))


def test_full_gradients_do_what_the_eigenvalues_say(monkeypatch):
    monkeypatch.setattr(run, "FLOWS", {"models": 3, "step": 1.0, "steps": 9000})
    good = run.flow(0.5, 4.0, 1.0)
    assert good["unstable"] == good["farther"] == 0.0 and good["agree"] == 1.0
    slow = run.flow(0.9, 2.0, 1.0)
    np.testing.assert_allclose(slow["rate_over_margin"], 1.0, rtol=0.05)
    bad = run.flow(0.95, 1.0, 1.0)
    assert bad["unstable"] == bad["farther"] == 1.0


def test_from_0_the_common_step_is_lost_though_the_saddle_attracts(monkeypatch):
    monkeypatch.setattr(run, "FLOWS", {"models": 3, "step": 0.5, "steps_from_0": 4000})
    monkeypatch.setattr(run, "RATIOS", (1.0,))
    assert (dynamics.draw(3, 5, 3, 0.75).margins(1.0) > 0).all()
    found = run.from_zero(0.75)
    assert found["gone"] == {"1": 1.0, "1/b^2": 0.0} and found["median_left"] < 1e-12
    assert found["projected"] == {"1": 1.0, "1/b^2": 0.0}


def test_projection_keeps_tables_in_their_balls():
    models = dynamics.draw(2, 3, 2, 0.9)
    far = (5 * models.w, 5 * models.v)
    inside = models.descend(far, 1.0, 0.0, [1], ball=2.0)
    np.testing.assert_allclose(inside[0], models.distance(2 * models.w, 2 * models.v))


def test_slope_of_a_power_law_of_offset_and_time():
    at = np.geomspace(10, 1e5, 16)
    values = (50 + at)[:, None] ** np.array([-1.0, -0.5])
    cell = {"offset": 50.0, "at": at.tolist(), "squared": values.tolist()}
    np.testing.assert_allclose(stochastic.slope(cell), [-1.0, -0.5])


def test_runs_come_nearer_where_stable():
    cell = stochastic.run(0.5, 4.0, models=2, steps=600)
    entry = run.rates_of(cell)
    assert entry["unstable"] == entry["farther_than_the_start"] == 0
    assert entry["share_left"] < 0.2 and entry["steps"] == 600
    assert len(cell["squared"]) == len(cell["at"]) == stochastic.MARKS
    assert entry["last_slope"][0] < 0
    summary = run.summarise({"single samples | 0.5 | 4": cell})
    assert summary["single_samples"]["single samples | 0.5 | 4"] == entry
