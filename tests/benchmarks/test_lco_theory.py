"""What the study of the theory of LCO measures, on cases small enough for closed forms."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks.lco_theory import bounds, curvature, linear_models, rates, transformer
from benchmarks.lco_theory.losses import (
    LCO,
    SMOOTHNESS,
    fisher,
    hessians,
    library,
    log_cosh,
    nll,
    reverse_kl,
    surrogate,
)
from holdfast.language.losses.policy_gradient import ppo_clip


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient_of(loss, z, *rest):
    leaf = z.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, *rest).sum(), leaf)[0]


# Losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LCO)
def test_formulas_are_the_losses_of_the_library(name):
    z, target = 3 * normal(40, 7), 3 * normal(40, 7, seed=1)
    total, gradient = library(name, z, target)
    torch.testing.assert_close(LCO[name](z, target).sum(), total, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient_of(LCO[name], z, target), gradient, rtol=0, atol=1e-14)


@pytest.mark.parametrize("epsilon", [0.2, 50.0])
def test_surrogate_is_that_of_ppo(epsilon):
    z, old, advantage = normal(60, 5), normal(60, 5, seed=1), normal(60, seed=2)
    token = torch.arange(60) % 5
    label = F.one_hot(token, 5).double()
    old_logp = -nll(old, label)

    def ppo(z):
        logps = z.log_softmax(-1).gather(-1, token[:, None])
        mask = torch.ones(60, 1, dtype=torch.bool)
        # The lower bound of the ratio lies in (0, 1); the formula has one ε for both sides.
        low = min(epsilon, 0.999999)
        return ppo_clip(
            logps, old_logp[:, None], advantage[:, None], mask, epsilon=low, epsilon_high=epsilon
        ).total

    ours = surrogate(z, label, old_logp, advantage, epsilon)
    torch.testing.assert_close(ours.sum(), ppo(z), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gradient_of(surrogate, z, label, old_logp, advantage, epsilon),
        gradient_of(ppo, z),
        rtol=0,
        atol=1e-13,
    )


def test_small_losses_keep_their_digits():
    d = torch.tensor([[1e-9, -3e-9]], dtype=torch.float64)
    zero = torch.zeros_like(d)
    torch.testing.assert_close(log_cosh(d, zero), d.square().mean(-1) / 2, rtol=1e-9, atol=0)
    # Near equality a KL is half the variance of the difference of logits.
    half_variance = d.var(-1, correction=0) / 2
    torch.testing.assert_close(LCO["kl"](d, zero), half_variance, rtol=1e-6, atol=0)


def test_regularised_surrogate_is_a_reverse_kl_to_the_target():
    beta, old, advantage, z = 0.5, normal(6), normal(6, seed=1), normal(6, seed=2)
    p, p_old = z.softmax(-1), old.softmax(-1)
    objective = (p * advantage).sum() - beta * (p * (p / p_old).log()).sum()
    log_z = (p_old * (advantage / beta).exp()).sum().log()
    expected = beta * log_z - beta * reverse_kl(z, old + advantage / beta)
    torch.testing.assert_close(objective, expected, rtol=1e-12, atol=0)


# Second derivatives -------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("p_a", [0.1, 0.45, 0.55, 0.9])
def test_ppo_is_indefinite_exactly_where_the_token_has_less_than_one_half(p_a, advantage):
    z = torch.tensor([[p_a, 0.7 * (1 - p_a), 0.3 * (1 - p_a)]], dtype=torch.float64).log()
    label = F.one_hot(torch.tensor([0]), 3).double()
    one = torch.ones(1, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(
        hessians(surrogate, z, label, math.log(p_a) * one, advantage * one)
    )
    shape = "indefinite" if p_a < 0.5 else "convex" if advantage > 0 else "concave"
    assert curvature.shape_of(eigenvalues)[shape] == 1.0


def test_shares_of_shapes():
    eigenvalues = torch.tensor(
        [[-1.0, 0.0, 2.0], [0.0, 0.0, 2.0], [-2.0, -1.0, 1e-12], [0.0, 0.0, 0.0]],
        dtype=torch.float64,
    )
    assert set(curvature.shape_of(eigenvalues).values()) == {0.25}
    assert curvature.shape_of(eigenvalues[:2])["convex"] == 0.5


def test_derivatives_of_sft_and_ppo_are_the_closed_forms():
    supervised = curvature.supervised(60, 4, seed=0)
    assert supervised["convex"] == 1.0
    ppo = curvature.policy_gradient(400, 4, seed=0)
    for found in (supervised, ppo):
        assert max(value for key, value in found.items() if key.endswith("_error")) < 1e-13
    assert 0 < ppo["clipped"]["share"] < 1
    assert ppo["clipped"]["hessian"] == 0.0
    assert ppo["convex"]["A<0"] == 0.0 < ppo["convex"]["A>0"] < 1.0


def test_moduli_are_the_closed_forms():
    found = curvature.moduli(200, 6, seed=0)
    assert found["mse"]["modulus_error"] < 1e-13
    assert found["log_cosh"]["modulus_error"] < 1e-13
    assert found["kl"]["below_least_p"] == found["kl"]["above_second_p"] == 0
    assert found["kl"]["shift_error"] < 1e-13


@pytest.mark.parametrize("name", LCO)
def test_no_hessian_exceeds_the_smoothness(name):
    z, target = normal(300, 5), normal(300, 5, seed=1)
    largest = torch.linalg.eigvalsh(hessians(LCO[name], z, target))[:, -1].max()
    assert largest <= SMOOTHNESS[name](5) * (1 + 1e-12)
    # It is attained: at the target, and for the KL where two tokens share all probability.
    z = torch.tensor([[0.0, 0.0, -80.0, -80.0, -80.0]], dtype=torch.float64)
    attained = torch.linalg.eigvalsh(hessians(LCO[name], z, z))[:, -1].max()
    assert attained == pytest.approx(SMOOTHNESS[name](5), rel=1e-12)


# Bounds -------------------------------------------------------------------------------------------


def test_gradients_stay_below_the_bounds_and_a_smaller_bound_is_caught(monkeypatch):
    assert all(entry["violations"] == 0 for entry in bounds.check(20, seed=0).values())
    monkeypatch.setattr(bounds, "SLACK", -0.2)
    assert all(entry["violations"] > 0 for entry in bounds.check(20, seed=0).values())


def test_bound_of_the_kl_is_attained_by_two_nearly_equal_tokens():
    z = torch.zeros(1, 2, dtype=torch.float64)
    target = torch.tensor([[1e-3, -1e-3]], dtype=torch.float64)
    norm = library("kl", z, target)[1].norm(dim=-1)
    for bound in bounds.bounds("kl", LCO["kl"](z, target), z, target).values():
        torch.testing.assert_close(norm, bound, rtol=1e-5, atol=0)


def test_policy_gradient_norms_are_those_of_autograd():
    z, values = normal(1, 5), normal(1, 5, seed=1)
    sampled, mean = bounds.policy_gradients(z, values)
    p = z.softmax(-1)
    advantage = values - (p * values).sum(-1, keepdim=True)
    for token in range(5):
        gradient = gradient_of(lambda z, a=token: z.log_softmax(-1)[:, a], z)
        norm = advantage[0, token].abs() * gradient.norm()
        torch.testing.assert_close(sampled[0, token], norm, rtol=1e-12, atol=0)
    exact = gradient_of(lambda z: (z.softmax(-1) * values).sum(-1), z)
    torch.testing.assert_close(mean[0], exact.norm(), rtol=1e-12, atol=0)


# Rates --------------------------------------------------------------------------------------------


def test_least_probability_is_what_a_search_finds():
    goal = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
    level = torch.tensor([0.15], dtype=torch.float64)
    grid = torch.linspace(1e-3, 1 - 1e-3, 999, dtype=torch.float64)
    first, second = torch.meshgrid(grid, grid, indexing="ij")
    policies = torch.stack([first, second, 1 - first - second], dim=-1)[first + second < 1 - 1e-9]
    divergence = (goal * (goal / policies).log()).sum(-1)
    searched = policies[divergence <= level].min()
    found = rates.least_probability(goal, level)[0]
    assert found <= searched < found + 2e-3


@pytest.mark.parametrize("name", LCO)
def test_modulus_ahead_is_below_every_curvature_on_the_way(name):
    z, target = rates.draw_problems(50, 5, 2.0, seed=0)
    modulus = rates.modulus_ahead(name, z, target)
    least = 1 if name == "kl" else 0
    for part in torch.linspace(0, 1, 11, dtype=torch.float64):
        curve = hessians(LCO[name], z + part * (target - z), target)
        assert (torch.linalg.eigvalsh(curve)[:, least] >= modulus * (1 - 1e-9)).all()


@pytest.mark.parametrize("name", LCO)
def test_descent_keeps_its_bound_and_ends_at_the_rate_of_the_target(name):
    found = rates.linear(name, 5, 3, 0.5, seed=0, relative_step=0.5, steps=1000)
    assert found["held"] == 5
    assert min(found["over_ahead"]) >= 1
    assert len(found["over_final"]) == found["converged"] >= 4
    # A run that has nothing along the flattest direction is faster for longer.
    assert min(found["over_final"]) > 0.99
    assert np.median(found["over_final"]) == pytest.approx(1.0, abs=1e-2)


def test_bound_that_is_too_fast_is_caught(monkeypatch):
    honest = rates.modulus_ahead
    monkeypatch.setattr(rates, "modulus_ahead", lambda *a: torch.clamp(3 * honest(*a), max=0.4))
    assert rates.linear("kl", 5, 3, 0.5, seed=0, relative_step=0.5, steps=200)["held"] < 5


def test_squared_error_contracts_by_one_less_two_eta_over_vocabulary():
    assert rates.squared_error_contraction(10, 4, seed=0, relative_step=0.3) < 1e-10


def test_plain_policy_gradient_is_sublinear_and_a_kl_term_makes_it_linear():
    kept = [10, 100, 1000]
    plain = rates.mean_policy_gradient(20, 4, 0, 1.0, kept, regularised=False)
    linear = rates.mean_policy_gradient(20, 4, 0, 1.0, kept, regularised=True)
    assert plain["factor"][-1] > 0.998
    assert plain["gap"][1] / plain["gap"][2] < 30
    assert linear["gap"][2] < 1e-6 * linear["gap"][1]


# Directions ---------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(linear_models, "CONTEXTS", 128)
    monkeypatch.setattr(linear_models, "STEPS", 30)


def test_fit_is_stationary_and_keeps_the_shift(small):
    problem = linear_models.draw_problem(0)
    rows = torch.arange(linear_models.CONTEXTS)
    _, gradient = linear_models.gradient(linear_models.losses(problem)["sft"], problem.fitted, rows)
    assert gradient.norm() < 1e-12
    torch.testing.assert_close(problem.fitted.sum(0), problem.old.sum(0), rtol=0, atol=1e-9)


def test_target_of_the_linear_model_is_the_optimum_of_every_lco_loss(small):
    problem = linear_models.draw_problem(0)
    rows = torch.arange(linear_models.CONTEXTS)
    for name in LCO:
        loss = linear_models.losses(problem)[name]
        value, gradient = linear_models.gradient(loss, problem.optimum, rows)
        assert abs(value) < 1e-14
        assert gradient.norm() < 1e-14


@pytest.mark.parametrize("method", ["sft", *LCO])
def test_full_batch_steps_of_convex_losses_point_to_the_optimum(small, method):
    found = linear_models.trajectory(linear_models.draw_problem(1), method, False, seed=1)
    assert found["optimum"] == 1.0
    assert found["least_slack"] > -1e-12


def test_ppo_on_the_linear_model_follows_the_policy_gradient(small):
    problem = linear_models.draw_problem(0)
    rows = torch.arange(linear_models.CONTEXTS)
    p = (problem.x @ problem.old.T).softmax(-1)
    exact = -(p * problem.advantages).T @ problem.x / linear_models.CONTEXTS
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(400):
        loss = linear_models.sampled_surrogate(problem, problem.old, generator)
        draws.append(linear_models.gradient(loss, problem.old, rows)[1])
    error = torch.stack(draws).std(0) / 400**0.5
    assert ((torch.stack(draws).mean(0) - exact).abs() < 5 * error).all()


def test_share_of_aligned_steps_ignores_steps_without_gradient():
    goal = torch.tensor([1.0, 0.0])
    visited = [torch.zeros(2)] * 4
    gradients = [torch.tensor(g) for g in ([-1.0, 5.0], [-2.0, 0.0], [1.0, 0.0], [0.0, 0.0])]
    assert linear_models.aligned(visited, gradients, goal) == pytest.approx(2 / 3)


def test_sums_are_text_and_completions_keep_their_prompt():
    digits = torch.tensor([3, 9])
    ids = transformer.write_sums(digits, digits, 2 * digits)
    assert ["".join(map(chr, row)) for row in ids.tolist()] == ["3+3=06;", "9+9=18;"]
    policy = transformer.load_policy(
        "tiny-qwen2", tokenizer=transformer.build_tokenizer("bytes"), config=transformer.CONFIG
    )
    generator = torch.Generator().manual_seed(0)
    completed = transformer.complete(policy, ids, generator)
    assert torch.equal(completed[:, : transformer.PROMPT], ids[:, : transformer.PROMPT])
    assert not torch.equal(completed, ids)
    encoded = policy.tokenizer.encode("3+3=06;")
    assert encoded == ids[0].tolist()


def test_training_starts_from_the_base_and_judges_every_step(monkeypatch):
    monkeypatch.setattr(transformer, "PRETRAINING", {"base": 2, "teacher": 2})
    base, teacher = transformer.pretrain(0)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    monkeypatch.setattr(transformer, "UPDATES", 1)
    for method in transformer.METHODS:
        found = transformer.train(method, 0, 4, base, teacher)
        # Adam's first step goes against the sign of every entry of the gradient.
        assert found["own"] == 1.0
        assert found["judged"] == 1
        assert found["right"][0] == transformer.probability_of_right(base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_fisher_is_the_covariance_of_a_one_hot_draw():
    p = np.array([0.2, 0.3, 0.5])
    covariance = np.diag(p) - np.outer(p, p)
    np.testing.assert_allclose(fisher(torch.tensor(p)[None])[0].numpy(), covariance, atol=1e-15)
