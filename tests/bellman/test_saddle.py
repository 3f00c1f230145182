import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.bellman import (
    TabularMDP,
    Transitions,
    anchor_bellman,
    ascend,
    bellman_saddle,
    choice_likelihood,
    dual_fit,
    gladius,
    inverse_values,
    recovered_reward,
    td_error,
)

S, A = 3, 3


def tables(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, zeta = torch.randn(2, S, A, generator=generator, dtype=torch.float64)
    return q.requires_grad_(), zeta.requires_grad_()


def every_outcome(model: TabularMDP) -> tuple[Transitions, np.ndarray]:
    """All triples with their probabilities, pairs having the same: an exact expectation."""
    s, a, x = (each.ravel() for each in np.indices((S, A, S)))
    data = Transitions(s, a, model.rewards[s, a], x)
    return data, model.transitions[s, a, x] / (S * A)


def expected(loss, model: TabularMDP) -> torch.Tensor:
    """The mean of a loss over all outcomes of ``model``, row by row."""
    data, weights = every_outcome(model)
    return sum(w * loss(data[i : i + 1]).total for i, w in enumerate(weights))


def expected_next(model: TabularMDP, q: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(model.transitions) @ torch.logsumexp(q, -1)


def bellman_residual(model: TabularMDP, q: torch.Tensor) -> torch.Tensor:
    target = torch.as_tensor(model.rewards) + model.discount * expected_next(model, q)
    return (target - q).square().mean()


def test_worked_example():
    """One row, reward 1, discount 1/2; Q(s, a) = 2, both Q(s', .) = 0, zeta = ln 2 - 1.

    V(s') = ln 2, delta = 1 + ln 2 / 2 - 2, and the dual is off by 1: delta^2 - 1/4.
    """
    q = torch.tensor([[2.0, 5.0], [0.0, 0.0]], dtype=torch.float64)
    zeta = torch.full((2, 2), math.log(2) - 1, dtype=torch.float64)
    terms = bellman_saddle(q, zeta, Transitions([0], [0], [1.0], [1]), discount=0.5)
    delta = math.log(2) / 2 - 1
    assert terms.total.item() == pytest.approx(delta**2 - 0.25)
    assert terms.count.item() == 1
    assert terms.metrics["bellman/td_squared"].item() == pytest.approx(delta**2)
    assert terms.metrics["bellman/dual_error"].item() == pytest.approx(1.0)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 0.99))
def test_at_the_best_dual_the_mean_is_the_bellman_residual(seed, discount):
    """Lemma 1, with its gradient; the TD error exceeds it by the variance of what is ahead."""
    model = TabularMDP.random(S, A, discount, seed=seed)
    q, _ = tables(seed)
    zeta = expected_next(model, q).detach()
    mean = expected(lambda row: bellman_saddle(q, zeta, row, discount=discount), model)
    truth = bellman_residual(model, q)
    assert mean.item() == pytest.approx(truth.item(), abs=1e-9)
    (found,) = torch.autograd.grad(mean, q, retain_graph=True)
    (wanted,) = torch.autograd.grad(truth, q, retain_graph=True)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)
    biased = expected(lambda row: td_error(q, row, discount=discount), model)
    ahead = torch.logsumexp(q, -1)
    second = torch.as_tensor(model.transitions) @ ahead.square()
    variance = (second - expected_next(model, q).square()).mean()
    assert (biased - truth).item() == pytest.approx(discount**2 * variance.item(), abs=1e-9)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 0.99))
def test_the_mean_is_the_biconjugate_form(seed, discount):
    """``2 h E[delta] - h^2`` with ``h = r + b zeta - q``, and so below the residual elsewhere."""
    model = TabularMDP.random(S, A, discount, seed=seed)
    q, zeta = tables(seed)
    mean = expected(lambda row: bellman_saddle(q, zeta, row, discount=discount), model)
    h = torch.as_tensor(model.rewards) + discount * zeta - q
    delta = torch.as_tensor(model.rewards) + discount * expected_next(model, q) - q
    assert mean.item() == pytest.approx((2 * h * delta - h.square()).mean().item(), abs=1e-9)
    assert mean.item() <= bellman_residual(model, q).item() + 1e-12


def test_the_empirical_saddle_is_soft_value_iteration_on_the_empirical_model():
    data = TabularMDP.random(S, A, 0.9, seed=3).sample(500, seed=0)
    model = TabularMDP.empirical(data, S, A, 0.9)
    solved = model.soft_policy_iteration(1e-12)
    q = torch.tensor(solved.q, requires_grad=True)
    zeta = torch.tensor(model.expected(solved.v), requires_grad=True)
    terms = bellman_saddle(q, zeta, data, discount=0.9)
    gradients = torch.autograd.grad(terms.total / terms.count, (q, zeta))
    assert abs((terms.total / terms.count).item()) < 1e-12
    assert max(each.abs().max().item() for each in gradients) < 1e-12


def test_without_a_future_it_is_regression():
    q, zeta = tables(0)
    data = TabularMDP.random(S, A, 0.9, seed=3).sample(100, seed=0)
    terms = bellman_saddle(q, zeta, data, discount=0.0)
    wanted = sum(
        (r - q[s, a]) ** 2 for s, a, r in zip(data.state, data.action, data.reward, strict=True)
    )
    torch.testing.assert_close(terms.total, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(terms.total, q)[0], torch.autograd.grad(wanted, q)[0]
    )


def test_where_nothing_is_random_the_fitted_dual_is_irrelevant():
    kernel = np.zeros((S, A, S))
    rng = np.random.default_rng(0)
    kernel[np.arange(S)[:, None], np.arange(A), rng.integers(S, size=(S, A))] = 1.0
    model = TabularMDP(kernel, rng.random((S, A)), 0.8)
    q, _ = tables(1)
    zeta = expected_next(model, q).detach()
    data = model.sample(60, seed=0)
    first = bellman_saddle(q, zeta, data, discount=0.8).total
    second = td_error(q, data, discount=0.8).total
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(torch.autograd.grad(first, q)[0], torch.autograd.grad(second, q)[0])


def test_nothing_is_earned_past_the_end():
    q, zeta = tables(2)
    data = Transitions([0], [1], [0.5], [2], terminal=[True])
    wanted = (0.5 - q[0, 1]) ** 2 - 0.81 * zeta[0, 1] ** 2
    torch.testing.assert_close(bellman_saddle(q, zeta, data, discount=0.9).total, wanted)


def test_gradients_are_those_of_finite_differences():
    data = TabularMDP.random(S, A, 0.9, seed=3).sample(30, seed=0)
    q, zeta = tables(3)
    assert torch.autograd.gradcheck(
        lambda q, zeta: bellman_saddle(q, zeta, data, discount=0.9).total, (q, zeta)
    )


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 29))
def test_sums_do_not_depend_on_how_a_batch_is_cut(seed, cut):
    data = TabularMDP.random(S, A, 0.9, seed=3).sample(30, seed=seed)
    q, zeta = tables(seed)

    def check(loss):
        whole, first, second = loss(data), loss(data[:cut]), loss(data[cut:])
        torch.testing.assert_close(whole.total, first.total + second.total)
        assert whole.count == first.count + second.count
        for name, metric in whole.metrics.items():
            torch.testing.assert_close(metric, first.metrics[name] + second.metrics[name])

    check(lambda rows: bellman_saddle(q, zeta, rows, discount=0.9))
    check(lambda rows: td_error(q, rows, discount=0.9))
    check(lambda rows: gladius(q, zeta, rows, discount=0.9, anchor_action=1))


def test_descent_in_reversed_values_is_ascent():
    data = TabularMDP.random(S, A, 0.9, seed=3).sample(30, seed=0)
    q, zeta = tables(3)
    plain = bellman_saddle(q, zeta, data, discount=0.9).total
    turned = bellman_saddle(q, ascend(zeta, 3.0), data, discount=0.9).total
    assert plain.item() == turned.item()
    first, second = (torch.autograd.grad(each, (q, zeta)) for each in (plain, turned))
    torch.testing.assert_close(first[0], second[0])
    torch.testing.assert_close(-3.0 * first[1], second[1])


def test_inverse_problem_is_solved_by_the_exact_inverse():
    """At the inverse solution of the observed frequencies all gradients vanish."""
    model = TabularMDP.bus(5, 0.8, cost=0.3, replacement=1.0, drives_on=True)
    data = model.sample_trajectories(80, 40, seed=0)
    counts = data.counts(5, 2)
    found = TabularMDP.empirical(data, 5, 2, 0.8)
    q, v = inverse_values(
        counts / counts.sum(1, keepdims=True), found.transitions, 1, model.rewards[:, 1], 0.8
    )
    q = torch.tensor(q, requires_grad=True)
    zeta = torch.tensor(found.expected(v), requires_grad=True)
    terms = gladius(q, zeta, data, discount=0.8, anchor_action=1, weight=2.0)
    gradients = torch.autograd.grad(terms.total / terms.count, (q, zeta))
    assert max(each.abs().max().item() for each in gradients) < 1e-12
    reward = recovered_reward(q, zeta, discount=0.8)
    np.testing.assert_allclose(reward[:, 1].detach(), model.rewards[:, 1], atol=1e-9)


def test_gladius_is_its_three_parts():
    """Against equation 15 written out row by row."""
    data = TabularMDP.random(S, A, 0.9, seed=3).sample(40, seed=0)
    q, zeta = tables(4)
    likelihood, bellman, dual = 0.0, 0.0, 0.0
    for s, a, r, x in zip(data.state, data.action, data.reward, data.next_state, strict=True):
        ahead = torch.logsumexp(q[x], -1)
        likelihood = likelihood - torch.log_softmax(q[s], -1)[a]
        dual = dual + (ahead.detach() - zeta[s, a]) ** 2
        if a == 1:
            delta = r + 0.9 * ahead - q[s, a]
            bellman = bellman + delta**2 - 0.81 * (ahead - zeta[s, a].detach()) ** 2
    wanted = likelihood + 0.5 * bellman + dual
    terms = gladius(q, zeta, data, discount=0.9, anchor_action=1, weight=0.5)
    torch.testing.assert_close(terms.total, wanted)
    for found, expected_gradient in zip(
        torch.autograd.grad(terms.total, (q, zeta)),
        torch.autograd.grad(wanted, (q, zeta)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected_gradient)
    anchored, count = terms.metrics["bellman/anchor"]
    assert count.item() == (data.action == 1).sum()
    assert anchored.item() == pytest.approx(bellman.item())
    assert terms.metrics["nll"].item() == pytest.approx(likelihood.item())


def test_rewards_off_the_anchor_are_never_read():
    data = TabularMDP.random(S, A, 0.9, seed=3).sample(40, seed=0)
    hidden = np.where(data.action == 1, data.reward, np.nan)
    unseen = Transitions(data.state, data.action, hidden, data.next_state)
    q, zeta = tables(4)
    first = gladius(q, zeta, data, discount=0.9, anchor_action=1)
    second = gladius(q, zeta, unseen, discount=0.9, anchor_action=1)
    assert first.total.item() == second.total.item()
    assert torch.isfinite(torch.autograd.grad(second.total, q)[0]).all()
    per_state = gladius(q, zeta, unseen, discount=0.9, anchor_action=[1] * S)
    assert per_state.total.item() == second.total.item()


def test_half_precision_is_summed_in_single():
    q, zeta = (each.detach().to(torch.bfloat16) for each in tables(1))
    data = TabularMDP.random(S, A, 0.9, seed=3).sample(10, seed=0)
    assert bellman_saddle(q, zeta, data, discount=0.9).total.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, z, d: bellman_saddle(q[:, :2], z, d, discount=0.9), "zeta is"),
        (lambda q, z, d: bellman_saddle(q.long(), z.long(), d, discount=0.9), "q is torch.int64"),
        (lambda q, z, d: bellman_saddle(q, z, d, discount=1.0), "discount is 1.0"),
        (lambda q, z, d: bellman_saddle(q[:2], z[:2], d, discount=0.9), "must lie in 0 ... 1"),
        (lambda q, z, d: gladius(q, z, d, discount=0.9, anchor_action=1, weight=0), "weight"),
        (lambda q, z, d: gladius(q, z, d, discount=0.9, anchor_action=[1]), "anchor_action has"),
        (lambda q, z, d: choice_likelihood(q, torch.zeros(2, dtype=torch.long)), "q_row has"),
        (lambda q, z, d: dual_fit(z, z[0]), "next_value has shape"),
        (lambda q, z, d: anchor_bellman(z, z, z, z, z, discount=0.9), "anchor is torch.float64"),
        (lambda q, z, d: ascend(z, -1.0), "ratio"),
    ],
)
def test_bad_arguments_are_named(call, message):
    data = TabularMDP.random(S, A, 0.9, seed=3).sample(40, seed=0)
    with pytest.raises(ValueError, match=message):
        call(*tables(0), data)


def test_an_unknown_reward_is_refused_where_it_is_needed():
    q, zeta = tables(0)
    data = Transitions([0, 1], [0, 1], [1.0, np.nan], [1, 0])
    with pytest.raises(ValueError, match="reward is nan in row 1"):
        bellman_saddle(q, zeta, data, discount=0.9)


def test_arrays_do_as_tensors():
    data = TabularMDP.random(S, A, 0.9, seed=3).sample(40, seed=0)
    q, zeta = tables(2)
    arrays = q.detach().numpy(), zeta.detach().numpy()
    for loss in (
        lambda q, z: bellman_saddle(q, z, data, discount=0.9),
        lambda q, z: td_error(q, data, discount=0.9),
        lambda q, z: gladius(q, z, data, discount=0.9, anchor_action=1),
    ):
        assert loss(*arrays).total.item() == loss(q, zeta).total.item()
    with pytest.raises(ValueError, match="q is torch.int64"):
        bellman_saddle(np.ones((S, A), int), arrays[1], data, discount=0.9)


@pytest.mark.parametrize("anchor", [-1, A, [0, 1, A], 0.5])
def test_an_anchor_that_is_no_action_is_refused(anchor):
    data = TabularMDP.random(S, A, 0.9, seed=3).sample(40, seed=0)
    with pytest.raises(ValueError, match="anchor_action is .*0 ... 2"):
        gladius(*tables(0), data, discount=0.9, anchor_action=anchor)
