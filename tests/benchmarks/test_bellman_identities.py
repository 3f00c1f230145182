"""The identities hold on one seed, and a broken one is seen."""

import numpy as np
import pytest

from benchmarks.bellman_identities import checks
from benchmarks.bellman_identities.run import CHECKS, TOLERANCE, summarise


@pytest.mark.parametrize("name", CHECKS)
def test_identities_hold(name):
    assert CHECKS[name](3, 0.9) < TOLERANCE


def test_data_show_exactly_the_probabilities_of_the_model():
    model, data = checks.problem(0, 0.9)
    counts = np.zeros(model.transitions.shape)
    np.add.at(counts, (data.state, data.action, data.next_state), 1)
    np.testing.assert_array_equal(counts[:-1] / 12, model.transitions[:-1])
    assert not counts[-1].any() and data.terminal.any()


def test_a_biased_objective_is_seen(monkeypatch):
    def biased(q, zeta, data, *, discount):
        return checks.td_error(q, data, discount=discount)

    monkeypatch.setattr(checks, "bellman_saddle", biased)
    assert checks.unbiased(0, 0.9) > 1e-3
    assert checks.biconjugate(0, 0.9) > 1e-3


def test_a_wrong_formula_has_other_gradients(monkeypatch):
    honest = checks.written_out
    monkeypatch.setattr(checks, "written_out", lambda *a: honest(*a[:-1], 0.9 * a[-1]))
    assert checks.gradients("saddle", 0, 0.9) > 1e-3


def test_one_deviation_above_the_tolerance_decides():
    assert summarise({"a": {"0": 1e-12}, "b": {"0": 0.0}})["verdict"] == "holds"
    assert summarise({"a": {"0": 1e-12}, "b": {"0": 1e-8}})["verdict"] == "does not hold"
