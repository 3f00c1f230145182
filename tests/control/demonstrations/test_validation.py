"""Validation names file, episode, step and field of what cannot be learnt from."""

from dataclasses import replace

import numpy as np
import pytest

from holdfast.control.demonstrations import Demonstrations, record, validate
from holdfast.control.environments import make_environments, scripted_expert
from holdfast.control.environments.point_mass import NAME
from holdfast.errors import DataError


@pytest.fixture(scope="module")
def environments():
    return make_environments(NAME, 2)


@pytest.fixture(scope="module")
def recorded(environments):
    return replace(record(scripted_expert(NAME), environments, 3), source="some.npz")


def changed(recorded, field, step, entry, value):
    """With one number of episode 1 replaced."""
    episodes = list(recorded.episodes)
    values = getattr(episodes[1], field).copy()
    values[step] = (
        value
        if entry is None
        else np.where(np.arange(values.shape[1]) == entry, value, values[step])
    )
    episodes[1] = replace(episodes[1], **{field: values})
    return replace(recorded, episodes=tuple(episodes))


def test_what_was_recorded_is_valid_and_left_as_it_is(recorded, environments):
    for given in (None, environments):
        found = validate(recorded, given)
        for one, other in zip(found, recorded, strict=True):
            np.testing.assert_array_equal(one.actions, other.actions)


@pytest.mark.parametrize(
    ("field", "step", "entry", "value", "message"),
    [
        ("observations", 4, 2, np.nan, "episode 1, step 4, field observations: entry 2 is nan"),
        ("actions", 0, 1, np.inf, "episode 1, step 0, field actions: entry 1 is inf"),
        ("rewards", 7, None, -np.inf, "episode 1, step 7, field rewards: is -inf"),
        ("actions", 5, 0, -1.5, r"episode 1, step 5, field actions: entry 0 is -1.5, beyond \[-1"),
    ],
)
def test_a_bad_number_is_found(recorded, environments, field, step, entry, value, message):
    with pytest.raises(DataError, match=f"some.npz: {message}"):
        validate(changed(recorded, field, step, entry, value), environments)


def test_actions_are_clipped_if_asked_for(recorded, environments):
    found = validate(changed(recorded, "actions", 5, 0, -1.5), environments, clip=True)
    assert found.episodes[1].actions[5, 0] == -1.0
    np.testing.assert_array_equal(found.episodes[0].actions, recorded.episodes[0].actions)


def test_rounding_is_no_fault(recorded, environments):
    found = validate(changed(recorded, "actions", 5, 0, 1.0 + 1e-6), environments)
    assert found.episodes[1].actions[5, 0] == 1.0


@pytest.mark.parametrize("field", ["observations", "actions"])
def test_shapes_are_those_of_the_environment(recorded, environments, field):
    episodes = list(recorded.episodes)
    values = getattr(episodes[2], field)
    episodes[2] = replace(episodes[2], **{field: np.concatenate([values, values[:, :1]], axis=1)})
    bad = replace(recorded, episodes=tuple(episodes))
    with pytest.raises(DataError, match=f"episode 2, field {field}: they have .*{NAME} have"):
        validate(bad, environments)
    with pytest.raises(DataError, match=f"episode 2, field {field}: they have .*episode 0 have"):
        validate(bad)


def test_an_episode_cut_short_is_refused_unless_it_is_allowed(recorded):
    episodes = (recorded.episodes[0], replace(recorded.episodes[1], terminated=False))
    cut = replace(recorded, episodes=episodes)
    with pytest.raises(DataError, match="episode 1, step .*cut short"):
        validate(cut)
    assert validate(cut, allow_cut=True) is cut


def test_no_episodes_are_refused():
    with pytest.raises(DataError, match="some.npz: there are no episodes"):
        validate(Demonstrations((), "some.npz"))
