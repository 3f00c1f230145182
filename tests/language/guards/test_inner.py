"""The inner loop on a softmax regression: chain rule, descent, majorisation, and LCO."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from holdfast.language.guards import inner_loop, target_surrogate
from holdfast.language.losses import lco_mse, optimal_logits

ROWS, VOCAB, WIDTH = 7, 5, 4
MASK = torch.ones(ROWS, dtype=torch.bool)


def problem(seed=0):
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(ROWS, WIDTH, generator=draw, dtype=torch.float64)
    labels = torch.randint(VOCAB, (ROWS,), generator=draw)
    weight = torch.randn(WIDTH, VOCAB, generator=draw, dtype=torch.float64, requires_grad=True)
    return inputs, labels, weight


def looked_at(inputs, labels, weight):
    """Logits, and the derivative of the summed cross-entropy with respect to them."""
    logits = (inputs @ weight).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), logits)
    return logits.detach(), gradient


def surrogate_of(inputs, labels, weight, w):
    anchor, gradient = looked_at(inputs, labels, weight)
    return lambda: target_surrogate(inputs @ weight, anchor, gradient, MASK, weight=w).total


def test_at_the_anchor_the_surrogate_is_0_and_has_the_gradient_of_the_objective():
    inputs, labels, weight = problem()
    value = surrogate_of(inputs, labels, weight, 0.25)()
    assert value == 0
    (found,) = torch.autograd.grad(value, weight)
    loss = cross_entropy(inputs @ weight, labels, reduction="sum")
    (expected,) = torch.autograd.grad(loss, weight)
    assert_close(found, expected)


@pytest.mark.parametrize("seed", range(4))
def test_with_enough_weight_the_objective_never_rises(seed):
    inputs, labels, weight = problem(seed)

    def objective():
        return cross_entropy(inputs @ weight, labels, reduction="sum")

    before = objective().item()
    for _ in range(5):  # outer steps
        surrogate = surrogate_of(inputs, labels, weight, 0.25)  # L / 2 of a softmax
        done = inner_loop(surrogate, [weight], steps=20, objective=objective)
        assert done.stopped != "not majorised"
        assert done.surrogates == sorted(done.surrogates, reverse=True)
        assert max(done.objectives) == done.objectives[0]
    assert objective().item() < before


def test_with_too_little_weight_the_check_undoes_the_step_that_left_the_objective_behind():
    inputs, labels, weight = problem()

    def objective():
        return cross_entropy(inputs @ weight, labels, reduction="sum")

    surrogate = surrogate_of(inputs, labels, weight, 1e-3)
    done = inner_loop(surrogate, [weight], steps=200, objective=objective)
    assert done.stopped == "not majorised"
    assert objective().item() == done.objectives[-1]
    bound = done.objectives[0] + done.surrogates[-1]
    assert done.objectives[-1] <= bound + 1e-9


def test_one_step_of_known_size_is_a_step_of_gradient_descent():
    inputs, labels, weight = problem()
    loss = cross_entropy(inputs @ weight, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, weight)
    before = weight.detach().clone()
    inner_loop(surrogate_of(inputs, labels, weight, 0.25), [weight], steps=1, step_size=1e-4)
    assert_close(weight.detach(), before - 1e-4 * gradient)


def test_the_loop_ends_where_the_surrogate_is_at_rest():
    inputs, labels, weight = problem()
    done = inner_loop(
        surrogate_of(inputs, labels, weight, 0.25), [weight], steps=5000, tolerance=1e-5
    )
    assert done.stopped == "stationary"
    # The least-squares solution for the target z - g / (2 w).
    anchor, gradient = looked_at(*problem())
    target = anchor - gradient / 0.5
    expected = torch.linalg.lstsq(inputs, target).solution
    assert_close(weight.detach(), expected, atol=1e-4, rtol=0.0)


def test_lco_with_the_squared_error_is_the_same_regression():
    inputs, _, weight = problem()
    draw = torch.Generator().manual_seed(1)
    advantages = torch.randn(ROWS, VOCAB, generator=draw, dtype=torch.float64)
    anchor = (inputs @ weight).detach() + 0.3 * torch.randn(
        ROWS, VOCAB, generator=draw, dtype=torch.float64
    )
    w, beta = 0.7, 2.0
    # z_t - g / (2 w) = z_old + A / beta
    terms = target_surrogate(inputs @ weight, anchor, -2 * w * advantages / beta, MASK, weight=w)
    target = optimal_logits(anchor, advantages, beta=beta)
    lco = lco_mse(inputs @ weight, target, MASK)
    (one,), (other,) = (torch.autograd.grad(x.total, weight) for x in (terms, lco))
    assert_close(one, w * VOCAB * other)


def test_positions_that_do_not_count_do_not_matter():
    inputs, labels, weight = problem()
    anchor, gradient = looked_at(inputs, labels, weight)
    mask = MASK.clone()
    mask[2] = False
    moved = inputs @ weight + 1.0
    gradient[2] = float("nan")
    terms = target_surrogate(moved, anchor, gradient, mask, weight=1.0)
    assert terms.total.isfinite() and terms.count == ROWS - 1


@pytest.mark.parametrize("change", [{"steps": 0}, {"step_size": 0.0}, {"sufficient": 1.0}])
def test_numbers_out_of_range_are_refused_by_name(change):
    inputs, labels, weight = problem()
    surrogate = surrogate_of(inputs, labels, weight, 0.25)
    with pytest.raises(ValueError, match=next(iter(change))):
        inner_loop(surrogate, [weight], **{"steps": 1, **change})
    with pytest.raises(ValueError, match="weight"):
        surrogate_of(inputs, labels, weight, 0.0)()
