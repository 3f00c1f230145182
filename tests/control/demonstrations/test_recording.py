"""Recording: what is stored is what happened, whatever the number of environments."""

import sys

import numpy as np
import pytest

from holdfast.control.demonstrations import load_controller, record
from holdfast.control.environments import EnvironmentOptions, make_environments, scripted_expert
from holdfast.control.environments.point_mass import NAME
from holdfast.errors import DataError, RecipeError


def make(count=3, **options):
    return make_environments(NAME, count, options=EnvironmentOptions(**options))


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert (a.seed, a.success, a.terminated) == (b.seed, b.success, b.terminated)
        np.testing.assert_array_equal(a.observations, b.observations)
        np.testing.assert_array_equal(a.actions, b.actions)
        np.testing.assert_array_equal(a.rewards, b.rewards)


def test_an_episode_repeats_itself_from_its_seed_and_actions():
    recorded = record(scripted_expert(NAME), make(), 4, noise=0.3, keep_failures=True)
    environments = make(1)
    for episode in recorded:
        seen = [environments.reset([episode.seed])[0, -1]]
        rewards = []
        for action in episode.actions:
            step = environments.step(action[None, None])
            seen.append(step.final_observations[0, -1])
            rewards.append(step.rewards[0])
        np.testing.assert_array_equal(seen, episode.observations)
        np.testing.assert_array_equal(rewards, episode.rewards)
        assert step.ended[0] and step.success[0] == episode.success


def test_recordings_do_not_depend_on_the_number_of_environments():
    one, other = (
        record(scripted_expert(NAME), make(count), 5, seed=3, noise=0.5) for count in (1, 4)
    )
    same(one, other)
    assert one.details == other.details


def test_only_successes_are_kept_and_attempts_are_counted():
    recorded = record(scripted_expert(NAME), make(8), 6, noise=0.9)
    assert all(episode.success for episode in recorded)
    assert recorded.details["attempts"] > 6
    everything = record(scripted_expert(NAME), make(8), 6, noise=0.9, keep_failures=True)
    assert everything.details["attempts"] == 6
    assert not all(episode.success for episode in everything)


def test_the_intended_action_is_stored_if_asked_for():
    expert = scripted_expert(NAME)
    recorded = record(expert, make(), 2, noise=0.2, intended=True, keep_failures=True)
    for episode in recorded:
        meant = expert(episode.observations[:-1, None])[:, 0]
        np.testing.assert_allclose(episode.actions, np.clip(meant, -1, 1), atol=1e-6)
    executed = record(expert, make(), 2, noise=0.2, keep_failures=True)
    assert np.abs(executed.episodes[0].actions - recorded.episodes[0].actions).mean() > 0.05


def test_chunks_are_executed_to_their_end_or_that_of_the_episode():
    """A policy that answers with its own observation shows when it was asked."""
    asked = record(
        lambda seen: np.repeat(np.clip(seen[:, -1:, :2], -1, 1), 4, axis=1),
        make(2, time_limit=10),
        3,
        keep_failures=True,
    )
    for episode in asked:
        for step, action in enumerate(episode.actions):
            np.testing.assert_array_equal(action, episode.observations[step // 4 * 4, :2])


def test_actions_are_clipped_before_they_are_stored_and_it_is_noted():
    recorded = record(
        lambda seen: np.full((len(seen), 2, 2), 3.0, dtype=np.float32),
        make(2, time_limit=5),
        2,
        keep_failures=True,
    )
    assert recorded.actions.max() == 1.0 and recorded.details["clipped"] == 1.0


@pytest.mark.parametrize("shape", [(3, 2), (3, 1, 5), (1, 1, 2), (3, 0, 2), ()])
def test_actions_of_another_shape_are_refused(shape):
    """An answer (environments, size) would pass for a chunk of single numbers."""
    with pytest.raises(DataError, match="actions have shape"):
        record(lambda seen: np.zeros(shape), make(), 3, keep_failures=True)


def test_an_answer_that_is_not_of_numbers_is_refused():
    with pytest.raises(DataError, match="the controller's actions"):
        record(lambda seen: [["left"]], make(), 3, keep_failures=True)


def test_too_few_successes_are_an_error_that_says_how_many():
    def still(observations):
        return np.zeros((len(observations), 1, 2), dtype=np.float32)

    with pytest.raises(DataError, match="0 of 4 attempts succeeded, 2 were asked for"):
        record(still, make(time_limit=3), 2, attempts=4)


def test_a_task_without_success_asks_to_keep_failures():
    pytest.importorskip("mujoco")

    def still(observations):
        return np.zeros((len(observations), 1, 3), dtype=np.float32)

    environments = make_environments("Hopper-v5", 2)
    with pytest.raises(DataError, match="does not say what success is"):
        record(still, environments, 2)
    kept = record(still, environments, 2, keep_failures=True)
    assert [episode.success for episode in kept] == [None, None]


@pytest.mark.parametrize(
    "options",
    [
        {"episodes": 0},
        {"episodes": 1, "attempts": 0},
        {"episodes": 1, "noise": -1.0},
        {"episodes": 1, "noise": float("inf")},
    ],
)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="at least 1|negative"):
        record(scripted_expert(NAME), make(), **options)


def test_a_controller_is_found_in_a_file_or_a_module(tmp_path, monkeypatch):
    (tmp_path / "mine_to_record.py").write_text("def act(seen):\n    return seen[:, -1:, :2]\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_to_record", raising=False)
    seen = np.ones((2, 1, 6), dtype=np.float32)
    for path in (f"{tmp_path}/mine_to_record.py:act", "mine_to_record.act"):
        assert load_controller(path)(seen).shape == (2, 1, 2)


def test_a_controller_that_raises_is_named_with_the_line(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("def act(seen):\n    return 1 / 0\n")
    with pytest.raises(RecipeError, match=r"bad.py:act' raised ZeroDivisionError: .*line 2\)"):
        load_controller(f"{file}:act")(np.ones((2, 1, 6), dtype=np.float32))
    file.write_text("answer = missing\n")
    with pytest.raises(RecipeError, match=r"cannot be loaded: NameError: .*line 1\)"):
        load_controller(f"{file}:act")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.py:act", "there is no file"),
        ("no_such_module.act", "cannot be loaded"),
        ("json.nothing", "no function 'nothing'"),
        ("act", "name it as file.py:name"),
    ],
)
def test_a_controller_that_is_not_there_is_refused(path, message):
    with pytest.raises(RecipeError, match=message):
        load_controller(path)
