"""The part of a page that is about a policy acting in an environment.

Success and return against environment steps, the imitation that is interleaved, and pictures of
rollouts: what Gao et al., "IN-RIL", show in figures 5 to 9.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np

from holdfast.joint.intervals import Interval, mean_interval, wilson_interval
from holdfast.report import parts, plots, text
from holdfast.report.plots import Band, Line
from holdfast.report.runs import EMPTY, Run, Series, thinned_mean

STEPS = "environment steps"
METRICS = {"environment_steps", "success", "reward", "reward_squared"}
"""What is drawn here and so not again among the metrics."""
SCORES = {"success": "Success", "reward": "Return"}
_MAX_PICTURE = 4_000_000  # bytes
_KINDS = {".gif": "image/gif", ".png": "image/png"}


def about_robots(run: Run) -> bool:
    """Whether a policy acted in an environment."""
    return "environment_steps" in run.training_metrics


def robot_sections(run: Run, slots: dict[str, int], prefix: str) -> str:
    """Everything about one run; nothing if no policy acted."""
    if not about_robots(run):
        return ""
    acting = [*_scores([run], [slots], prefix), *_imitation(run, slots, prefix)]
    pages = "<h2>Acting</h2>" + _interval_note() + parts.grid(acting) if acting else ""
    gains = [*_gradients(run, slots, prefix), *_gains(run, prefix)]
    pages += "<h2>Interleaving</h2>" + parts.grid(gains) if gains else ""
    films = list(_films(run))
    pages += "<h2>Rollouts</h2>" + parts.grid(films) if films else ""
    return pages


def robot_comparison(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Several runs over environment steps, and how many each took to where the first one ended."""
    if not any(map(about_robots, runs)):
        return ""
    slots = [dict.fromkeys(run.objectives, slot) for slot, run in enumerate(runs)]
    figures = list(_scores(runs, slots, "compare"))
    legend = parts.keys({name: slot for slot, name in enumerate(names)})
    page = f"<h2>Over environment steps</h2><p>{legend}</p>{_interval_note()}{parts.grid(figures)}"
    return page + _steps_to_level(runs, names) if figures else ""


# Over environment steps ---------------------------------------------------------------------------


def over_environment_steps(run: Run, series: Series) -> Series:
    """A series with the environment steps that had been taken in place of optimiser steps."""
    taken = _environment_steps(run)
    if not len(taken) or not len(series):
        return EMPTY
    before = np.searchsorted(taken.steps, series.steps, side="right") - 1
    steps = np.where(before < 0, 0.0, taken.values[np.maximum(before, 0)]).astype(np.int64)
    kept = np.append(np.diff(steps) > 0, True)  # Of the same experience the latest stands.
    return Series(steps[kept], series.values[kept])


def _environment_steps(run: Run) -> Series:
    recorded = run.training_metrics.get("environment_steps", {})
    return max(recorded.values(), key=len, default=EMPTY)


def _scored(run: Run, score: str) -> dict[str, tuple[Series, Series, Series]]:
    """By objective: the score at each evaluation, and the ends of its interval."""
    found = {}
    for name, series in run.held_out_metrics.get(score, {}).items():
        counts = run.held_out_counts.get(name, EMPTY).values
        squares = run.held_out_metrics.get("reward_squared", {}).get(name, EMPTY).values
        if len(counts) != len(series):
            continue
        bounds: list[Interval] = []
        for index, value in enumerate(series.values):
            trials = int(counts[index]) if np.isfinite(counts[index]) else 0
            bounds.append((value, value))
            if np.isfinite(value) and trials >= 1:
                if score == "success":
                    bounds[-1] = wilson_interval(min(max(value, 0.0), 1.0) * trials, trials)
                elif len(squares) == len(series) and np.isfinite(squares[index]):
                    bounds[-1] = mean_interval(value, float(squares[index]), trials)
        ends = np.array(bounds, dtype=np.float64).reshape(-1, 2)
        low, high = (Series(series.steps, ends[:, side]) for side in (0, 1))
        found[name] = tuple(over_environment_steps(run, each) for each in (series, low, high))
    return found  # type: ignore[return-value]


def _scores(runs: Sequence[Run], slots: Sequence[dict[str, int]], prefix: str) -> Iterator[str]:
    for score, title in SCORES.items():
        lines, bands, told = [], [], []
        for run, own in zip(runs, slots, strict=True):
            for name, (series, low, high) in _scored(run, score).items():
                if not len(series):
                    continue
                lines.append(Line(series, own[name], points=True))
                bands.append(Band(low, high, own[name]))
                told.append(f"{run.name}, {name}: {_from_to(series)}")
        if lines:
            svg = plots.curves(
                f"{prefix}-robot-{score}",
                f"{title} in evaluations over environment steps. {'; '.join(told)}.",
                lines,
                x_label=STEPS,
                bands=bands,
            )
            yield parts.figure(title, svg)


def _imitation(run: Run, slots: dict[str, int], prefix: str) -> Iterator[str]:
    """Held-out losses of what does not act, over the steps of what does."""
    acts = run.training_metrics["environment_steps"]
    for name, series in run.held_out.items():
        moved = over_environment_steps(run, series)
        if name in acts or not len(moved):
            continue
        svg = plots.curves(
            f"{prefix}-robot-imitation-{slots[name]}",
            f"Held-out loss of {name} over environment steps, {_from_to(moved)}.",
            [Line(thinned_mean(moved), slots[name], points=True)],
            x_label=STEPS,
        )
        yield parts.figure(f"Held-out loss of {name}", svg, "", slots[name])


def _steps_to_level(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Environment steps until each run was where the first one ended, and the first one's share."""
    score = next((s for s in SCORES if _scored(runs[0], s)), None)
    if score is None or len(runs) < 2:
        return ""
    first, *_ = _scored(runs[0], score).values()
    level = first[0].last
    if level is None:
        return ""
    needed = [_reached(run, score, level) for run in runs]
    rows = []
    for slot, (name, steps) in enumerate(zip(names, needed, strict=True)):
        ratio = needed[0] / steps if needed[0] and steps else None
        rows.append(
            [
                parts.symbol(slot) + escape(name),
                text.count(steps) if steps is not None else "not reached",
                text.number(ratio, 3),
            ]
        )
    note = (
        f"The level is {text.number(level)}, {SCORES[score].lower()} of the first run at its last "
        "evaluation. A ratio above 1: fewer steps than the first run took to its own level. Of "
        "single runs this is mostly noise; compare seeds."
    )
    head = ["run", "environment steps to the level", "ratio"]
    return parts.table(head, rows, kind="runs") + f'<p class="note">{note}</p>'


def _reached(run: Run, score: str, level: float) -> float | None:
    for series, _, _ in _scored(run, score).values():
        there = np.flatnonzero(series.values >= level)
        if len(there):
            return float(series.steps[there[0]])
    return None


# Interleaving -------------------------------------------------------------------------------------


def _gradients(run: Run, slots: dict[str, int], prefix: str) -> Iterator[str]:
    """Cosine and norms, as running averages where there are any.

    Nothing of networks that share no parameter: their cosine is NaN, and their norms are 0.
    """
    known = run.estimates
    raw = [series for key, series in run.geometry.items() if key.startswith("cosine/")]
    raw = [series for series in raw if np.isfinite(series.values).any()]
    lines = [line for series in raw for line in plots.training_lines(series, None)[:1]]
    if "cosine" in known:
        lines.append(Line(thinned_mean(known["cosine"]), 0))
    if lines:
        shown = known.get("cosine", raw[0] if raw else EMPTY)
        svg = plots.curves(
            f"{prefix}-robot-cosine",
            f"Cosine of the gradients over steps, {parts.from_to(shown)}.",
            lines,
            levels=[(0.0, None)],
        )
        yield parts.figure("Cosine of the gradients", svg, "Below 0 they conflict.")
    norms = {n: known.get(f"norm/{n}", run.geometry.get(f"norm/{n}", EMPTY)) for n in slots}
    norms = {name: series for name, series in norms.items() if (series.values > 0).any()}
    if norms:
        told = "; ".join(f"{name} {parts.from_to(series)}" for name, series in norms.items())
        svg = plots.curves(
            f"{prefix}-robot-norms",
            f"Norms of the gradients over steps: {told}.",
            [Line(thinned_mean(series), slots[name]) for name, series in norms.items()],
            from_zero=True,
        )
        shown_keys = parts.keys({name: slots[name] for name in norms})
        yield parts.figure("Norms of the gradients", svg, shown_keys)


_FIGURES: dict[str, tuple[str, str, tuple[str, ...], float | None]] = {
    "ratio": ("m: updates between two of imitation", "", ("ratio",), None),
    "benefit": (
        "Regularisation benefit Δ",
        "What an update by imitation takes off the reinforcement loss. ",
        ("benefit/promised", "benefit/observed"),
        0.0,
    ),
    "efficiency": (
        "Efficiency ratio",
        "Gain of a cycle over that of as many reinforcement updates. ",
        ("efficiency/promised", "efficiency/observed"),
        1.0,
    ),
}
"""By figure: its title, a note, the estimates it shows, and a level to compare them with."""


def _gains(run: Run, prefix: str) -> Iterator[str]:
    for figure, (title, note, keys, level) in _FIGURES.items():
        known = {key: run.estimates.get(key, EMPTY) for key in keys}
        slots = {
            key: slot
            for slot, (key, series) in enumerate(known.items())
            if np.isfinite(series.values).any()
        }
        if not slots:
            continue
        told = "; ".join(f"{key} {parts.from_to(known[key])}" for key in slots)
        svg = plots.curves(
            f"{prefix}-robot-{figure}",
            f"{title} over steps: {told}.",
            [Line(thinned_mean(known[key]), slot) for key, slot in slots.items()],
            levels=[] if level is None else [(level, None)],
        )
        shown = {key.rpartition("/")[2]: slot for key, slot in slots.items()}
        yield parts.figure(title, svg, note + (parts.keys(shown) if len(keys) > 1 else ""))


# Rollouts -----------------------------------------------------------------------------------------


def _films(run: Run) -> Iterator[str]:
    folder = run.path / "rollouts"
    try:
        listed = json.loads((folder / "rollouts.json").read_text("utf-8"))
    except (OSError, ValueError):
        return
    for film in listed if isinstance(listed, list) else []:
        file = folder / Path(str(film.get("file"))).name
        kind = _KINDS.get(file.suffix)
        if kind is None or not file.is_file() or file.stat().st_size > _MAX_PICTURE:
            continue
        caption = str(film.get("caption", ""))
        drawn = str(film.get("drawn", ""))
        note = (
            f"The path of the observations: nothing could be rendered ({drawn})." if drawn else ""
        )
        content = base64.b64encode(file.read_bytes()).decode("ascii")
        image = f'<img src="data:{kind};base64,{content}" alt="{escape(caption)}">'
        yield parts.figure(caption, image, escape(note))


def _interval_note() -> str:
    note = (
        "Evaluations on fixed seeds. Shaded: 95 % intervals over episodes (Wilson's for success, "
        "normal for returns); they say nothing of other training seeds."
    )
    return f'<p class="note">{note}</p>'


def _from_to(series: Series) -> str:
    return (
        f"from {text.number(series.first)} at {text.count(int(series.steps[0]))} "
        f"to {text.number(series.last)} at {text.count(int(series.steps[-1]))} environment steps"
    )
