import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.bellman.estimators.choice_model import ChoiceModel
from holdfast.bellman.estimators.newton import Curve, maximise
from holdfast.bellman.estimators.nfxp import nested_fixed_point
from holdfast.errors import TrainingError

STATES, ACTIONS, PARAMETERS = 5, 3, 2


def draw(seed: int, discount: float) -> tuple[ChoiceModel, np.ndarray, np.ndarray]:
    """A random model, true parameters, and counts of choices in its states."""
    random = np.random.default_rng(seed)
    transitions = random.dirichlet(np.ones(STATES), size=(STATES, ACTIONS))
    features = random.normal(size=(STATES, ACTIONS, PARAMETERS))
    offset = random.normal(size=(STATES, ACTIONS))
    model = ChoiceModel(features, transitions, discount, offset=offset)
    theta = random.normal(size=PARAMETERS)
    visits = random.integers(200, 400, size=STATES)
    policy = policy_by_sweeps(model, theta)
    counts = np.stack([random.multinomial(n, row) for n, row in zip(visits, policy, strict=True)])
    return model, theta, counts.astype(float)


def policy_by_sweeps(model: ChoiceModel, theta: np.ndarray) -> np.ndarray:
    """Choice probabilities by value iteration: another route to the fixed point."""
    rewards = model.offset + np.einsum("sak,k->sa", model.features, theta)
    values = np.zeros(len(rewards))
    for _ in range(100_000):
        q = rewards + model.discount * np.einsum("sat,t->sa", model.transitions, values)
        ahead = np.logaddexp.reduce(q, axis=1)
        if abs(ahead - values).max() < 1e-13 * (1 + abs(values).max()):
            break
        values = ahead
    return np.exp(q - ahead[:, None])


def log_likelihood(model: ChoiceModel, theta: np.ndarray, counts: np.ndarray) -> float:
    return float((counts * np.log(policy_by_sweeps(model, theta))).sum())


def differences(function, point: np.ndarray, width: float) -> np.ndarray:
    """Central differences of ``function`` along each axis, the axis last."""
    return np.stack(
        [
            (np.asarray(function(point + step)) - np.asarray(function(point - step))) / (2 * width)
            for step in width * np.eye(len(point))
        ],
        axis=-1,
    )


def numerical_hessian(function, point: np.ndarray, width: float = 1e-3) -> np.ndarray:
    """From values alone, with the error of two widths extrapolated away."""

    def at(step: float) -> np.ndarray:
        return differences(lambda x: differences(function, x, step), point, step)

    return (4 * at(width) - at(2 * width)) / 3


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 0.9]))
def test_policy_iteration_finds_the_fixed_point_of_value_iteration(seed, discount):
    model, theta, _ = draw(seed, discount)
    np.testing.assert_allclose(
        model.solve(theta).policy, policy_by_sweeps(model, theta), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("discount", [0.9999, 1 - 1e-6])
def test_the_fixed_point_holds_at_discounts_near_one(discount):
    model, theta, _ = draw(3, discount)
    solution = model.solve(theta)
    residual = model.rewards(theta) + discount * model.transitions @ solution.values - solution.q
    assert abs(residual).max() <= 1e-14 * abs(solution.q).max() * 10
    np.testing.assert_allclose(solution.policy.sum(-1), 1, atol=1e-12)


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.8, 0.99]))
def test_gradient_and_hessian_equal_finite_differences(seed, discount):
    model, theta, counts = draw(seed, discount)
    theta = theta + 0.3  # away from the maximum, where the gradient is not 0
    curve = model.likelihood(theta, counts)
    gradient = differences(lambda x: model.likelihood(x, counts).value, theta, 1e-5)
    np.testing.assert_allclose(curve.gradient, gradient, rtol=1e-6, atol=1e-4)
    hessian = differences(lambda x: model.likelihood(x, counts).gradient, theta, 1e-5)
    scale = abs(curve.hessian).max()
    np.testing.assert_allclose(curve.hessian, hessian, rtol=1e-5, atol=1e-6 * scale)


def test_standard_errors_come_from_the_hessian_of_the_likelihood_by_value_iteration():
    """Brute force: second differences of a likelihood whose fixed point is found by sweeps."""
    model, _, counts = draw(7, 0.9)
    estimate = nested_fixed_point(model, counts)
    hessian = numerical_hessian(lambda x: log_likelihood(model, x, counts), estimate.parameters)
    np.testing.assert_allclose(
        estimate.standard_errors, np.sqrt(np.diag(np.linalg.inv(-hessian))), rtol=1e-5
    )
    assert log_likelihood(model, estimate.parameters, counts) == pytest.approx(
        estimate.log_likelihood, rel=1e-12
    )


def test_information_is_what_the_hessian_is_on_average():
    """At the truth, with counts at their expectation, both are the same matrix."""
    model, theta, _ = draw(11, 0.9)
    curve = model.likelihood(theta, 100 * model.solve(theta).policy)
    np.testing.assert_allclose(curve.information, -curve.hessian, rtol=1e-9)
    np.testing.assert_allclose(curve.gradient, 0, atol=1e-9)


def test_cross_derivative_equals_finite_differences_in_the_transitions():
    model, theta, counts = draw(5, 0.9)
    other = np.random.default_rng(1).dirichlet(np.ones(STATES), size=(STATES, ACTIONS))
    direction = other - model.transitions

    def gradient(share):
        moved = ChoiceModel(
            model.features,
            model.transitions + share[0] * direction,
            model.discount,
            offset=model.offset,
        )
        return moved.likelihood(theta, counts).gradient

    # Central differences: a share of -1e-5 keeps every probability positive here.
    expected = differences(gradient, np.zeros(1), 1e-5)[:, 0]
    solution = model.solve(theta)
    np.testing.assert_allclose(
        solution.cross_derivative(counts, direction), expected, rtol=1e-6, atol=1e-5
    )


def test_parameters_are_recovered_exactly_from_expected_counts():
    model, theta, _ = draw(13, 0.95)
    estimate = nested_fixed_point(model, 1000 * model.solve(theta).policy)
    np.testing.assert_allclose(estimate.parameters, theta, atol=1e-7)
    np.testing.assert_allclose(estimate.rewards, model.rewards(theta), atol=1e-7)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """60 data sets, 2 parameters: 95 % intervals cover 114 of 120, give or take 4.9 (2 sd)."""
    covered = 0
    for seed in range(60):
        model, theta, counts = draw(1000 + seed, 0.8)
        estimate = nested_fixed_point(model, counts)
        covered += int((abs(estimate.parameters - theta) < 1.96 * estimate.standard_errors).sum())
    assert 105 <= covered <= 120


def test_the_maximum_does_not_depend_on_the_start():
    model, theta, counts = draw(17, 0.9)
    first = nested_fixed_point(model, counts)
    second = nested_fixed_point(model, counts, start=theta + 5)
    np.testing.assert_allclose(first.parameters, second.parameters, atol=1e-6)


def test_parameters_that_the_choices_do_not_determine_are_refused():
    model, _, counts = draw(19, 0.9)
    twice = np.concatenate([model.features, model.features[..., :1]], axis=-1)
    doubled = ChoiceModel(twice, model.transitions, model.discount)
    with pytest.raises(TrainingError, match="parameters 0, 2"):
        nested_fixed_point(doubled, counts)


def test_choices_that_a_threshold_separates_are_refused():
    """One action in one half of the states, the other in the rest: infinite parameters are best."""
    features = np.zeros((4, 2, 1))
    features[:, 1, 0] = [-2, -1, 1, 2]
    stay = np.broadcast_to(np.eye(4)[:, None], (4, 2, 4))
    counts = np.array([[5, 0], [5, 0], [0, 5], [0, 5]])
    with pytest.raises(TrainingError, match="no maximum|do not determine"):
        nested_fixed_point(ChoiceModel(features, stay, 0.0), counts)


def test_newton_climbs_out_of_a_convex_region():
    """-(x² - 1)² is convex around 0.1; its maxima are at ±1."""

    def curve(x):
        value = -float((x[0] ** 2 - 1) ** 2)
        slope, bend = -4 * x * (x**2 - 1), np.array([[-12 * x[0] ** 2 + 4]])
        return Curve(value, slope, bend, np.array([[8.0]]))

    assert maximise(curve, np.array([0.1])).parameters == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"discount": 1.0}, "discount is 1.0"),
        ({"discount": -0.1}, "discount"),
        ({"discount": float("nan")}, "discount"),
        ({"features": np.zeros((2, 2))}, "features has shape"),
        ({"features": np.full((2, 2, 1), np.nan)}, r"features is nan at \(0, 0, 0\)"),
        ({"transitions": np.ones((2, 2, 2))}, r"transitions\[0, 0\] is no distribution"),
        ({"transitions": np.ones((2, 3, 2)) / 2}, "transitions has shape"),
        ({"offset": np.zeros((3, 2))}, "offset has shape"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "features": np.ones((2, 2, 1)),
        "transitions": np.full((2, 2, 2), 0.5),
        "discount": 0.9,
        "offset": None,
    } | change
    with pytest.raises(ValueError, match=message):
        ChoiceModel(
            arguments["features"],
            arguments["transitions"],
            arguments["discount"],
            offset=arguments["offset"],
        )


@pytest.mark.parametrize(
    "counts", [np.ones((2, 3)), -np.ones((STATES, ACTIONS)), np.zeros((STATES, ACTIONS))]
)
def test_bad_counts_are_refused(counts):
    with pytest.raises(ValueError, match="counts"):
        nested_fixed_point(draw(1, 0.5)[0], counts)
