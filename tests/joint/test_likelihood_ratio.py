import math

import pytest
import torch

from holdfast.joint.likelihood_ratio import (
    MAX_LOG_RATIO,
    clipped_surrogate,
    exponential,
    kl_k3,
)


@pytest.mark.parametrize("function", [torch.exp, torch.expm1])
def test_an_exponential_is_itself_and_then_its_tangent(function):
    below = torch.linspace(-30, MAX_LOG_RATIO, 41, dtype=torch.float64)
    torch.testing.assert_close(exponential(below, function), function(below))
    above = torch.tensor([MAX_LOG_RATIO + 3], dtype=torch.float64)
    edge = torch.full_like(above, MAX_LOG_RATIO)
    torch.testing.assert_close(
        exponential(above, function), function(edge) + 3 * math.exp(MAX_LOG_RATIO)
    )


def test_an_exponential_keeps_a_finite_slope_wherever_it_is():
    leaf = torch.tensor([-1e4, 0.0, 1e4, 1e30], requires_grad=True)
    (slope,) = torch.autograd.grad(exponential(leaf).sum(), leaf)
    assert slope.isfinite().all() and (slope[1:] > 0).all()


def test_a_range_may_be_that_of_each_row():
    """Ratio 2 with advantage 1, held below 1.1 and below 3; ratio 1/2 with -1, above 0.9."""
    ratio = torch.tensor([2.0, 2.0, 0.5])
    advantages = torch.tensor([1.0, 1.0, -1.0])
    low, high = torch.tensor([0.9, 0.5, 0.9]), torch.tensor([1.1, 3.0, 1.1])
    torch.testing.assert_close(
        clipped_surrogate(ratio, advantages, low, high), torch.tensor([-1.1, -2.0, 0.9])
    )
    one = clipped_surrogate(ratio, advantages, 0.9, 1.1)
    torch.testing.assert_close(one, torch.tensor([-1.1, -1.1, 0.9]))


def test_a_divergence_of_normals_is_estimated_without_bias():
    """KL(N(0.3, 1) || N(0, 1)) = 0.045, by quadrature over the density of the first."""
    actions = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    policy, reference = torch.distributions.Normal(0.3, 1.0), torch.distributions.Normal(0.0, 1.0)
    logps = policy.log_prob(actions)
    estimates = kl_k3(logps, reference.log_prob(actions))
    assert estimates.min() >= 0
    assert torch.trapezoid(logps.exp() * estimates, actions).item() == pytest.approx(0.045)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="reference_logps"):
        kl_k3(torch.zeros(2), torch.zeros(1))
