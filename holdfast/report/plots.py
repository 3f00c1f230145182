"""The figures of the report.

Before its own arguments, each takes a ``name`` that keeps its ids apart from those of other
figures, and a ``description`` for those who cannot see it. Each returns SVG for the page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import MaxNLocator, NullFormatter

from holdfast.report.runs import (
    Run,
    Series,
    smoothed,
    smoothing_window,
    thinned_extremes,
    thinned_mean,
    turn_weights,
)
from holdfast.report.svg import COLOURS, INK, MUTED, PAPER, SERIES, drawn

SYMBOLS = "●■▲◆▼✚✖"
"""What the page writes for the markers of the figures."""
_MARKERS = "os^DvPX"
_DASHES = ["-", (0, (5, 1.6)), (0, (1.4, 1.4)), (0, (6, 1.5, 1.4, 1.5))]
_WIDTH, _HEIGHT = 410.0, 256.0  # In CSS pixels at full size.


@dataclass(frozen=True)
class Line:
    """One curve of a figure.

    Attributes
    ----------
    series : Series
        What is drawn.
    slot : int or None
        Colour, marker and dashes: one slot for each objective or each run; ``None`` is neutral.
    faint : bool
        A light line behind the others, for raw values.
    points : bool
        Whether to mark the single points.
    """

    series: Series
    slot: int | None
    faint: bool = False
    points: bool = False


@dataclass(frozen=True)
class Band:
    """What lies between two series, behind the curves.

    Attributes
    ----------
    low, high : Series
        Of the same steps.
    slot : int or None
        As of :class:`Line`.
    """

    low: Series
    high: Series
    slot: int | None


@dataclass(frozen=True)
class Trail:
    """The path of one run through the plane of two objectives.

    Attributes
    ----------
    x, y : ndarray, ``(evaluations,)``
        Held-out losses of the same evaluations.
    slot : int or None
        Colour and marker; ``None`` is neutral.
    ideal : (float, float) or None
        ``(f_x*, f_y*)`` where both are known.
    """

    x: np.ndarray[Any, Any]
    y: np.ndarray[Any, Any]
    slot: int | None
    ideal: tuple[float, float] | None = None

    def second_half(self) -> Trail:
        """The later half of the evaluations, at least the last."""
        half = len(self.x) // 2
        return Trail(self.x[half:], self.y[half:], self.slot, self.ideal)


@drawn
def curves(
    lines: Sequence[Line],
    x_label: str = "step",
    y_label: str = "",
    *,
    levels: Sequence[tuple[float, int | None]] = (),
    bands: Sequence[Band] = (),
    from_zero: bool = False,
) -> Figure:
    """Curves over steps; ``levels`` are horizontal dashed lines as ``(value, slot)``."""
    figure, axes = _figure(_HEIGHT)
    for band in bands:
        axes.fill_between(
            band.low.steps,
            band.low.values,
            band.high.values,
            color=_colour(band.slot),
            alpha=0.16,
            linewidth=0,
        )
    for line in lines:
        _draw_line(axes, line)
    for value, slot in levels:
        axes.axhline(value, color=_colour(slot), linewidth=1.3, dashes=(4, 3), zorder=1.5)
    _scale_y(axes, [line.series.values for line in lines])
    if from_zero and axes.get_yscale() == "linear":
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    _label(axes, x_label, y_label)
    return figure


@drawn
def trajectory(
    trails: Sequence[Trail], x_label: str, y_label: str, *, with_start: bool = True
) -> Figure:
    """Paths in the plane of two held-out losses, with their ends and the ideal point."""
    figure, axes = _figure(320.0)
    single = len(trails) == 1
    for trail in trails:
        colour, marker = _colour(trail.slot), _marker(trail.slot)
        few = len(trail.x) <= 40
        axes.plot(
            trail.x,
            trail.y,
            color=colour,
            linestyle=_dashes(trail.slot),
            linewidth=1.5,
            marker="." if few else None,
            markersize=5,
        )
        if with_start:
            axes.plot(
                trail.x[:1],
                trail.y[:1],
                marker=marker,
                color=colour,
                markerfacecolor=PAPER,
                markeredgewidth=1.7,
                markersize=8,
            )
        axes.plot(
            trail.x[-1:],
            trail.y[-1:],
            marker=marker,
            color=colour,
            markeredgecolor=PAPER,
            markersize=10,
        )
        if single and with_start:
            _note(axes, "start", trail.x[0], trail.y[0])
        if single and len(trail.x) > 1:
            _note(axes, "end", trail.x[-1], trail.y[-1])
    ideals = {trail.ideal: trail.slot for trail in trails if trail.ideal}
    for ideal, slot in ideals.items():
        axes.plot(
            *ideal,
            marker="*",
            markersize=15,
            color=INK if len(ideals) == 1 else _colour(slot),
            markeredgecolor=PAPER,
            linestyle="none",
            zorder=4,
        )
    if len(ideals) == 1:
        _note(axes, "ideal point", *next(iter(ideals)), below=True)
    axes.margins(0.14)
    _label(axes, x_label, y_label)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.ticklabel_format(useOffset=False)
    return figure


@drawn
def bars(
    rows: Sequence[tuple[str, float | None, int | None]], form: Callable[[float | None], str]
) -> Figure:
    """Horizontal bars as ``(label, value, slot)``; slot ``None`` is neutral."""
    figure, axes = _figure(10.0 + 34.0 * len(rows))
    values = [0.0 if value is None else value for _, value, _ in rows]
    low, high = min(0.0, *values), max(0.0, *values)
    span = (high - low) or 1.0
    for index, (_, value, slot) in enumerate(rows):
        axes.barh(index, value or 0.0, height=0.62, color=_colour(slot), linewidth=0)
        axes.annotate(
            form(value),
            (max(value or 0.0, 0.0), index),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=12,
        )
    axes.axvline(0.0, color=MUTED, linewidth=1.0)
    axes.set_xlim(low - (0.04 * span if low < 0 else 0.0), high + 0.27 * span)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_yticks(range(len(rows)), [_shortened(label, 22) for label, _, _ in rows])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(visible=False)
    axes.xaxis.set_visible(False)  # Every bar carries its value.
    axes.spines[["left", "bottom"]].set_visible(False)
    return figure


@drawn
def turns(run: Run, objectives: Sequence[str], bins: int = 220) -> Figure:
    """One row for each objective, darker where it was updated more; ticks for events below."""
    events = sorted({event.step for event in run.events})
    rows = len(objectives) + bool(events)
    figure, axes = _figure(62.0 + 36.0 * rows)
    bins = max(1, min(bins, run.steps))
    edges = np.linspace(0.5, run.steps + 0.5, bins + 1)
    for row, name in enumerate(objectives):
        # Ten shades, each one path: a long run stays small, neighbours leave no seam.
        weights = np.nan_to_num(turn_weights(run, name, bins))
        shades = np.where(weights > 0, np.round(weights * 10).clip(1, 10), 0)
        for shade in np.unique(shades[shades > 0]):
            boxes = [_box(edges[a], edges[b], row) for a, b in _stretches(shades == shade)]
            patch = PathPatch(
                Outline.make_compound_path(*boxes),
                facecolor=_colour(row),
                alpha=float(shade) / 10,
                linewidth=0,
                antialiased=False,
            )
            axes.add_patch(patch)
    if events:
        axes.plot(
            events,
            [len(objectives)] * len(events),
            color=INK,
            linestyle="none",
            marker="|",
            markersize=11,
            markeredgewidth=1.6,
        )
    names = [_shortened(name, 16) for name in objectives] + ["events"] * bool(events)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(rows - 0.45, -0.55)
    axes.set_yticks(range(rows), names)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    _label(axes, "step", "")
    return figure


def training_lines(series: Series, slot: int | None) -> list[Line]:
    """Raw values as a faint line and their moving average over it, both thinned."""
    window = smoothing_window(len(series))
    if window == 1:
        return [Line(series, slot)]
    return [
        Line(thinned_extremes(series), slot, faint=True),
        Line(thinned_mean(smoothed(series, window)), slot),
    ]


def trail(run: Run, x: str, y: str, slot: int | None, points: int = 400) -> Trail | None:
    """The run's path in the plane of two objectives; ``None`` without a common evaluation."""
    if x not in run.held_out or y not in run.held_out:
        return None
    first, second = run.held_out[x], run.held_out[y]
    _, in_x, in_y = np.intersect1d(first.steps, second.steps, return_indices=True)
    pairs = np.stack([first.values[in_x], second.values[in_y]])
    pairs = pairs[:, np.isfinite(pairs).all(axis=0)]
    if not pairs.shape[1]:
        return None
    kept = np.unique(np.linspace(0, pairs.shape[1] - 1, points).round().astype(int))
    best = run.optimum(x), run.optimum(y)
    ideal = None if best[0] is None or best[1] is None else (best[0], best[1])
    return Trail(pairs[0, kept], pairs[1, kept], slot, ideal)


def close_up(trails: Sequence[Trail]) -> list[Trail] | None:
    """The second halves, if a figure of the whole would squeeze them; else ``None``.

    They are squeezed if they span, with the ideal points, less than a quarter of either axis.
    """
    late = [trail.second_half() for trail in trails]
    for axis in (0, 1):
        ideals = [trail.ideal[axis] for trail in trails if trail.ideal]
        spans = [
            np.ptp(np.concatenate([ideals, *((trail.x, trail.y)[axis] for trail in drawn)]))
            for drawn in (late, trails)
        ]
        if 0 < spans[0] < spans[1] / 4:
            return late
    return None


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH / 72, height / 72), layout="constrained")
    figure.patch.set_alpha(0.0)
    return figure, figure.add_subplot()


def _draw_line(axes: Axes, line: Line) -> None:
    colour, lonely = _colour(line.slot), len(line.series) == 1
    marked = lonely or line.points
    axes.plot(
        line.series.steps,
        line.series.values,
        color=colour,
        alpha=0.35 if line.faint else 1.0,
        linewidth=0.8 if line.faint else 1.3 if line.points else 1.8,
        linestyle="-" if line.faint else _dashes(line.slot),
        marker=_marker(line.slot) if marked else None,
        markevery=max(1, len(line.series) // 20),
        markersize=6.5,
        markeredgecolor=PAPER,
        markeredgewidth=1.0,
        zorder=2 if line.faint else 3 if line.points else 2.5,
    )


def _scale_y(axes: Axes, values: Iterable[np.ndarray[Any, Any]]) -> None:
    """A logarithmic axis where a spike would otherwise flatten everything else."""
    together = np.concatenate([np.empty(0), *values])
    together = together[np.isfinite(together)]
    if together.size and together.min() > 0 and together.max() > 50 * np.median(together):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _label(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(_shortened(x_label, 44))
    axes.set_ylabel(_shortened(y_label, 32))
    if x_label.endswith(("step", "steps")):
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}".replace(",", "\u202f"))


def _note(axes: Axes, text: str, x: float, y: float, *, below: bool = False) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=(0, -20) if below else (9, 5),
        textcoords="offset points",
        ha="center" if below else "left",
        fontsize=12,
        bbox={"facecolor": PAPER, "alpha": 0.7, "linewidth": 0, "pad": 1},
    )


def _box(left: float, right: float, row: int) -> Outline:
    top, bottom = row - 0.4, row + 0.4
    return Outline(
        [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)], closed=True
    )


def _stretches(chosen: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """Half-open stretches ``(start, stop)`` in which every element is true."""
    padded = np.concatenate([[0], chosen.astype(int), [0]])
    change = np.diff(padded)
    return list(zip(np.flatnonzero(change == 1), np.flatnonzero(change == -1), strict=True))


def _colour(slot: int | None) -> str:
    return MUTED if slot is None else SERIES[slot % COLOURS]


def _marker(slot: int | None) -> str:
    return _MARKERS[(slot or 0) % len(_MARKERS)]


def _dashes(slot: int | None) -> Any:
    return _DASHES[(slot or 0) // COLOURS % len(_DASHES)]


def _shortened(text: str, length: int) -> str:
    plain = " ".join(text.encode("utf-8", "replace").decode().split())
    return plain if len(plain) <= length else plain[: length - 1] + "…"
