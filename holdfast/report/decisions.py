"""The part of a run's page that is about values and rewards from logged decisions."""

from __future__ import annotations

import csv
from dataclasses import dataclass

import numpy as np
import yaml
from numpy.typing import NDArray

from holdfast.report import decision_plots, parts, plots, text
from holdfast.report.plots import Line
from holdfast.report.runs import Run, Series

Array = NDArray[np.float64]

METRICS = {
    "bellman/residual": "Bellman residual of Q on the training rows",
    "bellman/q_error": "Distance of Q to the exact saddle",
    "bellman/reward_error": "Distance of the reward to the exact one",
    "bellman/anchor": "Bellman residual of the anchor, with the dual so far",
    "bellman/td_squared": "Squared TD error, noise of the next value included",
    "bellman/dual_error": "Squared error of the dual, noise of the next value included",
    "nll": "Negative log-likelihood of choices, nats",
    "accuracy": "Share of choices that were likeliest",
}
"""What tells how far values and rewards are, in the order in which it is drawn."""
CURVES = 6
"""Actions up to which rewards are drawn as one curve each."""
LISTED = 200
"""Pairs listed on the page; the file has all."""


@dataclass(frozen=True)
class Values:
    """The table of a run, ``(states, actions)`` each; ``reward`` is ``q - discount * zeta``."""

    q: Array
    reward: Array
    recovered: bool

    @property
    def policy(self) -> Array:
        weights = np.exp(self.q - self.q.max(1, keepdims=True))
        return weights / weights.sum(1, keepdims=True)


def about_decisions(run: Run) -> bool:
    """Whether the run fitted values to logged decisions."""
    return any(
        name.startswith("bellman/") for name in (*run.held_out_metrics, *run.training_metrics)
    )


def values_of(run: Run) -> Values | None:
    """The table that the run wrote; ``None`` if there is none, or it cannot be read."""
    try:
        with (run.path / "model" / "q.csv").open(newline="", encoding="utf-8") as file:
            rows = [
                (int(r["state"]), int(r["action"]), float(r["q"]), float(r["zeta"]))
                for r in csv.DictReader(file)
            ]
        recipe = yaml.safe_load(run.recipe)
        objectives = [spec for spec in recipe["objectives"].values() if "discount" in spec]
        discount = float(objectives[0]["discount"])
        actions = max(row[1] for row in rows) + 1
        q, zeta = (np.array([row[k] for row in rows]).reshape(-1, actions) for k in (2, 3))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, yaml.YAMLError):
        return None
    recovered = any(spec.get("kind") == "anchor_bellman" for spec in objectives)
    return Values(q, q - discount * zeta, recovered)


def value_tables(run: Run, prefix: str) -> str:
    """Heat maps, curves and a list of a table's rewards, values and policy, as HTML."""
    found = values_of(run)
    if found is None:
        return ""
    title = "Recovered reward" if found.recovered else "Reward that makes Q consistent"
    figures = []
    for key, name, table in (
        ("reward", title, found.reward),
        ("q", "Q", found.q),
        ("policy", "Policy", found.policy),
    ):
        low, high = text.number(float(table.min())), text.number(float(table.max()))
        told = f"{name} by state and action, from {low} to {high}"
        svg = decision_plots.heat_map(f"{prefix}-{key}", f"{told}.", table.T, "state", "action")
        figures.append(parts.figure(name, svg, f"From {low} to {high}; below 0 in another colour."))
    states, actions = found.reward.shape
    if actions <= CURVES:
        lines = [
            Line(Series(np.arange(states), found.reward[:, k]), k, points=states <= 40)
            for k in range(actions)
        ]
        told = f"{title} of {actions} actions over {states} states."
        svg = plots.curves(
            f"{prefix}-reward-curves", told, lines, x_label="state", y_label="reward"
        )
        keys = parts.keys({f"action {k}": k for k in range(actions)})
        figures.insert(1, parts.figure(f"{title} by state", svg, keys))
    return parts.grid(figures) + parts.details("Rewards, values and policy", _listed(found))


def _listed(found: Values) -> str:
    lines = ["state  action      reward           Q      policy"]
    pairs = np.argwhere(np.isfinite(found.q))
    for state, action in pairs[:LISTED]:
        columns = (table[state, action] for table in (found.reward, found.q, found.policy))
        lines.append(f"{state:5d}  {action:6d}" + "".join(f"{value:12.5g}" for value in columns))
    if len(pairs) > LISTED:
        lines.append(f"and {len(pairs) - LISTED} more in model/q.csv")
    return "\n".join(lines)
