"""Problems against finite differences, and descents against the bounds they are to keep."""

import math

import numpy as np
import pytest

from benchmarks.in_ril_theory.descent import C_RL, descend
from benchmarks.in_ril_theory.problems import Bandits, Quadratics
from holdfast.joint.progress import promised_benefit, promised_progress

PAIRS = {
    "quadratic": lambda: Quadratics.drawn(4, 0.5, np.random.default_rng(0), size=5),
    "bandit": lambda: Bandits.drawn(4, 0.5, np.random.default_rng(0), arms=5),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_gradients_are_those_of_the_loss_and_smoothness_bounds_them(kind):
    pair = PAIRS[kind]()
    theta, step = pair.start, 1e-6
    found = pair.rl_gradient(theta)
    for i in range(theta.shape[1]):
        moved = [theta + sign * step * np.eye(theta.shape[1])[i] for sign in (1, -1)]
        slope = (pair.rl_loss(moved[0]) - pair.rl_loss(moved[1])) / (2 * step)
        np.testing.assert_allclose(found[:, i], slope, atol=1e-7)
    other = theta + np.random.default_rng(1).standard_normal(theta.shape)
    apart = np.linalg.norm(other - theta, axis=1)
    for gradient, smoothness in (
        (pair.rl_gradient, pair.smoothness_rl),
        (pair.il_gradient, pair.smoothness_il),
    ):
        change = np.linalg.norm(gradient(other) - gradient(theta), axis=1)
        assert (change <= smoothness * apart + 1e-12).all()
    assert (pair.rl_loss(theta) >= pair.optimum).all()


@pytest.mark.parametrize("kind", PAIRS)
def test_noise_has_no_mean_and_the_variance_that_is_known(kind):
    pair = PAIRS[kind]()
    draw = np.random.default_rng(2)
    noise = np.array([pair.noise(pair.start, 3, draw) for _ in range(4000)])
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.03)
    squares = (noise**2).sum(axis=2).mean(axis=0)
    np.testing.assert_allclose(squares, pair.variance(pair.start) / 3, rtol=0.1)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("ratio", [0.5, 2, math.inf, "root", "balance"])
def test_cycles_are_as_asked_for_and_no_update_breaks_its_bound(kind, ratio):
    pair = PAIRS[kind]()
    found = descend(pair, ratio, 30, batch=4, draw=np.random.default_rng(3))
    assert (found.gained >= found.bound - 1e-12).all()
    if ratio == math.inf:
        assert not found.imitated.any()
    else:
        assert found.imitated[0].all()
    if ratio in (0.5, 2):
        share = found.imitated.mean(axis=0)
        np.testing.assert_allclose(share, 1 / (1 + ratio), atol=0.04)


def test_promises_are_those_of_the_package():
    pair = PAIRS["quadratic"]()
    found = descend(pair, 1, 2, batch=4, draw=np.random.default_rng(3))
    rl, il = pair.rl_gradient(pair.start)[0], pair.il_gradient(pair.start)[0]
    norms = float(np.linalg.norm(rl)), float(np.linalg.norm(il))
    rho = -float((rl * il).sum()) / norms[0] / norms[1]
    variance_term = pair.variance(pair.start)[0] / 4 / 2
    expected = promised_benefit(*norms, rho, variance_term=variance_term)
    assert found.promised[0, 0] == pytest.approx(expected)
    alone = descend(pair, math.inf, 1, batch=0, draw=np.random.default_rng(3))
    assert alone.promised[0, 0] == pytest.approx(promised_progress(norms[0], c_rl=C_RL))
