"""Figures of values, rewards and their stability.

Like those of :mod:`holdfast.report.plots`: each takes a ``name`` and a ``description`` before its
own arguments and returns SVG for the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from holdfast.report.svg import COLOURS, MUTED, PAPER, SERIES, drawn

Array = NDArray[np.float64]
MARKERS = "os^DvPX"
SHADES = 10
_WIDTH, _HEIGHT = 410.0, 256.0


@dataclass(frozen=True)
class Band:
    """Estimates of one action over states ``(k,)``, each with an interval ``(2, k)``."""

    states: Array
    estimate: Array
    interval: Array
    slot: int


@dataclass(frozen=True)
class Power:
    """A quantity over sizes, both positive, ``(k,)``; straight on logarithmic axes."""

    sizes: Array
    values: Array
    slot: int


@drawn
def heat_map(table: Array, x_label: str, y_label: str) -> Figure:
    """A table ``(rows, columns)`` in shades of one colour above 0 and of another below.

    NaN is left blank. The strongest shade is the largest magnitude.
    """
    rows, columns = table.shape
    figure, axes = _figure(70.0 + 22.0 * min(rows, 12))
    top = float(np.nanmax(np.abs(table))) if np.isfinite(table).any() else 0.0
    steps = np.nan_to_num(np.ceil(SHADES * np.abs(table) / (top or 1.0))).clip(0, SHADES)
    for sign, slot in ((1.0, 0), (-1.0, 1)):
        for shade in range(1, SHADES + 1):
            places = np.argwhere((steps == shade) & (np.sign(table) == sign))
            if len(places):
                boxes = [_box(column, row) for row, column in places]
                patch = PathPatch(
                    Outline.make_compound_path(*boxes),
                    facecolor=SERIES[slot],
                    alpha=shade / SHADES,
                    linewidth=0,
                    antialiased=False,
                )
                axes.add_patch(patch)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))
    axes.grid(visible=False)
    _label(axes, x_label, y_label)
    return figure


@drawn
def bands(shown: Sequence[Band], x_label: str, y_label: str) -> Figure:
    """Estimates as points, with their intervals as bars; actions stand beside each other."""
    figure, axes = _figure(_HEIGHT)
    for number, band in enumerate(shown):
        x = band.states + 0.12 * (number - (len(shown) - 1) / 2)
        colour = SERIES[band.slot % COLOURS]
        axes.vlines(x, *band.interval, color=colour, linewidth=3.0, alpha=0.45)
        axes.plot(
            x,
            band.estimate,
            color=colour,
            linestyle="none",
            marker=MARKERS[band.slot % len(MARKERS)],
            markersize=5.5,
            markeredgecolor=PAPER,
        )
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _label(axes, x_label, y_label)
    return figure


@drawn
def ranks(values: Array, y_label: str) -> Figure:
    """Values from the largest to the smallest, ``(k,)``."""
    figure, axes = _figure(_HEIGHT)
    axes.plot(np.arange(1, len(values) + 1), np.sort(values)[::-1], color=SERIES[0])
    if len(values) > 100 and values.min() >= 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=min(0.0, float(values.min())))
    _label(axes, "rank", y_label)
    return figure


@drawn
def powers(shown: Sequence[Power], x_label: str, y_label: str) -> Figure:
    """Quantities over sizes on logarithmic axes."""
    figure, axes = _figure(_HEIGHT)
    for power in shown:
        axes.plot(
            power.sizes,
            power.values,
            color=SERIES[power.slot % COLOURS],
            marker=MARKERS[power.slot % len(MARKERS)],
            markeredgecolor=PAPER,
            markersize=6.5,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes = sorted({float(size) for power in shown for size in power.sizes})
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    _label(axes, x_label, y_label)
    return figure


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH / 72, height / 72), layout="constrained")
    figure.patch.set_alpha(0.0)
    return figure, figure.add_subplot()


def _label(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.tick_params(labelcolor=MUTED)


def _box(column: float, row: float) -> Outline:
    left, right, top, bottom = column - 0.5, column + 0.5, row - 0.5, row + 0.5
    return Outline(
        [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)], closed=True
    )
