"""A page about a policy that acts: axes, intervals, gains, pictures, and what is left out."""

import base64
import json

import numpy as np
import pytest

from holdfast.joint.intervals import wilson_interval
from holdfast.report import write_comparison, write_report
from holdfast.report.read import read_run
from holdfast.report.robots import over_environment_steps, robot_comparison, robot_sections

PIXEL = base64.b64decode("R0lGODlhAQABAIAAAP///wAAACH5BAEAAAAALAAAAAABAAEAAAICRAEAOw==")
"""A GIF of one pixel."""


@pytest.fixture
def robot(write_run):
    """Two updates for every collection of 100 steps; success rises by a tenth an evaluation."""

    def write(folder="run", *, gain=1, pictures=(), apart=False):
        records = []
        for step in range(11):
            if step:
                acted = {"environment_steps": 100.0 * ((step + 1) // 2), "approx_kl": 0.01}
                losses = {"rl": {"weight": 1.0, "loss": 0.1, "count": 8, "metrics": acted}}
                record = {"kind": "train", "step": step, "objectives": losses, "grad_norm": 1.0}
                if step % 3 == 0:
                    losses["il"] = {"weight": 1.0, "loss": 0.2, "count": 8, "metrics": {}}
                    norms = {"il": 0.5, "rl": 2.0}
                    record["geometry"] = {"norms": norms, "cosines": {"il/rl": -0.3}}
                record["estimates"] = {
                    "ratio": 2.0,
                    "cosine": -0.2,
                    "norm/il": 0.6,
                    "norm/rl": 1.9,
                    "benefit/observed": 0.01,
                    "efficiency/observed": 1.2,
                    "efficiency/promised": 0.7,
                }
                if apart:  # Networks that share no parameter.
                    record["estimates"] = {"ratio": 2.0}
                    if "geometry" in record:
                        norms = {"il": 0.0, "rl": 0.0}
                        record["geometry"] = {"norms": norms, "cosines": {"il/rl": "nan"}}
                records.append(record)
            if step % 2 == 0:
                score = min(gain * step / 20, 1.0)
                metrics = {"success": score, "reward": score, "reward_squared": score}
                losses = {
                    "il": {"loss": 0.3 - 0.01 * step, "count": 90, "metrics": {"mse": 0.2}},
                    "rl": {"loss": -score, "count": 20, "metrics": metrics},
                }
                records.append({"kind": "eval", "step": step, "objectives": losses})
        run = write_run(records, folder=folder, name=folder)
        if pictures:
            (run / "rollouts").mkdir()
            (run / "rollouts" / "0.gif").write_bytes(PIXEL)
            (run / "rollouts" / "rollouts.json").write_text(json.dumps(list(pictures)))
        return run

    return write


def slots(run):
    return {name: slot for slot, name in enumerate(run.objectives)}


def test_evaluations_stand_where_the_environment_was(robot):
    run = read_run(robot())
    series = over_environment_steps(run, run.held_out_metrics["success"]["rl"])
    assert series.steps.tolist() == [0, 100, 200, 300, 400, 500]
    np.testing.assert_allclose(series.values, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_of_evaluations_on_the_same_experience_the_latest_stands(write_run):
    acted = {"rl": {"loss": 1.0, "metrics": {"environment_steps": 64.0}}}
    records = [
        {"kind": kind, "step": step, "objectives": terms}
        for step in (1, 2)
        for kind, terms in (
            ("train", acted),
            ("eval", {"rl": {"loss": 0, "count": 4, "metrics": {"success": step / 4}}}),
        )
    ]
    run = read_run(write_run(records))
    series = over_environment_steps(run, run.held_out_metrics["success"]["rl"])
    assert series.steps.tolist() == [64] and series.values.tolist() == [0.5]


def test_the_shaded_interval_of_success_is_wilsons(robot, monkeypatch):
    bands = []
    monkeypatch.setattr(
        "holdfast.report.robots.plots.curves",
        lambda *arguments, bands=(), **options: bands_seen(bands),
    )

    def bands_seen(given):
        bands.extend(given)
        return ""

    run = read_run(robot())
    robot_sections(run, slots(run), "run")
    low, high = wilson_interval(0.3 * 20, 20)
    assert bands[0].low.values[3] == pytest.approx(low)
    assert bands[0].high.values[3] == pytest.approx(high)


def test_the_page_shows_acting_interleaving_and_rollouts(robot):
    pictures = [
        {"file": "0.gif", "caption": "seed 3: <success>", "drawn": ""},
        {"file": "../../secret.png", "caption": "not of this folder"},
        {"file": "0.txt", "caption": "no picture"},
    ]
    page = write_report([robot(pictures=pictures)]).read_text()
    titles = ["Acting", "Success", "Return", "Held-out loss of il", "Interleaving", "Rollouts"]
    titles += ["Cosine of the gradients", "Norms of the gradients", "Efficiency ratio"]
    for title in [*titles, "m: updates between two of imitation"]:
        assert title in page, title
    assert f"data:image/gif;base64,{base64.b64encode(PIXEL).decode()}" in page
    assert "seed 3: &lt;success&gt;" in page and "<success>" not in page
    assert "not of this folder" not in page and "no picture" not in page
    assert "reward_squared" not in page.split("Resolved recipe")[0]


def test_gradients_of_networks_that_share_nothing_are_not_drawn(robot):
    page = write_report([robot(apart=True)]).read_text()
    assert "m: updates between two of imitation" in page
    assert "Cosine of the gradients" not in page and "Norms of the gradients" not in page


def test_a_run_that_does_not_act_has_no_such_part(make_run):
    run = read_run(make_run())
    assert robot_sections(run, slots(run), "run") == ""
    assert robot_comparison([run, run], ["a", "b"]) == ""


def test_a_comparison_counts_the_steps_to_the_level_of_the_first_run(robot, tmp_path):
    slow, fast = robot("slow"), robot("fast", gain=5)
    page = write_comparison([slow, fast], tmp_path / "c.html").read_text()
    assert "Over environment steps" in page
    assert "reward_squared" not in page
    # The first run ends at a half, at 500 steps; the second is there at its second evaluation.
    rows = page.split("environment steps to the level")[1].split("</table>")[0]
    assert ">500<" in rows and ">100<" in rows and ">5.00<" in rows
    assert "not reached" in write_comparison([fast, slow], tmp_path / "d.html").read_text()
