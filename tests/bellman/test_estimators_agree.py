"""Estimators that must agree: a reward that is free everywhere but for the anchor's."""

import numpy as np
import pytest

from holdfast.bellman import TabularMDP, inverse_reward
from holdfast.bellman.estimators import (
    ChoiceModel,
    Flow,
    choice_shares,
    conditional_choice_probabilities,
    maximum_entropy_irl,
    nested_fixed_point,
)

STATES, ACTIONS, ANCHOR = 4, 3, 1


def saturated(problem: TabularMDP) -> ChoiceModel:
    """One parameter for every pair of state and action but the anchor's, whose reward is given."""
    features = np.zeros((STATES, ACTIONS, STATES * (ACTIONS - 1)))
    pairs = [(s, a) for s in range(STATES) for a in range(ACTIONS) if a != ANCHOR]
    for index, pair in enumerate(pairs):
        features[(*pair, index)] = 1
    known = np.zeros((STATES, ACTIONS))
    known[:, ANCHOR] = problem.rewards[:, ANCHOR]
    return ChoiceModel(features, problem.transitions, problem.discount, offset=known)


@pytest.fixture(scope="module", params=[0.5, 0.95])
def case(request):
    problem = TabularMDP.random(STATES, ACTIONS, request.param, seed=0)
    rows = problem.sample_trajectories(200, 20, seed=1)
    counts = rows.counts(STATES, ACTIONS)
    shares = counts / counts.sum(-1, keepdims=True)
    known = problem.rewards[:, ANCHOR]
    exact = inverse_reward(shares, problem.transitions, ANCHOR, known, problem.discount)
    return problem, counts, exact


def test_maximum_likelihood_is_the_exact_inverse_of_the_shares(case):
    problem, counts, exact = case
    estimate = nested_fixed_point(saturated(problem), counts)
    np.testing.assert_allclose(estimate.rewards, exact, atol=1e-6)


def test_one_round_of_choice_probabilities_is_too(case):
    problem, counts, exact = case
    shares = choice_shares(counts, pseudo_count=0)
    estimate = conditional_choice_probabilities(saturated(problem), counts, policy=shares)
    np.testing.assert_allclose(estimate.rewards, exact, atol=1e-6)


def test_maximum_entropy_with_the_counts_own_inflow_is_too(case):
    problem, counts, exact = case
    ahead = np.einsum("sa,sat->t", counts, problem.transitions)
    flow = Flow(counts.astype(float), counts.sum(-1) - problem.discount * ahead)
    found = maximum_entropy_irl(saturated(problem), flow)
    np.testing.assert_allclose(found.rewards, exact, atol=1e-6)


def test_the_reward_is_recovered_within_its_standard_errors(case):
    problem, counts, _ = case
    estimate = nested_fixed_point(saturated(problem), counts)
    free = [a for a in range(ACTIONS) if a != ANCHOR]
    errors = estimate.parameters - problem.rewards[:, free].ravel()
    assert (abs(errors) < 4 * estimate.standard_errors).all()
    assert (estimate.standard_errors < 0.5).all()
