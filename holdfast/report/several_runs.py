"""The part of a page that lays several runs over one another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from html import escape

import yaml

from holdfast.report import parts, plots, text
from holdfast.report.plots import Line
from holdfast.report.robots import METRICS as ACTING
from holdfast.report.robots import about_robots, robot_comparison
from holdfast.report.runs import (
    EMPTY,
    Run,
    Series,
    all_objectives,
    cumulative_updates,
    differences,
    flattened,
    labels,
    relative_change,
    thinned_mean,
)

Form = Callable[[float | None], str]


def comparison_sections(runs: Sequence[Run]) -> str:
    """Tables and figures in which every run is one row or one curve."""
    names, objectives = labels(runs), all_objectives(runs)
    legend = parts.keys({name: slot for slot, name in enumerate(names)})
    sections = [
        f"<h1>{len(runs)} runs compared</h1>",
        f'<p class="lead">{legend}</p>',
        _comparison_table(runs, names, objectives),
        _recipe_differences(runs, names),
    ]
    trails = list(_trails(runs, objectives))
    note = f'<p class="note">{parts.SPACE}</p>' if trails else ""
    ends = [*trails, *_measures(runs, names, objectives)]
    if ends:
        sections.append(f"<h2>Where the runs ended</h2>{note}{parts.grid(ends)}")
    sections.append(robot_comparison(runs, names))
    overlays = [*_overlays(runs, names, objectives)]
    if overlays:
        sections.append(f"<h2>Over steps</h2><p>{legend}</p>{parts.grid(overlays)}")
    return "".join(sections)


def _comparison_table(runs: Sequence[Run], names: Sequence[str], objectives: Sequence[str]) -> str:
    distances = [run.ideal_distance for run in runs]
    known = [distance for distance in distances if distance is not None]
    best = min(known) if len(known) > 1 else None
    head = ["run", "ideal distance", *(f"{escape(name)} (gap)" for name in objectives)]
    head += ["steps", "a step", "wall time", "peak memory"]
    rows = []
    for slot, (name, run) in enumerate(zip(names, runs, strict=True)):
        distance = text.number(run.ideal_distance)
        if best is not None and run.ideal_distance == best:
            distance = f'<span class="best">{distance}</span>'
        status = "" if run.status == "finished" else f"<small>{escape(run.status)}</small>"
        row = [parts.symbol(slot) + escape(name) + status, distance]
        for objective in objectives:
            loss = text.number(run.held_out.get(objective, EMPTY).last)
            row.append(f"{loss} <small>({text.number(run.gap(objective))})</small>")
        row.append(text.count(run.steps))
        measures: list[tuple[Form, float | None, float | None]] = [
            (text.duration, run.seconds_per_step, runs[0].seconds_per_step),
            (text.duration, run.wall_seconds, runs[0].wall_seconds),
            (text.size, run.peak_memory, runs[0].peak_memory),
        ]
        for form, value, base in measures:
            change = text.percent(relative_change(value, base), signed=True) if slot else ""
            row.append(f"{form(value)} <small>{change}</small>")
        rows.append(row)
    note = (
        "Held-out losses and gaps at the last evaluation. "
        "Percentages are relative to the first run."
    )
    return parts.table(head, rows, kind="runs") + f'<p class="note">{note}</p>'


def _recipe_differences(runs: Sequence[Run], names: Sequence[str]) -> str:
    try:
        settings = [flattened(yaml.safe_load(run.recipe)) for run in runs]
    except (yaml.YAMLError, ValueError, RecursionError):
        return ""  # A recipe edited by hand into something unreadable is still shown as text.
    found = differences(settings)
    if not found:
        return ""
    rows = [
        [f"<code>{escape(setting)}</code>"]
        + [text.MISSING if value is None else escape(value) for value in values]
        for setting, values in found.items()
    ]
    return "<h2>What differs in the recipes</h2>" + parts.table(
        ["setting", *map(escape, names)], rows, kind="settings"
    )


def _trails(runs: Sequence[Run], objectives: Sequence[str]) -> Iterator[str]:
    """All runs in the plane of each two objectives."""
    for (a, x), (b, y) in itertools.combinations(enumerate(objectives), 2):
        yield from parts.trajectories(runs, range(len(runs)), x, y, f"compare-space-{a}-{b}")


def _measures(
    runs: Sequence[Run], names: Sequence[str], objectives: Sequence[str]
) -> Iterator[str]:
    """Bars with one row for each run, for every measure that some run has."""
    columns: list[tuple[str, list[float | None], Form]] = [
        ("Ideal distance", [run.ideal_distance for run in runs], text.number),
        *((f"Gap of {name}", [run.gap(name) for run in runs], text.number) for name in objectives),
        ("Wall time", [run.wall_seconds for run in runs], text.duration),
        ("Peak memory", [run.peak_memory for run in runs], text.size),
    ]
    for index, (title, values, form) in enumerate(columns):
        if any(value is not None for value in values):
            told = "; ".join(f"{n} {form(v)}" for n, v in zip(names, values, strict=True))
            rows = list(zip(names, values, range(len(runs)), strict=True))
            svg = plots.bars(f"compare-bars-{index}", f"{title}. {told}.", rows, form)
            yield parts.figure(title, svg)


def _overlays(
    runs: Sequence[Run], names: Sequence[str], objectives: Sequence[str]
) -> Iterator[str]:
    """Held-out losses, held-out metrics and updates, one curve for each run."""
    for index, name in enumerate(objectives):
        curves = [run.held_out.get(name, EMPTY) for run in runs]
        title = f"Held-out loss of {name}"
        yield from _overlay(f"compare-loss-{index}", title, names, curves, _optima(runs, name))
    drawn = ACTING if any(map(about_robots, runs)) else set()
    metrics = sorted({metric for run in runs for metric in run.held_out_metrics} - drawn)
    for index, (metric, name) in enumerate(itertools.product(metrics, objectives)):
        curves = [run.held_out_metrics.get(metric, {}).get(name, EMPTY) for run in runs]
        yield from _overlay(f"compare-metric-{index}", f"{metric} of {name}", names, curves)
    for index, name in enumerate(objectives if len(objectives) > 1 else ()):
        curves = [cumulative_updates(run, name) for run in runs]
        title = f"Updates of {name} so far"
        yield from _overlay(f"compare-updates-{index}", title, names, curves, points=False)


def _overlay(
    figure: str,
    title: str,
    names: Sequence[str],
    curves: Sequence[Series],
    levels: Sequence[tuple[float, int | None]] = (),
    *,
    points: bool = True,
) -> Iterator[str]:
    if any(len(series) for series in curves):
        told = "; ".join(
            f"{name} {parts.from_to(series)}" for name, series in zip(names, curves, strict=True)
        )
        lines = [
            Line(thinned_mean(series), slot, points=points) for slot, series in enumerate(curves)
        ]
        svg = plots.curves(figure, f"{title}: {told}.", lines, levels=levels)
        yield parts.figure(title, svg)


def _optima(runs: Sequence[Run], name: str) -> list[tuple[float, int | None]]:
    """Each distinct optimum once: neutral if all runs share it, else in its first run's colour."""
    optima: dict[float, int] = {}
    for slot, run in enumerate(runs):
        optimum = run.optimum(name)
        if optimum is not None:
            optima.setdefault(optimum, slot)
    return [(optimum, slot if len(optima) > 1 else None) for optimum, slot in optima.items()]
