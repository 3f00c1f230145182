import numpy as np
import pytest

from holdfast.bellman.estimators.choice_model import ChoiceModel
from holdfast.bellman.estimators.nfxp import nested_fixed_point
from holdfast.bellman.estimators.replaced import parameter_shift

RNG = np.random.default_rng(0)
MODEL = ChoiceModel(RNG.normal(size=(3, 2, 2)), RNG.dirichlet(np.ones(3), size=(3, 2)), 0.8)
COUNTS = np.array([[6.0, 3.0], [2.0, 7.0], [5.0, 0.0]])


def test_a_shift_is_that_of_every_row_replaced_by_hand():
    """Row by row, with the replacements that the seed draws, each estimated from zeros."""
    draws = 3
    found = parameter_shift(MODEL, COUNTS, draws=draws, seed=2)
    rows = [kind for kind in np.ndindex(3, 2) for _ in range(int(COUNTS[kind]))]
    rng = np.random.default_rng(2)
    others = rng.choice(6, size=draws, p=(COUNTS / COUNTS.sum()).ravel())
    base = nested_fixed_point(MODEL, COUNTS)
    changes = []
    for i in range(len(rows)):
        for other in others:
            counts = np.zeros((3, 2))
            for row in [*rows[:i], *rows[i + 1 :], divmod(int(other), 2)]:
                counts[row] += 1
            changes.append(nested_fixed_point(MODEL, counts).parameters - base.parameters)
    changes = np.array(changes)
    np.testing.assert_allclose(found.shift, np.abs(changes).mean(0), atol=1e-7)
    ends = np.quantile(changes, [0.025, 0.975], axis=0, method="inverted_cdf")
    np.testing.assert_allclose(found.interval, ends, atol=1e-7)
    scaled = np.abs(changes / base.standard_errors).max(1).reshape(len(rows), draws).mean(1)
    for kind in set(rows):
        assert found.influence[kind] == pytest.approx(scaled[rows.index(kind)], abs=1e-7)
    assert np.isnan(found.influence[2, 1])
    ranked = found.influence[tuple(found.ranking().T)]
    assert len(ranked) == 5 and (np.diff(ranked) <= 0).all()


def test_a_choice_without_which_nothing_is_determined_has_infinite_influence():
    """One parameter, one state: a single choice of the other action bounds it."""
    model = ChoiceModel(np.array([[[0.0], [1.0]]]), np.ones((1, 2, 1)), 0.5)
    found = parameter_shift(model, [[1.0, 9.0]], draws=4, seed=0)
    assert found.influence[0, 0] == np.inf and np.isfinite(found.influence[0, 1])
    assert np.isfinite(found.shift).all()


def test_no_draws_are_refused():
    with pytest.raises(ValueError, match="draws is 0"):
        parameter_shift(MODEL, COUNTS, draws=0)
