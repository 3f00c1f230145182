import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.control.losses import advantage_weights, weighted_regression

seeds = st.integers(0, 2**31)


def test_weights_worked_example():
    """exp(0 / 2), exp(2 log 3 / 2), exp(2 log 7 / 2) held at 5, and the vanishing one."""
    advantages = torch.tensor([0, 2 * math.log(3), 2 * math.log(7), -1e6], dtype=torch.float64)
    found = advantage_weights(advantages, temperature=2.0, cap=5.0)
    torch.testing.assert_close(found, torch.tensor([1, 3, 5, 0], dtype=torch.float64))


@given(st.floats(-1e30, 1e30), st.floats(1e-6, 1e6), st.floats(1e-3, 1e3))
def test_a_weight_is_never_above_its_cap_or_undefined(advantage, temperature, cap):
    found = advantage_weights(
        torch.tensor(advantage, dtype=torch.float64), temperature=temperature, cap=cap
    ).item()
    assert 0 <= found <= cap
    assert found == pytest.approx(min(math.exp(min(advantage / temperature, 700)), cap))


def test_weights_are_constants():
    advantages = torch.ones(2, requires_grad=True)
    assert not advantage_weights(advantages).requires_grad
    losses = torch.tensor([1.0, 2.0], requires_grad=True)
    weights = torch.tensor([3.0, 0.5], requires_grad=True)
    terms = weighted_regression(losses, weights)
    terms.total.backward()
    assert terms.total.item() == 4 and losses.grad.tolist() == [3, 0.5] and weights.grad is None
    assert {name: value.item() for name, value in terms.metrics.items()} == {
        "unweighted_loss": 3,
        "weight": 3.5,
        "weight_squared": 9.25,
    }


@given(seeds, st.floats(0.3, 5.0))
def test_at_rest_a_gaussian_is_at_the_weighted_mean_of_actions(seed, temperature):
    """The policy that regression finds is the behaviour policy, tilted by exp(A / temperature)."""
    generator = torch.Generator().manual_seed(seed)
    actions = torch.randn(50, generator=generator, dtype=torch.float64)
    advantages = -(actions - 0.5).square()
    weights = advantage_weights(advantages, temperature=temperature)
    tilt = (advantages / temperature).softmax(0)
    mean = (tilt * actions).sum().requires_grad_()
    terms = weighted_regression(0.5 * (actions - mean).square(), weights)
    (slope,) = torch.autograd.grad(terms.total, mean)
    assert slope.item() == pytest.approx(0, abs=1e-9)


def test_errors_name_what_is_wrong():
    zeros = torch.zeros(2)
    for name, options in (("temperature", {"temperature": 0.0}), ("cap", {"cap": -1.0})):
        with pytest.raises(ValueError, match=name):
            advantage_weights(zeros, **options)
    for weights in (torch.zeros(3), zeros - 1, zeros + math.inf):
        with pytest.raises(ValueError, match="weights"):
            weighted_regression(zeros, weights)
