import numpy as np
import pytest

from holdfast.bellman.bus import bus_model
from holdfast.bellman.estimators.ccp import choice_shares, conditional_choice_probabilities
from holdfast.bellman.estimators.choice_model import ChoiceModel
from holdfast.bellman.estimators.nfxp import nested_fixed_point

STATES, ACTIONS = 6, 3


def draw(seed: int, discount: float = 0.9, visits: int = 4000):
    """A random model, its true parameters and policy, and choices in its states."""
    random = np.random.default_rng(seed)
    transitions = random.dirichlet(np.ones(STATES), size=(STATES, ACTIONS))
    model = ChoiceModel(
        random.normal(size=(STATES, ACTIONS, 2)),
        transitions,
        discount,
        offset=random.normal(size=(STATES, ACTIONS)),
    )
    theta = random.normal(size=2)
    policy = model.solve(theta).policy
    counts = np.stack([random.multinomial(visits, row) for row in policy])
    return model, theta, policy, counts


@pytest.mark.parametrize("discount", [0.0, 0.9, 0.9999])
def test_the_true_policy_gives_the_true_parameters(discount):
    model, theta, policy, _ = draw(1, discount)
    estimate = conditional_choice_probabilities(model, 1000 * policy, policy=policy)
    np.testing.assert_allclose(estimate.parameters, theta, atol=1e-6)
    np.testing.assert_allclose(estimate.solution.policy, policy, atol=1e-8)


def test_values_of_a_policy_equal_those_by_evaluating_it():
    """Sweeps of ``V <- sum_a pi (r - log pi + discount E V')``, at parameters of no optimum.

    With one state's choices of parameter 0 the q that the estimate uses is not visible, so the
    check goes through its fitted probabilities: the logit of q of the policy that was given.
    """
    model, theta, _, counts = draw(2)
    policy = choice_shares(counts, pseudo_count=1e5)
    estimate = conditional_choice_probabilities(model, counts, policy=policy)
    rewards = model.rewards(estimate.parameters)
    values = np.zeros(STATES)
    for _ in range(2000):
        q = rewards + 0.9 * np.einsum("sat,t->sa", model.transitions, values)
        values = (policy * (q - np.log(policy))).sum(-1)
    fitted = np.exp(q - np.logaddexp.reduce(q, axis=1)[:, None])
    # First-order condition of the logit in the features' slopes, by finite differences in theta.
    for axis in range(2):
        moved = model.rewards(estimate.parameters + 1e-6 * np.eye(2)[axis]) - rewards
        ahead = np.zeros(STATES)
        for _ in range(2000):
            slope = moved + 0.9 * np.einsum("sat,t->sa", model.transitions, ahead)
            ahead = (policy * slope).sum(-1)
        gradient = ((counts - counts.sum(-1, keepdims=True) * fitted) * slope / 1e-6).sum()
        assert abs(gradient) < 1e-3 * counts.sum() ** 0.5


def test_iterating_leads_to_the_maximum_of_the_likelihood():
    model, _, _, counts = draw(3)
    once = conditional_choice_probabilities(model, counts)
    often = conditional_choice_probabilities(model, counts, iterations=15)
    best = nested_fixed_point(model, counts)
    np.testing.assert_allclose(often.parameters, best.parameters, atol=1e-7)
    assert once.log_likelihood < best.log_likelihood
    assert often.log_likelihood == pytest.approx(best.log_likelihood, rel=1e-12)


def test_one_iteration_is_as_good_as_maximum_likelihood_with_much_data():
    """The difference of the two is small against their standard errors, which agree."""
    model, theta, _, counts = draw(4, visits=100_000)
    once = conditional_choice_probabilities(model, counts)
    best = nested_fixed_point(model, counts)
    assert (abs(once.parameters - best.parameters) < 0.3 * best.standard_errors).all()
    assert (abs(once.parameters - theta) < 4 * once.standard_errors).all()
    np.testing.assert_allclose(once.standard_errors, best.standard_errors, rtol=0.03)
    np.testing.assert_allclose(once.covariance_from_scores, once.covariance, rtol=0.1, atol=1e-7)


def test_bus_engines_at_rusts_discount():
    model = bus_model([0.39, 0.6, 0.01], discount=0.9999, bins=90)
    theta = np.array([10.0, 2.3])
    counts = 1e4 * model.solve(theta).policy
    estimate = conditional_choice_probabilities(model, counts, policy=model.solve(theta).policy)
    np.testing.assert_allclose(estimate.parameters, theta, rtol=1e-5)


def test_shares_by_hand():
    """All states together: 3 of 4 and 1 of 4. With a pseudo-count of 4: 3 and 1 more each."""
    counts = [[2, 0], [1, 1], [0, 0]]
    shares = choice_shares(counts, pseudo_count=4)
    np.testing.assert_allclose(shares, [[5 / 6, 1 / 6], [4 / 6, 2 / 6], [3 / 4, 1 / 4]])


@pytest.mark.parametrize(
    ("counts", "pseudo_count", "message"),
    [
        ([[1, 1], [0, 0]], 0, "state 1 has no choices"),
        ([[1, 1]], -1, "pseudo_count is -1"),
        ([[-1, 1]], 1, "counts"),
        ([1, 1], 1, "counts"),
    ],
)
def test_bad_counts_are_refused(counts, pseudo_count, message):
    with pytest.raises(ValueError, match=message):
        choice_shares(counts, pseudo_count=pseudo_count)


def test_bad_policies_are_refused():
    model, _, policy, counts = draw(5)
    for bad in (policy[:, :2], 2 * policy, policy - 1):
        with pytest.raises(ValueError, match="policy must be probabilities"):
            conditional_choice_probabilities(model, counts, policy=bad)
    with pytest.raises(ValueError, match="iterations"):
        conditional_choice_probabilities(model, counts, iterations=0)
