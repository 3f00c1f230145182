from functools import cache

import numpy as np
import pytest
from scipy.optimize import minimize

from holdfast.bellman import (
    GeneralizationResult,
    Harmonic,
    Sgda,
    TabularMDP,
    measure_generalization,
)
from holdfast.bellman.generalization import (
    empirical_risk,
    held_out_risk,
    primal_risk,
    weak_gap,
)
from holdfast.bellman.solve import soft_value
from holdfast.errors import TrainingError

MODEL = TabularMDP.random(2, 2, 0.5, seed=0)
LAW = np.full((2, 2), 0.25)
SIZES = (32, 64, 128)


@cache
def measured() -> GeneralizationResult:
    settings = Sgda(steps=1, step=Harmonic(20.0, 40.0), step_ratio=2.0)
    return measure_generalization(
        MODEL, sizes=SIZES, datasets=60, passes=6, settings=settings, seed=0
    )


def test_the_gap_is_that_of_the_theory_at_the_optimum():
    """``n E[R_n(w*)] = sum b^2 Var(V)``, over pairs, up to the frequencies' own noise."""
    solved = MODEL.soft_policy_iteration()
    variance = MODEL.expected(solved.v**2) - MODEL.expected(solved.v) ** 2
    wanted = 0.25 * variance.sum()
    risks = [empirical_risk(MODEL.sample(400, seed=i), solved.q, 0.5) * 400 for i in range(300)]
    error = np.std(risks) / np.sqrt(300)
    assert np.mean(risks) == pytest.approx(wanted, abs=4 * error)
    assert primal_risk(MODEL, solved.q, LAW) < 1e-20


def test_results_do_better_on_their_own_data():
    result = measured()
    assert (result.gap > 0).all()
    assert (np.diff(result.risk.mean(1)) < 0).all()
    assert (result.optimum_empirical_risk > 0).all()


def test_the_empirical_risk_of_an_empirical_solution_is_0():
    data = MODEL.sample(60, seed=0)
    q = TabularMDP.empirical(data, 2, 2, 0.5).soft_policy_iteration(1e-12).q
    assert empirical_risk(data, q, 0.5) < 1e-20
    assert primal_risk(MODEL, q, LAW) > 0


def test_the_weak_gap_shrinks_with_the_data():
    result = measured()
    assert (result.weak_gap > 0).all() and (result.empirical_weak_gap > 0).all()
    assert result.weak_gap[-1] < result.weak_gap[0]


@pytest.mark.parametrize("discount", [0.4, 0.9])
def test_the_weak_gap_of_a_point_is_that_of_a_constrained_solver(discount):
    """The maximum over the dual is the primal risk; the minimum is found by SLSQP."""
    model = TabularMDP.random(2, 2, discount, seed=0)
    centre = model.soft_policy_iteration().q
    rng = np.random.default_rng(0)
    q = centre + 0.1 * rng.standard_normal((2, 2))
    zeta = model.expected(soft_value(centre)) + 0.1 * rng.standard_normal((2, 2))

    def value(x: np.ndarray) -> float:
        w = x.reshape(2, 2)
        ahead = model.expected(soft_value(w))
        residual = model.rewards + discount * ahead - w
        return float((LAW * (residual**2 - discount**2 * (ahead - zeta) ** 2)).sum())

    inside = {"type": "ineq", "fun": lambda x: 1.0 - ((x - centre.ravel()) ** 2).sum()}
    least = minimize(
        value, centre.ravel(), constraints=inside, method="SLSQP", options={"ftol": 1e-14}
    ).fun
    found = weak_gap(model, q[None], zeta[None], LAW, 1.0, steps=2000)
    assert found == pytest.approx(primal_risk(model, q, LAW) - least, rel=1e-4)


def test_a_ratio_that_leaves_the_saddle_is_refused():
    common = Sgda(steps=1, step=Harmonic(40.0, 75.0), step_ratio=1.0)
    model = TabularMDP.random(3, 2, 0.95, seed=1)
    with pytest.raises(TrainingError, match="set step_ratio to 1.25 or more"):
        measure_generalization(model, sizes=(64, 128), datasets=2, settings=common)


def test_bad_numbers_are_told():
    with pytest.raises(ValueError, match="two or more of each"):
        measure_generalization(MODEL, sizes=(64,))
    with pytest.raises(ValueError, match="ball is 0"):
        measure_generalization(MODEL, sizes=(64, 128), ball=0)


def test_the_held_out_risk_is_that_of_the_model_in_expectation():
    """Against the exact risk, where the plug-in estimate would be too large by the noise."""
    rng = np.random.default_rng(1)
    q = MODEL.soft_policy_iteration().q + 0.3 * rng.standard_normal((2, 2))
    samples = [MODEL.sample(60, seed=i) for i in range(400)]
    found = np.array([held_out_risk(data, q, 0.5) for data in samples])
    plugged = np.array([empirical_risk(data, q, 0.5) for data in samples])
    error = found.std() / np.sqrt(len(found))
    assert found.mean() == pytest.approx(primal_risk(MODEL, q, LAW), abs=4 * error)
    excess = plugged - found
    assert excess.mean() > 4 * excess.std() / np.sqrt(len(excess))


def test_a_users_own_rows_are_judged_on_those_held_out():
    settings = Sgda(steps=1, step=Harmonic(20.0, 40.0), step_ratio=2.0)
    rows = MODEL.sample(4000, seed=0)
    found = measure_generalization(
        rows, discount=0.5, sizes=(40, 160), datasets=20, passes=6, settings=settings
    )
    assert found.gap[0] > found.gap[1] > 0
    assert found.risk.mean(1)[0] > found.risk.mean(1)[1] > 0
    with pytest.raises(ValueError, match="discount must be given"):
        measure_generalization(rows)


def test_the_weak_gap_of_several_runs_takes_means_before_extremes():
    """``max_v mean F(w_k, v) - min_w mean F(w, v_k)``, both by a general solver."""
    model = TabularMDP.random(2, 2, 0.6, seed=0)
    centre = model.soft_policy_iteration().q
    rng = np.random.default_rng(0)
    q = centre + 0.3 * rng.standard_normal((3, 2, 2))
    zeta = model.expected(soft_value(centre)) + 0.3 * rng.standard_normal((3, 2, 2))

    def value(w: np.ndarray, v: np.ndarray) -> float:
        ahead = model.expected(soft_value(w))
        residual = model.rewards + 0.6 * ahead - w
        return float((LAW * (residual**2 - 0.36 * (ahead - v) ** 2)).sum())

    def mean_over_w(x: np.ndarray) -> float:
        return float(np.mean([value(w, x.reshape(2, 2)) for w in q]))

    def mean_over_v(x: np.ndarray) -> float:
        return float(np.mean([value(x.reshape(2, 2), v) for v in zeta]))

    most = -minimize(lambda x: -mean_over_w(x), zeta[0].ravel(), options={"gtol": 1e-10}).fun
    inside = {"type": "ineq", "fun": lambda x: 1.0 - ((x - centre.ravel()) ** 2).sum()}
    least = minimize(
        mean_over_v, centre.ravel(), constraints=inside, method="SLSQP", options={"ftol": 1e-14}
    ).fun
    found = weak_gap(model, q, zeta, LAW, 1.0, steps=2000)
    assert found == pytest.approx(most - least, rel=1e-4)
