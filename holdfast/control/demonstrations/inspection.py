"""What is in demonstrations, for a person to look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table

from holdfast.control.demonstrations.episodes import Demonstrations


@dataclass(frozen=True)
class Summary:
    """Numbers about demonstrations.

    Attributes
    ----------
    episodes, steps : int
        How many.
    lengths, returns : tuple of float
        Smallest, mean and largest of an episode; ``returns`` only where all have rewards.
    successes, known : int
        Episodes that succeeded, of those of which it is known.
    terminated, truncated, cut : int
        How episodes ended; ``cut``: neither way.
    observations, actions : ndarray
        ``(size, 4)``: smallest, mean, standard deviation and largest of every entry.
    at_bound : float
        Share of actions with an entry at the largest or smallest value that this entry takes in
        any of them, if more than one in a thousand actions stand there: what clipping leaves.
    clipped : float, optional
        Share of actions that were clipped when they were recorded, where it was noted.
    """

    episodes: int
    steps: int
    lengths: tuple[float, float, float]
    returns: tuple[float, float, float] | None
    successes: int
    known: int
    terminated: int
    truncated: int
    cut: int
    observations: NDArray[np.float64]
    actions: NDArray[np.float64]
    at_bound: float
    clipped: float | None


def summarize(demonstrations: Demonstrations) -> Summary:
    """Count and measure; at least one episode."""
    episodes = demonstrations.episodes
    known = [e.success for e in episodes if e.success is not None]
    returns = [e.total_reward for e in episodes if e.total_reward is not None]
    actions = demonstrations.actions
    return Summary(
        episodes=len(episodes),
        steps=demonstrations.steps,
        lengths=_spread([float(len(e)) for e in episodes]),
        returns=_spread(returns) if len(returns) == len(episodes) else None,
        successes=sum(known),
        known=len(known),
        terminated=sum(e.terminated for e in episodes),
        truncated=sum(e.truncated for e in episodes),
        cut=sum(not (e.terminated or e.truncated) for e in episodes),
        observations=_ranges(demonstrations.observations),
        actions=_ranges(actions),
        at_bound=_share_at_bound(actions),
        clipped=demonstrations.details.get("clipped"),
    )


def summary_tables(demonstrations: Demonstrations) -> Group:
    """The summary as tables to print."""
    summary = summarize(demonstrations)
    facts = Table(title=demonstrations.source, show_header=False)
    for name, value in _facts(demonstrations, summary).items():
        facts.add_row(name, value)
    ranges = Table("entry", "smallest", "mean", "deviation", "largest", title="ranges")
    for field in ("observations", "actions"):
        for number, row in enumerate(getattr(summary, field)):
            # A value that never changes says nothing, and cannot be normalised by its spread.
            note = " [dim](constant)[/dim]" if row[2] == 0 else ""
            ranges.add_row(f"{field}\\[{number}]{note}", *(f"{value:.4g}" for value in row))
    return Group(facts, ranges)


def _facts(demonstrations: Demonstrations, summary: Summary) -> Mapping[str, str]:
    rate = f"{summary.successes} of {summary.known}" if summary.known else "not known"
    facts = {
        "environment": demonstrations.environment or "not known",
        "episodes": str(summary.episodes),
        "steps": str(summary.steps),
        "length of an episode": _three(summary.lengths),
        "return": "not known" if summary.returns is None else _three(summary.returns),
        "success": rate,
        "ended": f"{summary.terminated} terminated, {summary.truncated} truncated"
        + (f", {summary.cut} cut short" if summary.cut else ""),
        "actions with an entry at its bound": f"{summary.at_bound:.1%}",
    }
    if summary.clipped is not None:
        facts["actions clipped when recorded"] = f"{summary.clipped:.1%}"
    shown: dict[str, Any] = {
        name: value
        for name, value in demonstrations.details.items()
        if name != "clipped" and value not in (None, {}, "")
    }
    if shown:
        facts["recorded with"] = ", ".join(f"{name} {value}" for name, value in shown.items())
    return facts


def _three(values: tuple[float, float, float]) -> str:
    low, mean, high = values
    return f"{mean:.4g} (from {low:.4g} to {high:.4g})"


def _spread(values: list[float]) -> tuple[float, float, float]:
    return min(values), float(np.mean(values)), max(values)


def _ranges(values: NDArray[np.floating]) -> NDArray[np.float64]:
    values = values.astype(np.float64)
    # Rounding gives a constant a tiny deviation.
    spread = np.where(np.ptp(values, axis=0) == 0, 0.0, values.std(axis=0))
    return np.stack([values.min(axis=0), values.mean(axis=0), spread, values.max(axis=0)], axis=1)


def _share_at_bound(actions: NDArray[np.floating]) -> float:
    low, high = actions.min(axis=0), actions.max(axis=0)
    moving = low < high
    at_bound = np.zeros(actions.shape, dtype=np.bool_)
    for bound in (low, high):
        here = (actions == bound) & moving
        at_bound |= here & (here.mean(axis=0) > 1e-3) & (here.sum(axis=0) > 1)
    return float(at_bound.any(axis=1).mean())
