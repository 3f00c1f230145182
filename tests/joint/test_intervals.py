"""Intervals against the values that the sums were taken of."""

import numpy as np
import pytest
from scipy import stats

from holdfast.joint.intervals import mean_interval, normal_quantile, wilson_interval


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (5, 5), (3, 10), (70, 100)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilsons_interval_is_scipys(successes, trials, confidence):
    expected = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, trials, confidence) == pytest.approx(expected)


def test_the_interval_of_a_mean_is_that_of_its_values():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=40)
    found = mean_interval(values.mean(), (values**2).mean(), 40)
    expected = stats.norm.interval(0.95, values.mean(), stats.sem(values))
    assert found == pytest.approx(expected)
    assert mean_interval(2.0, 4.0, 7) == (2.0, 2.0) == mean_interval(2.0, 4.0, 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson_interval(3, 2),
        lambda: wilson_interval(0, 0),
        lambda: wilson_interval(1, 2, 1.0),
        lambda: mean_interval(0.0, 1.0, 0),
        lambda: normal_quantile(0.0),
    ],
)
def test_values_out_of_range_are_refused(call):
    with pytest.raises(ValueError, match="successes|confidence|trials"):
        call()
