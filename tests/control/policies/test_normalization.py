import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.control.policies import Normalizer
from holdfast.control.policies.interface import observation_features


def draw(seed: int, rows: int = 50, size: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = 10.0 ** torch.arange(size)
    return spread * torch.randn(rows, size, generator=generator)


@settings(max_examples=30)
@given(st.integers(0, 2**31))
def test_the_extremes_of_the_data_become_minus_one_and_one(seed):
    values = draw(seed)
    scaled = Normalizer.fit(values).normalize(values)
    torch.testing.assert_close(scaled.amin(0), -torch.ones(4))
    torch.testing.assert_close(scaled.amax(0), torch.ones(4))


@settings(max_examples=30)
@given(st.integers(0, 2**31))
def test_denormalising_undoes_normalising_beyond_the_data_too(seed):
    values = draw(seed)
    normalizer = Normalizer.fit(values[:10])
    torch.testing.assert_close(
        normalizer.denormalize(normalizer.normalize(values)), values, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("constant", [0.0, 0.3, -7.0, 1e6, -1e20])
def test_a_constant_dimension_becomes_zero_and_a_small_deviation_stays_small(constant):
    normalizer = Normalizer.fit(torch.full((5, 1), constant), floor=0.1)
    scaled = normalizer.normalize(torch.tensor([[constant], [constant + 0.05]]))
    assert scaled.isfinite().all()
    assert abs(scaled[0].item()) < 0.1
    assert abs(scaled[1].item()) < 1.1
    returned = normalizer.denormalize(torch.tensor([[0.0]])).item()
    assert returned == pytest.approx(constant, rel=1e-5, abs=1e-6)


def test_the_floor_is_met_without_a_jump():
    """Ranges just below and above a floor of 1 have nearly the same scale, 1/2."""
    scales = [
        Normalizer.fit(torch.tensor([[0.0], [width]]), floor=1.0).scale.item()
        for width in (0.2, 0.999, 1.001, 2.0)
    ]
    assert scales == pytest.approx([0.5, 0.5, 0.5005, 1.0])


def test_worked_example():
    """From [1, 5] the value 2 is a quarter of the way from -1 to 1: -1/2."""
    normalizer = Normalizer.fit(torch.tensor([[1.0], [5.0]]))
    assert normalizer.normalize(torch.tensor([2.0])).item() == pytest.approx(-0.5)
    assert normalizer.denormalize(torch.tensor([-0.5])).item() == pytest.approx(2.0)
    assert normalizer.scale.item() == 2.0


def test_loading_a_state_restores_the_bounds():
    fitted, other = Normalizer.fit(draw(1)), Normalizer.identity(4)
    other.load_state_dict(fitted.state_dict())
    assert torch.equal(other.low, fitted.low) and torch.equal(other.high, fitted.high)
    assert not list(fitted.parameters())


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_with_their_dimension(broken):
    values = draw(2)
    values[7, 2] = broken
    values[9, 2] = broken
    with pytest.raises(ValueError, match="2 entries that are not finite in dimension 2"):
        Normalizer.fit(values)


def test_bad_arguments_name_themselves():
    with pytest.raises(ValueError, match=r"values has shape \(4,\)"):
        Normalizer.fit(torch.ones(4))
    with pytest.raises(ValueError, match=r"values has shape \(0, 4\)"):
        Normalizer.fit(torch.ones(0, 4))
    for floor in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="floor is"):
            Normalizer.fit(draw(3), floor=floor)
    with pytest.raises(ValueError, match="low below high"):
        Normalizer(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"low has shape \(2,\) and high \(3,\)"):
        Normalizer(torch.zeros(2), torch.ones(3))


@given(st.floats(-100, 100))
def test_observations_are_clipped_where_bounds_were_fitted_and_only_there(value):
    seen = torch.tensor([[[value]]])
    plain = observation_features(Normalizer.identity(1), seen)
    assert plain.item() == seen.item()
    fitted = Normalizer.fit(torch.tensor([[-2.0], [2.0]]))
    assert observation_features(fitted, seen).item() == pytest.approx(
        max(-5.0, min(5.0, value / 2)), rel=1e-5, abs=1e-6
    )


def test_bounds_that_are_loaded_written_or_converted_count_at_once():
    normalizer = Normalizer.identity(1)
    two = torch.tensor([2.0])
    assert normalizer.normalize(two) == 2.0 and normalizer.changes_nothing
    normalizer.load_state_dict(Normalizer(torch.tensor([0.0]), torch.tensor([4.0])).state_dict())
    assert normalizer.normalize(two) == 0.0 and not normalizer.changes_nothing
    with torch.no_grad():
        normalizer.low.fill_(-4.0)
    assert normalizer.normalize(two) == 0.5 and normalizer.scale == 4.0
    assert normalizer.double().normalize(two).dtype == torch.float64
    copied = copy.deepcopy(normalizer)
    copied.low.fill_(0.0)
    assert copied.normalize(two) == 0.0 and normalizer.normalize(two) == 0.5


def test_what_is_not_scaled_is_not_shared_with_who_acts_on_it():
    chunk = torch.zeros(1, 1, 1)
    Normalizer.identity(1).denormalize(chunk).fill_(1.0)
    assert chunk == 0.0
