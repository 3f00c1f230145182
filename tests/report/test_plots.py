"""Figures: well-formed, the same every time, and in the colours of the page."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from holdfast.report import plots, text
from holdfast.report.plots import Line, Trail
from holdfast.report.runs import Event, Run, Series
from holdfast.report.svg import COLOURS


def series(count: int, seed: int = 0) -> Series:
    return Series(np.arange(1, count + 1), np.random.default_rng(seed).random(count) + 1.0)


def every_figure(name: str) -> list[str]:
    run = Run(
        Path("x"),
        objectives=("sft", "dpo"),
        turns=series(50),
        weights={"sft": series(50), "dpo": series(20)},
        events=(Event(7, "refused", ""),),
    )
    trail = Trail(np.array([3.0, 2.0]), np.array([0.7, 0.4]), None, (1.0, 0.3))
    return [
        plots.curves(name, "a", [*plots.training_lines(series(99), 0)], levels=[(1.0, 0)]),
        plots.trajectory(name, "b", [trail], "sft loss", "dpo loss"),
        plots.bars(name, "c", [("sft", 0.2, 0), ("dpo", -0.1, 1), ("x", None, None)], text.number),
        plots.turns(name, "d", run, ["sft", "dpo"]),
    ]


def lines_drawn(svg: str, slot: int) -> list[str]:
    return re.findall(rf'd="([^"]*)"[^>]*fill: none; stroke: var\(--series-{slot}\)', svg)


def test_figures_are_well_formed_and_carry_their_description() -> None:
    for svg, description in zip(every_figure("name"), "abcd", strict=True):
        root = ElementTree.fromstring(svg)
        assert root.get("aria-label") == description
        assert root.get("role") == "img"


def test_the_same_data_give_the_same_bytes() -> None:
    assert every_figure("name") == every_figure("name")


def test_every_colour_is_a_variable_of_the_page() -> None:
    style = (Path(plots.__file__).parent / "page.css").read_text()
    for svg in every_figure("name"):
        assert not re.findall(r"#[0-9a-f]{6}", svg)
        for variable in re.findall(r"var\((--[\w-]+)\)", svg):
            assert f"{variable}: light-dark(" in style
    for slot in range(COLOURS):
        assert f"--series-{slot}: light-dark(" in style
        assert f".s{slot} {{" in style


def test_ids_of_two_figures_never_meet() -> None:
    first, second = (
        {found for svg in every_figure(name) for found in re.findall(r' id="([^"]*)"', svg)}
        for name in ("one", "two")
    )
    assert first
    assert not first & second


def test_every_reference_has_its_target() -> None:
    for svg in every_figure("name"):
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
        assert used
        assert used <= set(re.findall(r' id="([^"]*)"', svg))


def test_labels_are_plain_text_whatever_they_hold() -> None:
    label = '<b>&"$\\alpha$ --> \ud800 損失'
    svg = plots.curves("name", label, [Line(series(3), 0)], y_label=label)
    root = ElementTree.fromstring(svg.encode("utf-8", "replace"))
    texts = ["".join(element.itertext()) for element in root.iter("{*}text")] + [
        "".join(element.itertext()) for element in root.iter("text")
    ]
    assert '<b>&"$\\alpha$ --> ? 損失' in texts


def test_a_spike_does_not_flatten_the_rest() -> None:
    steps = np.arange(30)
    spiked = Series(steps, np.where(steps == 9, 1e6, 1.0 + steps / 100))
    (path,) = lines_drawn(plots.curves("name", "", [Line(spiked, 0)]), 0)
    heights = sorted(float(y) for y in re.findall(r"[ML] \S+ (\S+)", path))
    # On a linear axis of some 200 pixels the other points would span less than a thousandth.
    assert heights[-1] - heights[1] > 2


def test_curves_without_points_and_single_points_are_drawn() -> None:
    empty = Series(np.empty(0, np.int64), np.empty(0))
    one = Series(np.array([5]), np.array([1.0]))
    unknown = Series(np.array([1, 2]), np.array([np.nan, np.nan]))
    svg = plots.curves("name", "", [Line(empty, 0), Line(one, 1), Line(unknown, 2)])
    assert "<use" in svg[svg.index("var(--series-1)") - 400 :]
    ElementTree.fromstring(svg)


def test_a_long_curve_stays_small() -> None:
    lines = plots.training_lines(series(100_000), 0)
    assert all(len(line.series) <= 800 for line in lines)
    assert len(plots.curves("name", "", lines)) < 60_000


def test_turns_of_a_long_run_stay_small_and_name_every_objective() -> None:
    weights = {"sft": series(60_000), "dpo": series(60_000, seed=1)}
    run = Run(Path("x"), turns=series(60_000), weights=weights)
    svg = plots.turns("name", "", run, ["sft", "dpo"])
    assert len(svg) < 60_000
    assert ">sft<" in svg and ">dpo<" in svg


def test_turns_show_each_step_of_a_short_run() -> None:
    steps = np.array([1, 2, 5])
    run = Run(Path("x"), turns=series(5), weights={"sft": Series(steps, np.ones(3))})
    svg = plots.turns("name", "", run, ["sft"])
    boxes = re.findall(r"M (\S+) \S+\s+L (\S+) ", svg[svg.index("var(--series-0)") - 400 :])
    widths = sorted(float(right) - float(left) for left, right in boxes[:2])
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.01)


def test_turns_are_as_strong_as_the_weights() -> None:
    weights = {"sft": Series(np.arange(1, 6), np.full(5, 0.3))}
    svg = plots.turns("name", "", Run(Path("x"), turns=series(5), weights=weights), ["sft"])
    assert re.findall(r"var\(--series-0\); opacity: ([\d.]+)", svg) == ["0.3"]


def test_trail_takes_the_evaluations_that_both_objectives_share() -> None:
    def curve(steps: list[int], values: list[float]) -> Series:
        return Series(np.array(steps), np.array(values))

    run = Run(
        Path("x"),
        facts={"optima": {"a": 1.0, "b": 2.0}},
        held_out={"a": curve([0, 5, 10], [9, 8, 7]), "b": curve([0, 10, 20], [6, np.nan, 4])},
    )
    trail = plots.trail(run, "a", "b", 0)
    assert trail is not None
    assert (trail.x.tolist(), trail.y.tolist(), trail.ideal) == ([9], [6], (1.0, 2.0))
    assert plots.trail(run, "a", "absent", 0) is None


def test_a_close_up_is_drawn_only_where_the_end_is_squeezed() -> None:
    x = np.array([9.0, 2.0, 1.5, 1.4])
    steep = Trail(x, np.array([8.0, 6.0, 4.0, 2.0]), 0, (1.0, 0.5))
    late = plots.close_up([steep])
    assert late is not None
    assert late[0].x.tolist() == [1.5, 1.4]
    even = Trail(np.array([8.0, 6.0, 4.0, 2.0]), np.array([8.0, 6.0, 4.0, 2.0]), 0)
    assert plots.close_up([even]) is None
    assert plots.close_up([Trail(x[:1], x[:1], 0)]) is None


def test_drawing_leaves_the_settings_of_matplotlib_alone() -> None:
    before = dict(matplotlib.rcParams)
    every_figure("name")
    assert dict(matplotlib.rcParams) == before
