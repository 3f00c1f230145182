"""Replicas of a batch that hold the same numbers give the same numbers, bit for bit."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from holdfast.bellman.aligned import AlignedLinear
from holdfast.bellman.networks import Networks, mlp


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("rows, features, hidden, actions", [(300, 4, 5, 3), (301, 9, 7, 2)])
def test_equal_replicas_stay_equal_forward_and_backward(rows, features, hidden, actions, wrapped):
    modules = [mlp(features, [hidden], actions, seed=seed) for seed in (0, 1)]
    # A chain in a chain is none of linear layers, and takes the general way.
    networks = Networks(*(nn.Sequential(each) if wrapped else each for each in modules))
    flat = networks.initial()[0].expand(6, -1).clone().requires_grad_()
    state = torch.randn(rows, features, dtype=torch.float64, generator=torch.manual_seed(0))
    values = networks.q(flat, state.expand(6, -1, -1).clone())
    (gradient,) = torch.autograd.grad(values.square().sum(), flat)
    for each in (values, gradient):
        assert all(torch.equal(each[0], other) for other in each)


@pytest.mark.parametrize("outputs", [1, 8, 13])
@pytest.mark.parametrize("inputs", [3, 16])
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients_are_those_of_linear(outputs, inputs, biased):
    draw = torch.Generator().manual_seed(0)
    shapes = [(5, inputs), (outputs, inputs), *([(outputs,)] if biased else [])]
    operands = [
        torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes
    ]
    plain = F.linear(*operands)
    with AlignedLinear():
        aligned = F.linear(*operands)
    torch.testing.assert_close(aligned, plain)
    for one, other in zip(
        torch.autograd.grad(aligned.square().sum(), operands),
        torch.autograd.grad(plain.square().sum(), operands),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
