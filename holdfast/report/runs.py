"""A run as the report sees it, and every number derived from one. No files, no drawing."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

POINTS = 800
"""The most points that one drawn curve has."""


@dataclass(frozen=True)
class Series:
    """A quantity over optimiser steps.

    Attributes
    ----------
    steps : ndarray of int, ``(points,)``
        Rising, without repeats.
    values : ndarray of float, ``(points,)``
        NaN where the quantity was not a number.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def first(self) -> float | None:
        """The first value; ``None`` if there is none or it is not finite."""
        return _finite(self.values[0]) if len(self) else None

    @property
    def last(self) -> float | None:
        """The last value; ``None`` if there is none or it is not finite."""
        return _finite(self.values[-1]) if len(self) else None


EMPTY = Series(np.empty(0, np.int64), np.empty(0, np.float64))


@dataclass(frozen=True)
class Event:
    """Something that happened once: a refused step, a resume, a stop, a new stage."""

    step: int
    kind: str
    detail: str


@dataclass(frozen=True)
class Run:
    """What a run directory holds.

    Attributes
    ----------
    path : Path
        The directory.
    facts : mapping
        ``run.json`` as written.
    recipe : str
        ``recipe.yaml`` as written; empty when absent.
    objectives : tuple of str
        Every objective that was trained or evaluated, has an optimum or a recorded gap.
    turns : Series
        How many objectives each optimiser step updated; its steps are all recorded steps.
    training, weights, held_out, gaps : mapping of str to Series
        By objective: training loss and weight of each update, held-out loss of each evaluation,
        weighted optimality gap behind each turn.
    held_out_counts : mapping of str to Series
        By objective: what each evaluation was a mean over.
    training_metrics, held_out_metrics : mapping of str to mapping of str to Series
        By metric, then by objective.
    geometry : mapping of str to Series
        ``norm/NAME`` and ``cosine/ONE/OTHER`` of the gradients of steps of several objectives.
    estimates : mapping of str to Series
        What the schedule knew at each step, by its own names.
    learning_rate, grad_norm, clipped_grad_norm, seconds : Series
        By optimiser step; ``seconds`` is the cumulative training time.
    events : tuple of Event
        In the order in which they were written.
    unreadable : int
        Lines of ``metrics.jsonl`` that could not be read, apart from an unfinished last one.
    """

    path: Path
    facts: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = ""
    objectives: tuple[str, ...] = ()
    turns: Series = EMPTY
    training: Mapping[str, Series] = field(default_factory=dict)
    weights: Mapping[str, Series] = field(default_factory=dict)
    held_out: Mapping[str, Series] = field(default_factory=dict)
    gaps: Mapping[str, Series] = field(default_factory=dict)
    held_out_counts: Mapping[str, Series] = field(default_factory=dict)
    training_metrics: Mapping[str, Mapping[str, Series]] = field(default_factory=dict)
    held_out_metrics: Mapping[str, Mapping[str, Series]] = field(default_factory=dict)
    geometry: Mapping[str, Series] = field(default_factory=dict)
    estimates: Mapping[str, Series] = field(default_factory=dict)
    learning_rate: Series = EMPTY
    grad_norm: Series = EMPTY
    clipped_grad_norm: Series = EMPTY
    seconds: Series = EMPTY
    events: tuple[Event, ...] = ()
    unreadable: int = 0

    @property
    def name(self) -> str:
        return str(self.facts.get("name") or self.path.resolve().name)

    @property
    def status(self) -> str:
        return str(self.facts.get("status") or "unknown")

    @property
    def steps(self) -> int:
        """Optimiser steps done."""
        return int(self.turns.steps[-1]) if len(self.turns) else 0

    @property
    def wall_seconds(self) -> float | None:
        """Wall time over all resumes; the recorded training time while the run is going on."""
        found = _finite(self.facts.get("seconds"))
        return found if found else self.seconds.last

    @property
    def peak_memory(self) -> float | None:
        """Bytes."""
        return _finite(self.facts.get("peak_memory_bytes")) or None

    def parameters(self, kind: str) -> float | None:
        """How many parameters are ``trainable``, or there are in ``total``."""
        found = self.facts.get("parameters")
        return _finite(found.get(kind)) if isinstance(found, Mapping) else None

    def optimum(self, objective: str) -> float | None:
        """``f*`` of an objective; ``None`` where it is not known."""
        optima = self.facts.get("optima")
        return _finite(optima.get(objective)) if isinstance(optima, Mapping) else None

    def updates(self, objective: str) -> int:
        """Optimiser steps that updated the objective: those that gave it a weight above 0."""
        series = self.weights.get(objective, EMPTY)
        return int(np.count_nonzero(series.values > 0))

    def update_share(self, objective: str) -> float | None:
        """Updates of the objective per optimiser step, in [0, 1]."""
        return self.updates(objective) / len(self.turns) if len(self.turns) else None

    def gap(self, objective: str) -> float | None:
        """Optimality gap ``f - f*``: held-out loss of the last evaluation less the optimum."""
        loss = self.held_out.get(objective, EMPTY).last
        optimum = self.optimum(objective)
        return None if loss is None or optimum is None else loss - optimum

    @property
    def ideal_distance(self) -> float | None:
        """Distance from the ideal point in objective space; ``None`` unless every gap is known."""
        return ideal_distance([self.gap(name) for name in self.objectives])

    @property
    def seconds_per_step(self) -> float | None:
        """Mean training time of a recorded optimiser step."""
        total = self.seconds.last
        return total / len(self.turns) if total is not None and len(self.turns) else None


def ideal_distance(gaps: Iterable[float | None]) -> float | None:
    """Euclidean norm of the gap vector ``(f_1 - f_1*, …, f_n - f_n*)``.

    Returns ``None`` for no gaps at all or if one is unknown: a norm over the rest would flatter.

    Source: Fernando et al., "Mitigating Forgetting in LLM Supervised Fine-Tuning and Preference
    Learning", figure 3, right.
    """
    vector = list(gaps)
    known = [gap for gap in vector if gap is not None]
    return math.hypot(*known) if known and len(known) == len(vector) else None


def relative_change(value: float | None, base: float | None) -> float | None:
    """``value / base - 1``; ``None`` where either is unknown or the base is 0."""
    return None if value is None or not base else value / base - 1.0


def smoothing_window(count: int) -> int:
    """How many updates a smoothed point averages: odd, a twenty-fifth of all, at least 5.

    Fewer than 15 updates are not smoothed (1).
    """
    return max(count // 25, 5) | 1 if count >= 15 else 1


def smoothed(series: Series, window: int) -> Series:
    """Centred moving average over ``window`` points, fewer at the two ends; NaN is left out.

    Centred, so that a smoothed curve does not lag behind the held-out points beside it.

    Raises
    ------
    ValueError
        Unless ``window`` is odd and positive.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window is {window}: it must be odd and positive")
    if not len(series):
        return series
    finite = np.isfinite(series.values)

    # No running sum: after one value of 1e20 it would have lost all that follow.
    def windowed(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.convolve(values, np.ones(window))[window // 2 :][: len(values)]

    sums = windowed(np.where(finite, series.values, 0.0))
    return Series(series.steps, _ratio(sums, windowed(finite.astype(np.float64))))


def thinned_mean(series: Series, points: int = POINTS) -> Series:
    """At most ``points`` points: both ends as they are, the mean of equal buckets in between."""
    if len(series) <= points:
        return series
    starts = np.linspace(1, len(series) - 1, points - 1).astype(int)[:-1]
    steps, values = series.steps[:-1], series.values[:-1]
    finite = np.isfinite(values)
    sums = np.add.reduceat(np.where(finite, values, 0.0), starts)
    means = _ratio(sums, np.add.reduceat(finite.astype(int), starts))
    sizes = np.diff(np.append(starts, len(steps)))
    middles = np.add.reduceat(steps, starts) // sizes
    return Series(
        np.concatenate([series.steps[:1], middles, series.steps[-1:]]),
        np.concatenate([series.values[:1], means, series.values[-1:]]),
    )


def thinned_extremes(series: Series, points: int = POINTS) -> Series:
    """At most ``points`` points: both ends, and the lowest and highest of equal buckets.

    No spike is lost, which an average would hide.
    """
    if len(series) <= points:
        return series
    kept = {0, len(series) - 1}
    for bucket in np.array_split(np.arange(len(series)), (points - 2) // 2):
        values = series.values[bucket]
        if np.isfinite(values).any():
            kept |= {int(bucket[np.nanargmin(values)]), int(bucket[np.nanargmax(values)])}
    index = np.array(sorted(kept))
    return Series(series.steps[index], series.values[index])


def turn_weights(run: Run, objective: str, bins: int) -> NDArray[np.float64]:
    """Mean weight of an objective in the turns of each of ``bins`` equal stretches of the run.

    For a schedule that updates one objective at a time this is the share of the updates.

    Returns
    -------
    ndarray of float, ``(bins,)``
        NaN for a stretch without a recorded step.
    """
    edges = np.linspace(0.5, run.steps + 0.5, bins + 1)
    series = run.weights.get(objective, EMPTY)
    sums, _ = np.histogram(series.steps, edges, weights=np.nan_to_num(series.values))
    counts, _ = np.histogram(run.turns.steps, edges)
    return _ratio(sums, counts)


def cumulative_updates(run: Run, objective: str) -> Series:
    """How many times the objective has been updated, by the end of each recorded step."""
    series = run.weights.get(objective, EMPTY)
    chosen = np.isin(run.turns.steps, series.steps[series.values > 0])
    return Series(run.turns.steps, np.cumsum(chosen).astype(np.float64))


def step_seconds(run: Run) -> Series:
    """Training time of each recorded step that follows directly on a recorded step."""
    steps, values = run.seconds.steps, run.seconds.values
    follows = np.diff(steps) == 1
    return Series(steps[1:][follows], np.diff(values)[follows])


def all_objectives(runs: Sequence[Run]) -> tuple[str, ...]:
    """The objectives of all runs, each once, in order of first appearance."""
    return tuple(dict.fromkeys(name for run in runs for name in run.objectives))


def labels(runs: Sequence[Run]) -> list[str]:
    """A distinct label for each run: its name, else its directory, as far as they differ."""
    paths = [run.path.resolve() for run in runs]
    common = os.path.commonpath([path.parent for path in paths])
    for candidate in (
        [run.name for run in runs],
        [path.name for path in paths],
        [os.path.relpath(path, common) for path in paths],
    ):
        if len(set(candidate)) == len(runs):
            return candidate
    return [f"{run.name} ({number})" for number, run in enumerate(runs, start=1)]


def differences(settings: Sequence[Mapping[str, str]]) -> dict[str, list[str | None]]:
    """The settings that are not the same everywhere: name to one value for each mapping."""
    names = dict.fromkeys(name for mapping in settings for name in mapping)
    table = {name: [mapping.get(name) for mapping in settings] for name in names}
    return {name: values for name, values in table.items() if len(set(values)) > 1}


def flattened(tree: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings and lists as ``{"a.b.0": "value"}``; what is null counts as not set."""
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {} if tree is None else {prefix: str(tree)}
    flat: dict[str, str] = {}
    for key, value in items:
        flat |= flattened(value, f"{prefix}.{key}" if prefix else key)
    return flat


def _ratio(sums: NDArray[Any], counts: NDArray[Any]) -> NDArray[np.float64]:
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


def _finite(value: Any) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None
