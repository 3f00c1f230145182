"""The radius of a softmax along a direction, against zeros of its partition function."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from holdfast.language.guards import softmax_radius

SEEDS = st.integers(0, 2**31 - 1)


def test_a_binary_softmax_without_a_gap_has_a_zero_at_its_radius():
    rates = torch.tensor([0.3, -1.1], dtype=torch.float64)
    t = 1j * float(softmax_radius(rates))
    assert abs(np.exp(0.3 * t) + np.exp(-1.1 * t)) < 1e-12


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_no_zero_of_a_partition_function_lies_within_the_radius(seed):
    draw = np.random.default_rng(seed)
    z, a = draw.normal(size=6), draw.normal(size=6)
    radius = float(softmax_radius(torch.from_numpy(a)))
    # Zeros of an exponential sum by Newton's method from many starts.
    t = draw.normal(size=200) * 3 * radius + 1j * draw.normal(size=200) * 3 * radius
    with np.errstate(all="ignore"):
        for _ in range(60):
            terms = np.exp(z[:, None] + a[:, None] * t)
            t = t - terms.sum(0) / (a[:, None] * terms).sum(0)
        terms = np.exp(z[:, None] + a[:, None] * t)
        found = t[np.abs(terms.sum(0)) < 1e-9 * np.abs(terms).sum(0)]
    assert len(found)
    assert (np.abs(found.imag) >= radius * (1 - 1e-9)).all()


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(0.05, 1.0))
def test_under_linear_logits_a_step_of_a_share_of_the_radius_moves_no_log_probability_more(
    seed, share
):
    draw = torch.Generator().manual_seed(seed)
    z, a = torch.randn(2, 5, 9, generator=draw, dtype=torch.float64)
    step = share * softmax_radius(a).unsqueeze(-1)
    moved = (z + step * a).log_softmax(-1) - z.log_softmax(-1)
    assert moved.abs().max() <= share * math.pi * (1 + 1e-12)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(0.1, 10.0), st.floats(-3.0, 3.0))
def test_it_scales_with_temperature_and_ignores_sign_and_shifts(seed, temperature, shift):
    a = torch.randn(4, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    radius = softmax_radius(a)
    assert_close(softmax_radius(a / temperature), temperature * radius)
    assert_close(softmax_radius(-a), radius)
    assert_close(softmax_radius(a + shift), radius)


def test_what_does_not_move_has_no_radius_and_what_is_left_out_does_not_count():
    assert softmax_radius(torch.ones(3)) == math.inf
    assert softmax_radius(torch.full((3,), math.nan)) == math.inf
    rates = torch.tensor([[0.0, 2.0, math.nan], [0.0, 2.0, -math.inf]])
    assert_close(softmax_radius(rates), torch.full((2,), math.pi / 2))
    assert softmax_radius(torch.zeros(2, 4, dtype=torch.bfloat16)).dtype == torch.float32
    with pytest.raises(ValueError, match="directional_logits"):
        softmax_radius(torch.zeros(()))
