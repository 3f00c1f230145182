"""Derived numbers, against values worked out by hand or by brute force."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.report.runs import (
    EMPTY,
    Run,
    Series,
    all_objectives,
    cumulative_updates,
    differences,
    flattened,
    ideal_distance,
    labels,
    relative_change,
    smoothed,
    smoothing_window,
    step_seconds,
    thinned_extremes,
    thinned_mean,
    turn_weights,
)

finite = st.floats(-1e6, 1e6)


def series(values: list[float], first: int = 1) -> Series:
    steps = np.arange(first, first + len(values))
    return Series(steps.astype(np.int64), np.array(values, np.float64))


def at(steps: list[int], values: list[float]) -> Series:
    return Series(np.array(steps, np.int64), np.array(values, np.float64))


def a_run(**fields: object) -> Run:
    """Six steps: sft at 1, 2, 4, 6 (refused weight 0 at 6), dpo at 3, 5."""
    defaults: dict[str, object] = {
        "path": Path("runs/first"),
        "facts": {"optima": {"sft": 1.5, "dpo": 0.3}},
        "objectives": ("sft", "dpo"),
        "turns": series([1] * 6),
        "weights": {"sft": at([1, 2, 4, 6], [1, 1, 1, 0]), "dpo": at([3, 5], [1, 1])},
        "held_out": {"sft": at([0, 6], [3.0, 1.8]), "dpo": at([0, 6], [0.7, 0.7])},
        "seconds": at([1, 2, 4, 5, 6], [1.0, 3.0, 4.0, 4.5, 9.0]),
    }
    return Run(**(defaults | fields))  # type: ignore[arg-type]


def test_gap_is_last_held_out_loss_less_optimum() -> None:
    run = a_run()
    assert run.gap("sft") == pytest.approx(0.3)
    assert run.gap("dpo") == pytest.approx(0.4)


def test_ideal_distance_is_the_norm_of_the_gaps() -> None:
    assert a_run().ideal_distance == pytest.approx(0.5)
    assert ideal_distance([1.0, -2.0, 2.0]) == pytest.approx(3.0)


def test_ideal_distance_is_unknown_while_one_gap_is() -> None:
    assert ideal_distance([]) is None
    assert ideal_distance([1.0, None]) is None
    assert a_run(facts={"optima": {"sft": 1.5}}).ideal_distance is None
    assert a_run(held_out={"sft": at([0], [3.0])}).ideal_distance is None


@given(st.lists(finite, min_size=1))
def test_ideal_distance_is_at_least_every_gap(gaps: list[float]) -> None:
    distance = ideal_distance(gaps)
    assert distance is not None
    assert distance >= max(abs(gap) for gap in gaps) * (1 - 1e-12)


def test_gap_after_divergence_is_unknown_rather_than_an_older_one() -> None:
    run = a_run(held_out={"sft": at([0, 6], [3.0, math.nan]), "dpo": at([0], [0.7])})
    assert run.gap("sft") is None


def test_updates_count_the_steps_with_a_weight() -> None:
    run = a_run()
    assert (run.updates("sft"), run.updates("dpo"), run.updates("absent")) == (3, 2, 0)
    assert run.update_share("sft") == pytest.approx(0.5)
    assert Run(Path("x")).update_share("sft") is None


def test_cumulative_updates_end_at_the_number_of_updates() -> None:
    run = a_run()
    assert cumulative_updates(run, "sft").values.tolist() == [1, 2, 2, 3, 3, 3]
    assert cumulative_updates(run, "dpo").values.tolist() == [0, 0, 1, 1, 2, 2]


def test_turn_weights_are_the_mean_weights_of_each_stretch() -> None:
    run = a_run()
    assert turn_weights(run, "sft", 6).tolist() == [1, 1, 0, 1, 0, 0]
    assert turn_weights(run, "sft", 3).tolist() == [1.0, 0.5, 0.0]
    assert turn_weights(run, "dpo", 2).tolist() == pytest.approx([1 / 3, 1 / 3])


def test_turn_weights_of_a_mix_are_its_weights() -> None:
    run = a_run(weights={"sft": series([0.3] * 6), "dpo": series([0.7] * 6)})
    assert turn_weights(run, "sft", 2).tolist() == pytest.approx([0.3, 0.3])
    assert turn_weights(run, "dpo", 2).tolist() == pytest.approx([0.7, 0.7])


def test_turn_weights_of_an_unrecorded_stretch_are_unknown() -> None:
    run = a_run(turns=at([1, 2, 6], [1, 1, 1]))
    assert np.isnan(turn_weights(run, "sft", 3)).tolist() == [False, True, False]


def test_seconds_per_step_is_training_time_over_steps() -> None:
    assert a_run().seconds_per_step == pytest.approx(1.5)
    assert Run(Path("x")).seconds_per_step is None


def test_step_seconds_leave_out_steps_after_a_hole() -> None:
    found = step_seconds(a_run())
    assert found.steps.tolist() == [2, 5, 6]
    assert found.values.tolist() == pytest.approx([2.0, 0.5, 4.5])


def test_wall_time_falls_back_to_training_time_while_the_run_goes_on() -> None:
    assert a_run(facts={"seconds": 30}).wall_seconds == 30
    assert a_run(facts={"seconds": None}).wall_seconds == 9.0
    assert a_run(facts={"seconds": 0}).wall_seconds == 9.0


def test_facts_of_a_wrong_type_count_as_unknown() -> None:
    run = a_run(facts={"optima": [1], "seconds": "x", "peak_memory_bytes": {}, "parameters": 3})
    assert run.optimum("sft") is None
    assert run.peak_memory is None
    assert run.parameters("total") is None
    assert run.name == "first"
    assert run.status == "unknown"


def test_relative_change() -> None:
    assert relative_change(1.5, 1.0) == pytest.approx(0.5)
    assert relative_change(1.0, 0.0) is None
    assert relative_change(None, 1.0) is None


def test_smoothed_is_the_centred_mean_with_short_ends() -> None:
    found = smoothed(series([1, 2, 6, 4, 2]), 3)
    assert found.values.tolist() == pytest.approx([1.5, 3.0, 4.0, 4.0, 3.0])
    assert found.steps.tolist() == [1, 2, 3, 4, 5]


def test_smoothed_leaves_out_what_is_not_a_number() -> None:
    found = smoothed(series([1, math.nan, 3, math.nan, math.nan, math.nan]), 3)
    assert found.values.tolist()[:4] == pytest.approx([1.0, 2.0, 3.0, 3.0])
    assert np.isnan(found.values[4:]).all()


def test_smoothed_recovers_after_a_huge_value() -> None:
    assert smoothed(series([1e20, 2.0, 2.0, 4.0, 3.0]), 3).values[2:].tolist() == pytest.approx(
        [8 / 3, 3.0, 3.5]
    )


@given(st.lists(finite, max_size=40), st.sampled_from([1, 3, 5, 9, 51]))
def test_smoothed_equals_brute_force(values: list[float], window: int) -> None:
    half = window // 2
    brute = [
        np.mean(values[max(0, middle - half) : middle + half + 1]) for middle in range(len(values))
    ]
    assert smoothed(series(values), window).values == pytest.approx(brute, abs=1e-6)


@pytest.mark.parametrize("window", [0, -1, 4])
def test_smoothed_rejects_a_window_without_a_centre(window: int) -> None:
    with pytest.raises(ValueError, match="window"):
        smoothed(series([1.0]), window)


@given(st.integers(0, 10**6))
def test_smoothing_window_is_odd(count: int) -> None:
    assert smoothing_window(count) % 2 == 1


def test_smoothing_window_is_a_twenty_fifth() -> None:
    assert [smoothing_window(n) for n in (0, 14, 15, 100, 1000)] == [1, 1, 5, 5, 41]


def test_thinned_mean_by_hand() -> None:
    found = thinned_mean(series([9, 1, 2, 3, 5, 8, 7]), points=4)
    # The ends stay; [1, 2, 3] and [5, 8] remain, cut after (7 - 2) / 2 = 2.5, so after 2.
    assert found.values.tolist() == pytest.approx([9, 1.5, 16 / 3, 7])
    assert found.steps.tolist() == [1, 2, 5, 7]


@given(st.lists(finite, min_size=1, max_size=300), st.integers(4, 60))
def test_thinning_keeps_ends_range_and_size(values: list[float], points: int) -> None:
    raw = series(values)
    for thinned in (thinned_mean(raw, points), thinned_extremes(raw, points)):
        assert len(thinned) <= max(points, 1)
        assert (np.diff(thinned.steps) > 0).all()
        assert (thinned.first, thinned.last) == (raw.first, raw.last)
        assert thinned.values.min() >= min(values) - 1e-6
        assert thinned.values.max() <= max(values) + 1e-6
    extremes = thinned_extremes(raw, points).values
    assert (extremes.min(), extremes.max()) == (min(values), max(values))


@given(st.integers(1, 60).map(lambda n: [math.nan] * n), st.integers(4, 20))
def test_thinning_survives_values_that_are_not_numbers(values: list[float], points: int) -> None:
    for thinned in (thinned_mean(series(values), points), thinned_extremes(series(values), points)):
        assert np.isnan(thinned.values).all()


def test_short_series_are_not_thinned() -> None:
    raw = series([3, 1, 2])
    assert thinned_mean(raw, 3) is raw
    assert thinned_extremes(raw, 3) is raw
    assert thinned_mean(EMPTY) is EMPTY


def test_objectives_of_several_runs_keep_their_order() -> None:
    runs = [Run(Path("a"), objectives=("x", "y")), Run(Path("b"), objectives=("z", "y"))]
    assert all_objectives(runs) == ("x", "y", "z")


def test_labels_prefer_names_then_folders_then_paths() -> None:
    def run(path: str, name: str) -> Run:
        return Run(Path(path), facts={"name": name})

    assert labels([run("s/a", "one"), run("s/b", "two")]) == ["one", "two"]
    assert labels([run("s/a", "one"), run("s/b", "one")]) == ["a", "b"]
    assert labels([run("s/a", "one"), run("t/a", "one")]) == ["s/a", "t/a"]
    assert labels([run("r/s/a", "one"), run("r/t/a", "one")]) == ["s/a", "t/a"]
    assert labels([run("s/a", "one"), run("s/a", "one")]) == ["one (1)", "one (2)"]


def test_differences_list_only_what_differs() -> None:
    first = flattened({"seed": 0, "schedule": {"kind": "alright", "weights": [0.5, 0.5]}})
    second = flattened(
        {"seed": 0, "schedule": {"kind": "mix", "weights": [0.5, 0.5]}, "extra": 1, "output": None}
    )
    assert first["schedule.weights.1"] == "0.5"
    assert differences([first, second]) == {
        "schedule.kind": ["alright", "mix"],
        "extra": [None, "1"],
    }
