"""Pictures: replays that are the recording, and paths where nothing can be rendered."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from holdfast.control import watching
from holdfast.control.demonstrations import record
from holdfast.control.environments import evaluate, make_environments, scripted_expert
from holdfast.control.environments.point_mass import NAME, draw_point_mass
from holdfast.errors import DataError


@pytest.fixture(scope="module")
def recorded():
    return record(scripted_expert(NAME), make_environments(NAME, 2), 2)


def test_a_replay_shows_the_recorded_states(recorded):
    episode = recorded.episodes[1]
    shown = watching.replay(recorded, 1, pictures=5)
    assert not shown.drawn and "episode 1: success, return 1" in shown.caption
    every = len(episode) // 4
    expected = [draw_point_mass(seen) for seen in episode.observations[:-1:every]]
    np.testing.assert_array_equal(shown.frames[:-1], expected)
    np.testing.assert_array_equal(shown.frames[-1], draw_point_mass(episode.observations[-1]))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"environment": None}, "environment is not known"),
        ({"environment": "NoSuchTask-v0"}, "NoSuchTask-v0"),
        ({"details": {"actions": "intended"}}, "executed actions were not kept"),
    ],
)
def test_what_cannot_be_run_again_is_drawn_as_a_path(recorded, change, why):
    shown = watching.replay(replace(recorded, **change), 0)
    assert why in shown.drawn
    assert len(shown.frames) == 1 and len(np.unique(shown.frames[0].reshape(-1, 3), axis=0)) > 3


def test_a_renderer_that_fails_leaves_a_path(recorded, monkeypatch):
    def fail(self):
        raise AttributeError("no driver")

    monkeypatch.setattr("holdfast.control.environments.batched.BatchedEnvironment.render", fail)
    assert "no driver" in watching.replay(recorded, 0).drawn
    shown = watching.film(scripted_expert(NAME), NAME)
    assert "no driver" in shown[0].drawn and len(shown[0].frames) == 1


def test_a_long_film_has_no_more_pictures_than_asked_for():
    act = scripted_expert(NAME)
    (every,) = watching.film(act, NAME, every=1, most=1000)
    (few,) = watching.film(act, NAME, every=1, most=8)
    assert len(every.frames) > 32 and 4 < len(few.frames) <= 9
    stride = 2 ** int(np.ceil(np.log2((len(every.frames) - 1) / 8)))
    np.testing.assert_array_equal(few.frames[:-1], every.frames[:-1:stride])
    np.testing.assert_array_equal(few.frames[-1], every.frames[-1])


def test_films_are_listed_with_what_they_show(tmp_path):
    frames = [np.full((20, 20, 3), shade, dtype=np.uint8) for shade in (0, 90, 250)]
    films = [watching.Film(frames, "moving"), watching.Film(frames[:1], "still", "no driver")]
    watching.save_films(films, tmp_path / "rollouts")
    listed = json.loads((tmp_path / "rollouts" / "rollouts.json").read_text())
    assert [film["caption"] for film in listed] == ["moving", "still"]
    assert [film["drawn"] for film in listed] == ["", "no driver"]
    with Image.open(tmp_path / "rollouts" / listed[0]["file"]) as moving:
        assert moving.format == "GIF" and moving.n_frames == 3
    with Image.open(tmp_path / "rollouts" / listed[1]["file"]) as still:
        assert still.format == "PNG" and still.size == (20, 20)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        watching.save_films(films, tmp_path / "file")


def test_a_film_shows_the_episodes_of_an_evaluation():
    films = watching.film(scripted_expert(NAME), NAME, 2, seed=4, every=10)
    found = evaluate(scripted_expert(NAME), make_environments(NAME, 2), 2, seed=4)
    for shown, seed, length in zip(films, found.seeds, found.lengths, strict=True):
        assert shown.caption == f"seed {seed}: success, return 1, {length} steps"
        assert len(shown.frames) == -(-length // 10) + 1


def test_a_strip_takes_the_first_and_the_last():
    frames = [np.full((10, 20, 3), value, dtype=np.uint8) for value in range(0, 250, 10)]
    sheet = np.asarray(watching.strip(frames, columns=3))
    assert sheet.shape == (10, 3 * 20 + 2 * 4, 3)
    assert sheet[0, [0, 24, 48], 0].tolist() == [0, 120, 240]
    assert watching.strip(frames[:1]).size == (20, 10)


def test_a_contact_sheet_has_a_row_for_every_film(recorded):
    films = [watching.replay(recorded, number) for number in range(2)]
    one, two = (watching.contact_sheet(films[:count]) for count in (1, 2))
    assert two.height == 2 * one.height and two.width >= 128


def test_a_gif_holds_the_frames(recorded, tmp_path):
    frames = watching.replay(recorded, 0, pictures=6).frames
    watching.save_gif(frames, tmp_path / "a.gif", seconds=0.2)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == len(frames) and image.info["duration"] == 200


def test_large_frames_are_made_small(tmp_path):
    large = np.zeros((400, 800, 3), dtype=np.uint8)
    assert watching.strip([large]).size == (160, 80)


@pytest.mark.parametrize("entries", [1, 2, 5])
def test_a_path_is_drawn_of_any_observations(entries):
    path = np.random.default_rng(0).normal(size=(9, entries))
    picture = watching.draw_path(path)
    assert picture.shape == (160, 160, 3)
    colours = {tuple(row) for row in picture.reshape(-1, 3)}
    assert {(0x59, 0xA1, 0x4F), (0xE1, 0x57, 0x59), (0x4E, 0x79, 0xA7)} <= colours


def test_a_path_of_one_point_is_drawn():
    assert watching.draw_path(np.zeros((1, 3))).shape == (160, 160, 3)


def test_a_picture_of_an_unknown_form_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be written"):
        watching.save_picture(Image.new("RGB", (2, 2)), tmp_path / "a.xyz")
