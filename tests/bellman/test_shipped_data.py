"""The logged decisions that ship with recipes are draws of the models that their script names."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast.bellman.files import read_transitions

DATA = Path(holdfast.__file__).parent / "recipes" / "data"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("bellman_data", DATA / "generate_bellman.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_drawn_from(counts: np.ndarray, chances: np.ndarray) -> None:
    """Frequencies ``(rows, k)`` within five standard errors of chances."""
    total = counts.sum(1, keepdims=True)
    error = np.sqrt(chances * (1 - chances) / total.clip(min=1))
    assert (np.abs(counts / total.clip(min=1) - chances) <= 5 * error + 1e-12)[
        total[:, 0] > 0
    ].all()


def moves(found, states: int, actions: int) -> np.ndarray:
    counts = np.zeros((states, actions, states))
    np.add.at(counts, (found.state, found.action, found.next_state), 1)
    return counts.reshape(-1, states)


def test_the_grid(script):
    model = script.grid()
    found = read_transitions(DATA / "bellman_offline.csv", actions=4, states=16)
    assert_drawn_from(moves(found, 16, 4), model.kernel.toarray())
    np.testing.assert_allclose(found.reward, model.rewards[found.state, found.action], rtol=1e-3)
    assert (found.terminal == (found.next_state == 15)).all()
    assert found.counts(16, 4)[:15].min() >= 20


def test_the_buses_are_driven_by_the_soft_optimal_agent(script):
    model = script.buses()
    columns = {"trajectory": "bus", "time": "month", "state": "mileage", "action": "replace"}
    path = DATA / "bellman_bus.csv"
    found = read_transitions(path, actions=2, states=6, rewards=False, columns=columns)
    assert_drawn_from(found.counts(6, 2), model.soft_policy_iteration().policy)
    assert_drawn_from(moves(found, 6, 2), np.asarray(model.transitions).reshape(-1, 6))
    assert found.counts(6, 2).min() >= 20


def test_the_cart_mostly_stays_up_and_falls_sometimes():
    found = read_transitions(DATA / "bellman_cartpole.npz", actions=2, rewards=False)
    assert found.state.shape[1] == 4 and len(found) > 3900
    lengths = np.bincount(found.trajectory)
    assert np.median(lengths) > 90 and 10 <= found.terminal.sum() <= 40
    assert (np.abs(found.state[:, [0, 2]]) <= [2.4, 0.2095]).all()
    assert 0.4 < found.action.mean() < 0.6
