"""Geometry of gradients against flattened vectors and known quadratics."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.joint.checkpoint import reunite, separate
from holdfast.joint.geometry import Geometry, PairEstimates, smoothed


def draws(seed):
    return torch.Generator().manual_seed(seed)


def split(row):
    """A flat gradient as tensors of several shapes, one of them absent."""
    return [row[:4].clone().view(2, 2), None, row[4:].clone()]


def test_geometry_is_that_of_the_flattened_gradients():
    matrix = torch.randn(3, 7, generator=draws(4), dtype=torch.float64)
    names = ("a", "b", "c")
    geometry = Geometry.of({name: split(row) for name, row in zip(names, matrix, strict=True)})
    torch.testing.assert_close(torch.tensor(geometry.gram, dtype=torch.float64), matrix @ matrix.T)
    assert geometry.norms == pytest.approx(
        dict(zip(names, matrix.norm(dim=1).tolist(), strict=True))
    )
    cosine = torch.nn.functional.cosine_similarity
    assert geometry.cosines == pytest.approx(
        {
            f"{x}/{y}": float(cosine(matrix[i], matrix[j], dim=0))
            for i, x in enumerate(names)
            for j, y in enumerate(names)
            if i < j
        }
    )


def test_inner_products_of_half_precision_are_not_rounded_to_it():
    one = torch.full((4096,), 1.0, dtype=torch.bfloat16)
    other = one.clone()
    other[0] = -8.0
    assert Geometry.of({"a": [one], "b": [other]}).gram[0][1] == 4087.0


def test_parameters_of_one_objective_alone_are_no_part_of_the_geometry():
    policy, other, critic = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0]), torch.ones(7)
    geometry = Geometry.of({"il": [policy, None], "rl": [other, critic]})
    assert geometry.norms == {"il": 5.0, "rl": 5.0}
    assert geometry.cosines["il/rl"] == pytest.approx(24 / 25)
    assert set(geometry.as_record()) == {"norms", "cosines"}


def test_gradients_of_different_parameters_have_no_geometry_to_record():
    geometry = Geometry.of({"il": [torch.ones(2), None], "rl": [None, torch.ones(3)]})
    assert not geometry.overlaps and geometry.as_record() == {}


def test_the_cosine_with_a_zero_gradient_is_not_a_number():
    assert math.isnan(Geometry.of({"a": [torch.zeros(2)], "b": [None]}).cosines["a/b"])


def noisy(generator, deviation, curvature, theta):
    noise = torch.randn(theta.shape, generator=generator, dtype=torch.float64)
    return curvature * theta + deviation * noise


@given(
    curvatures=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
    smoothing=st.floats(0, 0.95),
    together=st.booleans(),
)
def test_smoothness_of_an_isotropic_quadratic_is_its_curvature(curvatures, smoothing, together):
    """Without noise every secant is exact, wherever the other objective's turns led in between."""
    estimates = PairEstimates(("a", "b"), smoothing)
    theta = torch.tensor([3.0, -2.0], dtype=torch.float64)
    for step in range(8):
        gradients = {"a": [curvatures[0] * theta], "b": [curvatures[1] * (theta - 1.0)]}
        if not together:
            gradients.pop("a" if step % 3 else "b")
        estimates.update(gradients, [theta])
        # Small enough steps: near the end of the way rounding would be all that moves.
        theta = theta - 0.02 * sum(parts[0] for parts in gradients.values())
    assert estimates.averages["smoothness/a"] == pytest.approx(curvatures[0])
    assert estimates.averages["smoothness/b"] == pytest.approx(curvatures[1])


def test_variance_is_that_of_the_gradient_where_it_is_only_noise():
    """½ E‖g - g'‖² is the summed variance of the elements: here 12 of 0.3² each."""
    generator = draws(0)
    estimates = PairEstimates(("a", "b"), 0.999)
    theta = torch.zeros(12, dtype=torch.float64)
    for _ in range(3000):
        estimates.update({"a": [noisy(generator, 0.3, 1.0, theta)]}, [theta])
    assert estimates.averages["variance/a"] == pytest.approx(12 * 0.09, rel=0.1)
    assert "smoothness/a" not in estimates.averages  # it never moved


def test_averages_are_exponential_and_the_cosine_is_that_of_the_latest_pair():
    estimates = PairEstimates(("a", "b"), 0.75)
    theta = [torch.zeros(2)]
    x, y, diagonal = (torch.tensor(v) for v in ([1.0, 0.0], [0.0, 2.0], [1.0, 1.0]))
    estimates.update({"a": [x]}, theta)
    assert "cosine" not in estimates.averages
    estimates.update({"b": [y]}, theta)
    assert estimates.averages["cosine"] == 0.0
    estimates.update({"a": [3 * diagonal]}, theta)
    assert estimates.averages["cosine"] == pytest.approx(0.25 * math.sqrt(0.5))
    assert estimates.averages["norm/a"] == pytest.approx(0.75 * 1 + 0.25 * 3 * math.sqrt(2))
    estimates.update({"a": [x], "b": [-x], "c": [y]}, theta)
    assert estimates.averages["cosine"] == pytest.approx(0.75 * 0.25 * math.sqrt(0.5) - 0.25)
    assert not any(key.endswith("/c") for key in estimates.averages)


def test_smoothness_looks_only_at_parameters_that_have_a_gradient():
    """Networks of their own: what the other objective moves says nothing of this one."""
    estimates = PairEstimates(("a", "b"), 0.0)
    mine, other = torch.tensor([1.0]), torch.tensor([5.0])
    for _ in range(3):
        estimates.update({"a": [2.0 * mine, None]}, [mine, other])
        mine, other = mine - 0.1, other + 100.0
    assert estimates.averages["smoothness/a"] == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_turn_that_is_not_finite_is_forgotten(value):
    estimates = PairEstimates(("a", "b"), 0.5)
    theta = [torch.zeros(2)]
    estimates.update({"a": [torch.ones(2)]}, theta)
    before = estimates.state_dict()
    estimates.update({"a": [torch.tensor([value, 1.0])], "b": [torch.ones(2)]}, theta)
    assert estimates.state_dict()["averages"] == before["averages"]
    assert torch.equal(estimates.state_dict()["latest"]["a"]["gradient"][0], torch.ones(2))


def test_estimates_keep_no_buffer_that_is_used_again():
    estimates = PairEstimates(("a", "b"), 0.0)
    gradient, theta = torch.ones(2), torch.zeros(2)
    estimates.update({"a": [gradient]}, [theta])
    gradient.mul_(5.0)
    theta.add_(1.0)
    estimates.update({"a": [gradient]}, [theta])
    assert estimates.averages["smoothness/a"] == pytest.approx(4.0)


@given(cut=st.integers(0, 12))
def test_estimates_go_on_where_they_stood(cut):
    generator = draws(1)
    theta = [torch.randn(5, generator=generator) for _ in range(12)]
    gradients = [torch.randn(5, generator=generator) for _ in range(12)]

    def drive(estimates, steps):
        for step in steps:
            estimates.update({"ab"[step % 3 == 0]: [gradients[step]]}, [theta[step]])
        return estimates

    first = drive(PairEstimates(("a", "b"), 0.9), range(cut))
    plain, tensors = separate(first.state_dict())
    second = PairEstimates(("a", "b"), 0.9)
    second.load_state_dict(reunite(plain, tensors))
    drive(first, range(cut, 12))
    assert drive(second, range(cut, 12)).averages == first.averages


@given(old=st.floats(-9, 9), new=st.floats(-9, 9), smoothing=st.floats(0, 0.99))
def test_an_average_lies_between_what_it_averages(old, new, smoothing):
    assert smoothed(None, new, smoothing) == new
    found = smoothed(old, new, smoothing)
    assert min(old, new) - 1e-9 <= found <= max(old, new) + 1e-9


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, math.nan])
def test_smoothing_out_of_range_is_refused(smoothing):
    with pytest.raises(ValueError, match="smoothing"):
        PairEstimates(("a", "b"), smoothing)
