import numpy as np
import pytest
import torch

from holdfast.bellman import (
    Constant,
    Linear,
    Networks,
    SaddleProblem,
    Sgda,
    TabularMDP,
    mlp,
    saddle_point,
    stability_margin,
)
from holdfast.bellman.sgda import descend_ascend
from holdfast.bellman.solve import soft_policy
from holdfast.errors import TrainingError


def problem(discount: float, seed: int = 0, n: int = 2000) -> SaddleProblem:
    model = TabularMDP.random(5, 3, discount, seed=seed)
    return SaddleProblem.tabular(model.sample(n, seed=seed), discount)


def by_hand(given: SaddleProblem, ratio: float) -> np.ndarray:
    """The linearised dynamics of ``|T w - w|_D^2 - b^2 |P V_w - v|_D^2`` at its saddle.

    ``T w - w`` and ``P V_w - v`` vanish there, so only products of first derivatives are left.
    """
    b, data = given.discount, given.transitions
    model = TabularMDP.empirical(data, 5, 3, b)
    policy = soft_policy(model.soft_policy_iteration().q)
    moves = np.einsum("ix,xa->ixa", model.kernel, policy).reshape(15, 15)
    weight = np.diag(data.counts(5, 3).ravel() / len(data))
    gap = np.eye(15) - b * moves
    ww = 2 * gap.T @ weight @ gap - 2 * b * b * moves.T @ weight @ moves
    wv = 2 * b * b * moves.T @ weight
    vv = -2 * b * b * weight
    return np.block([[ww, wv], [-ratio * wv.T, -ratio * vv]])


@pytest.mark.parametrize(("discount", "ratio"), [(0.5, 1.0), (0.9, 1.0), (0.9, 4.0)])
def test_eigenvalues_are_those_of_the_dynamics_by_hand(discount, ratio):
    given = problem(discount)
    found = stability_margin(given, ratio)
    wanted = np.linalg.eigvals(by_hand(given, ratio))

    def ordered(values):
        return np.array(sorted(values, key=lambda z: (round(z.real, 9), round(abs(z.imag), 9))))

    np.testing.assert_allclose(
        np.abs(ordered(found.eigenvalues)), np.abs(ordered(wanted)), atol=1e-8
    )
    assert found.margin == pytest.approx(wanted.real.min(), abs=1e-9)


def test_one_common_step_fails_near_a_discount_of_one_and_two_scales_do_not():
    share = {}
    for discount in (0.5, 0.95):
        for ratio in (1.0, 2.0):
            margins = [stability_margin(problem(discount, seed), ratio) for seed in range(8)]
            share[discount, ratio] = np.mean([not each.stable for each in margins])
    assert share[0.5, 1.0] == share[0.5, 2.0] == share[0.95, 2.0] == 0.0
    assert share[0.95, 1.0] > 0.7


@pytest.mark.parametrize("share", [0.95, 1.05])
def test_the_largest_step_is_where_convergence_ends(share):
    given = problem(0.8)
    margin = stability_margin(given, 2.0)
    centre = saddle_point(given)
    generator = torch.Generator().manual_seed(0)
    start = tuple(
        each + 1e-6 * torch.randn(each.shape, generator=generator, dtype=each.dtype)
        for each in centre
    )
    settings = Sgda(
        steps=400, step=Constant(share * margin.max_step), step_ratio=2.0, batch_size=None
    )
    found = descend_ascend(given, given.compact(), settings, start=start, may_diverge=True)
    before = float(torch.linalg.vector_norm(start[0] - centre[0]))
    after = float(torch.linalg.vector_norm(found.primal[0] - centre[0]))
    assert (after < before) == (share < 1)


def test_a_diverging_ratio_is_refused_with_one_that_works():
    margin = stability_margin(problem(0.95), 1.0)
    assert not margin.stable and margin.max_step == 0.0
    with pytest.raises(TrainingError, match="real part.*set step_ratio to"):
        margin.check()
    assert stability_margin(problem(0.95), margin.working_ratio).stable


def test_too_large_a_step_is_refused_with_the_largest():
    margin = stability_margin(problem(0.8), 4.0)
    margin.check(0.9 * margin.max_step)
    with pytest.raises(TrainingError, match="is too large"):
        margin.check(1.1 * margin.max_step)


def test_features_of_pairs_are_a_table():
    given = SaddleProblem.tabular(TabularMDP.random(3, 2, 0.8, seed=0).sample(400, seed=0), 0.8)
    linear = SaddleProblem(given.transitions, 0.8, Linear(np.eye(6).reshape(3, 2, 6)))
    for first, second in zip(saddle_point(given), saddle_point(linear), strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    assert stability_margin(linear, 4.0).margin == pytest.approx(
        stability_margin(given, 4.0).margin, abs=1e-7
    )


def test_inverse_problems_are_stable_too():
    model = TabularMDP.bus(5, 0.9, cost=0.3, replacement=1.0, drives_on=True)
    data = model.sample_trajectories(100, 50, seed=0)
    margin = stability_margin(SaddleProblem.tabular(data, 0.9, anchor_action=1), 4.0)
    assert margin.stable


def test_pairs_that_end_nothing_do_not_count():
    """A goal's own pairs never move: their zero eigenvalues are no instability."""
    model = TabularMDP.gridworld(2, 2, 0.8)
    given = SaddleProblem.tabular(model.sample(600, seed=0), 0.8)
    margin = stability_margin(given, 4.0)
    assert margin.stable and len(margin.eigenvalues) == 2 * 12


def test_networks_need_a_point():
    net = mlp(2, (4,), 3, seed=0)
    data = problem(0.8).transitions
    with pytest.raises(ValueError, match="no known saddle"):
        stability_margin(SaddleProblem(data, 0.8, Networks(net, net)), 4.0)
    with pytest.raises(ValueError, match="step_ratio is 0"):
        stability_margin(problem(0.8), 0.0)
