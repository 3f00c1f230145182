"""Every loss: its gradient does not depend on how a batch is cut, padded or sharded.

A small policy scores observations in rows of its own; the gradient of a step is that of the summed
totals over the summed counts, as the trainer computes it.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import get_type_hints

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from holdfast.control import losses
from holdfast.control.losses import (
    advantage_weights,
    denoising,
    dppo,
    idql_critic,
    idql_value,
    mse,
    nll,
    ppo,
    value_loss,
    weighted_regression,
    with_cloning,
)
from holdfast.joint import LossTerms

ROWS, WIDTH = 7, 4

Loss = Callable[[Tensor, Tensor], LossTerms]
"""Of what the policy says of each row, ``(rows, width)``, and which rows count, ``(rows,)``."""


def known(said: Tensor) -> Tensor:
    """Some other function of the same rows."""
    return 0.9 * said.detach() + 0.1 * said.detach().sin()


def of_policy(said: Tensor, mask: Tensor, **options: float) -> LossTerms:
    return ppo(said[:, 0], known(said)[:, 0], said[:, 1], mask, **options)


def of_chains(said: Tensor, mask: Tensor) -> LossTerms:
    every = mask[:, None].expand(said.shape)
    index = torch.arange(WIDTH)
    options = {"epsilon": 0.2, "epsilon_base": 0.05, "fine_tuned_steps": WIDTH, "dimensions": 2}
    return dppo(said, known(said), said[:, 1], index, every, **options)


def of_values(said: Tensor, mask: Tensor, epsilon: float | None = None) -> LossTerms:
    old = None if epsilon is None else known(said)[:, 0]
    return value_loss(said[:, 0], said[:, 1], mask, old_values=old, epsilon=epsilon)


def of_critics(said: Tensor, mask: Tensor) -> LossTerms:
    ended = said[:, 2].detach() > 0
    return idql_critic(said[:, :2].T, said[:, 2], said[:, 3], ended, mask, discount=0.9)


def of_weights(said: Tensor, mask: Tensor) -> LossTerms:
    return weighted_regression(said[:, 0], advantage_weights(said[:, 1]), mask)


def of_both(said: Tensor, mask: Tensor) -> LossTerms:
    cloning = nll(said[:, 2:3], mask[:, None])
    return with_cloning(of_policy(said, mask), cloning, weight=0.3, of="teacher")


def of_chunks(loss: Callable[[Tensor, Tensor, Tensor], LossTerms]) -> Loss:
    def apply(said: Tensor, mask: Tensor) -> LossTerms:
        return loss(said[:, None], known(said)[:, None], mask[:, None])

    return apply


LOSSES: dict[str, Loss] = {
    "ppo": of_policy,
    "ppo, narrow": partial(of_policy, epsilon=0.05),
    "dppo": of_chains,
    "value_loss": of_values,
    "value_loss, clipped": partial(of_values, epsilon=0.1),
    "idql_value": lambda said, mask: idql_value(said[:, 0], said[:, 1:3].T, mask),
    "idql_critic": of_critics,
    "weighted_regression": of_weights,
    "with_cloning": of_both,
    "nll": lambda said, mask: nll(said, mask[:, None].expand(said.shape)),
    "mse": of_chunks(mse),
    "denoising": of_chunks(denoising),
}


def step(loss: Loss, policy: Tensor, observations: Tensor, parts: list[tuple[Tensor, int]]):
    """Gradient, mean loss and mean metrics over the parts of a batch: rows, and padding."""
    terms = []
    for rows, padding in parts:
        said = torch.nn.functional.pad(observations[rows] @ policy, (0, 0, 0, padding))
        mask = torch.arange(len(said)) < len(rows)
        # Padding holds what no loss survives looking at.
        terms.append(loss(said.masked_fill(~mask[:, None], math.nan), mask))
    count = sum(part.count for part in terms)
    (gradient,) = torch.autograd.grad(sum(part.total for part in terms), policy)
    means = {name: sum(part.metrics[name] for part in terms) / count for name in terms[0].metrics}
    return gradient / count, sum(part.total.detach() for part in terms) / count, means


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=12)
@given(st.integers(0, 2**31), st.integers(1, ROWS), st.integers(1, 3), st.integers(0, 3))
def test_gradient_does_not_depend_on_cutting_padding_or_sharding(name, seed, size, ranks, padding):
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    policy = torch.randn(3, WIDTH, **draw).requires_grad_()
    observations = torch.randn(ROWS, 3, **draw)
    every = torch.arange(ROWS)
    whole = step(LOSSES[name], policy, observations, [(every, 0)])
    assume(whole[0].abs().max() > 0)  # a clipped loss may be flat in every row
    cut = [(part, padding) for part in every.split(size)]
    sharded = [(every[rank::ranks], rank) for rank in range(ranks)]
    for parts in (cut, sharded, [(every.flip(0), padding)]):
        torch.testing.assert_close(step(LOSSES[name], policy, observations, parts), whole)


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_in_which_nothing_counts_has_no_gradient(name):
    said = torch.full((3, WIDTH), math.nan, requires_grad=True)
    terms = LOSSES[name](said, torch.zeros(3).bool())
    (slope,) = torch.autograd.grad(terms.total, said)
    assert terms.count == 0 and terms.total == 0 and (slope == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_metrics_have_no_graph_and_losses_are_at_least_single(name):
    said = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    half = said.bfloat16().requires_grad_()
    terms = LOSSES[name](half, torch.ones(3).bool())
    assert terms.total.dtype == torch.float32 and not terms.count.is_floating_point()
    assert not any(value.requires_grad for value in terms.metrics.values())


def test_every_loss_is_put_through_this():
    def returns_terms(name: str) -> bool:
        member = getattr(losses, name)
        return inspect.isfunction(member) and get_type_hints(member).get("return") is LossTerms

    expected = {name for name in losses.__all__ if returns_terms(name)}
    assert expected and expected == {name.split(",")[0] for name in LOSSES}
