"""Finished cells are kept, and only as long as they are valid."""

import json

import numpy as np
import pytest

from benchmarks.results import Results, bootstrap_interval


def open_results(tmp_path, fresh=False, **settings):
    return Results(tmp_path / "results.json", settings, {"command": "run"}, fresh)


def test_finished_cell_is_not_computed_again(tmp_path):
    open_results(tmp_path, steps=3).cell("a", lambda: {"gap": [1.5]})
    again = open_results(tmp_path, steps=3)
    assert again.cell("a", lambda: pytest.fail("computed twice")) == {"gap": [1.5]}


@pytest.mark.parametrize("change", [{"steps": 4}, {"steps": 3, "fresh": True}])
def test_cell_is_computed_again_for_other_settings_or_when_fresh(tmp_path, change):
    open_results(tmp_path, steps=3).cell("a", lambda: 1)
    assert open_results(tmp_path, **change).cell("a", lambda: 2) == 2


def test_file_is_json_with_one_line_a_cell_and_names_no_path(tmp_path):
    results = open_results(tmp_path, steps=3)
    results.cell("first", lambda: [1, 2])
    results.cell("β", lambda: {"x": [3]})
    results.finish({"mean": 2.0})
    text = results.path.read_text(encoding="utf-8")
    content = json.loads(text)
    assert content["cells"] == {"first": [1, 2], "β": {"x": [3]}}
    assert content["summary"] == {"mean": 2.0}
    assert '\n  "β": {"x": [3]}\n' in text
    assert str(tmp_path) not in text


def test_interval_of_a_mean_is_that_of_the_normal_law():
    samples = np.random.default_rng(1).normal(2.0, 3.0, size=400)
    low, high = bootstrap_interval(samples, np.mean)
    half = 1.96 * samples.std() / 20
    assert low == pytest.approx(samples.mean() - half, abs=0.05)
    assert high == pytest.approx(samples.mean() + half, abs=0.05)
