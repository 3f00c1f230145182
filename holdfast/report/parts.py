"""The pieces of HTML that all pages are made of.

Arguments are plain text, escaped here, unless their description says that they are HTML.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

from holdfast.report import plots, text
from holdfast.report.runs import POINTS, Run, Series, smoothing_window
from holdfast.report.svg import COLOURS

SPACE = (
    "Held-out losses at each evaluation. Hollow: start. Filled: end. "
    "Star: the ideal point, where every objective is at its optimum, if the optima are known."
)
"""What a reader has to know about a figure of objective space."""


def figure(title: str, svg: str, note: str = "", slot: int | None = None) -> str:
    """A figure under its title. ``svg`` and ``note`` are HTML; ``slot`` puts a symbol in front."""
    front = "" if slot is None else symbol(slot)
    caption = f"<b>{front}{escape(title)}</b>" + (f"<span>{note}</span>" if note else "")
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def grid(figures: Iterable[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="figures">{"".join(figures)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table whose cells are HTML; the first cell of a row is its heading."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}">'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def details(title: str, content: str) -> str:
    """Folded text; nothing for no text."""
    if not content:
        return ""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(content)}</pre></details>"


def symbol(slot: int) -> str:
    """The mark by which an objective or a run is known in every figure."""
    mark = plots.SYMBOLS[slot % len(plots.SYMBOLS)]
    return f'<i class="s{slot % COLOURS}" aria-hidden="true">{mark}</i>'


def keys(slots: Mapping[str, int]) -> str:
    """A legend."""
    return "".join(
        f'<span class="key">{symbol(slot)}{escape(name)}</span>' for name, slot in slots.items()
    )


def trajectories(
    runs: Sequence[Run], slots: Iterable[int | None], x: str, y: str, name: str
) -> Iterator[str]:
    """Runs in the plane of two objectives, and a close-up of their ends where it is needed.

    Nothing if no run has evaluated both.
    """
    found = [plots.trail(run, x, y, slot) for run, slot in zip(runs, slots, strict=True)]
    trails = [trail for trail in found if trail is not None]
    if not trails:
        return
    told = "; ".join(
        f"from ({text.number(trail.x[0])}, {text.number(trail.y[0])}) "
        f"to ({text.number(trail.x[-1])}, {text.number(trail.y[-1])})"
        for trail in trails
    )
    description = f"Held-out losses of {x} and {y}: {told}."
    axes = f"{x} loss", f"{y} loss"
    yield figure(f"{x} against {y}", plots.trajectory(name, description, trails, *axes))
    late = plots.close_up(trails)
    if late:
        description = f"The second half of the evaluations. {description}"
        svg = plots.trajectory(f"{name}-late", description, late, *axes, with_start=False)
        yield figure(f"{x} against {y}, close up", svg, "The second half of the evaluations.")


def from_to(series: Series) -> str:
    """A series in words, as plain text."""
    if not len(series):
        return "not recorded"
    return (
        f"from {text.number(series.first)} at step {series.steps[0]} "
        f"to {text.number(series.last)} at step {series.steps[-1]}"
    )


def averaging(series: Series) -> str:
    """How a raw series is drawn, in words."""
    window = smoothing_window(len(series))
    told = [f"Averaged over {window} updates."] if window > 1 else []
    if len(series) > POINTS:
        told.append(f"Drawn with {POINTS} of {text.count(len(series))} points, extremes kept.")
    return " ".join(told)
