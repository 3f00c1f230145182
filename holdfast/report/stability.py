"""What ``holdfast stability`` found: a page, and tables for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from holdfast.errors import RunError
from holdfast.report import decision_plots, parts, text
from holdfast.report.decision_plots import Band, Power

FILE = "stability.json"
LISTED = 20
"""Rows of the data, and entries of a table, that are listed; the file has all."""
PLOTTED = 60
"""States up to which every estimate is drawn with its interval."""


def read_stability(folder: Path) -> dict[str, Any]:
    """The result in a folder.

    Raises
    ------
    RunError
        If there is none, or it cannot be read.
    """
    file = folder / FILE
    try:
        found = json.loads(file.read_text("utf-8"))
    except OSError:
        raise RunError(f"{file}: there is none; 'holdfast stability RECIPE' writes it") from None
    except ValueError as error:
        raise RunError(f"{file}: expected one JSON object: {error}") from None
    if not isinstance(found, dict) or not {"entries", "influence"} <= found.keys():
        raise RunError(f"{file}: expected what 'holdfast stability' writes")
    return found


def stability_tables(folder: Path) -> list[Table]:
    """For the terminal: the entries that move most, and the rows that move them most.

    Raises
    ------
    RunError
        As of :func:`read_stability`.
    """
    found = read_stability(folder)
    quantity = str(found["quantity"])
    told = [_method(found), *_slope_words(found)]
    entries = Table(
        box=SIMPLE_HEAD,
        title=f"{quantity} if one observation were replaced",
        caption=" · ".join(told),
        title_justify="left",
        caption_justify="left",
    )
    for name in ("state", "action", quantity, "mean shift", "95 % of shifts"):
        entries.add_column(name, justify="right")
    for entry in _most(found)[:10]:
        entries.add_row(*_entry(entry))
    rows = Table(box=SIMPLE_HEAD, title="observations that move it most", title_justify="left")
    for name in ("row", "influence", "state", "action", "reward", "next state"):
        rows.add_column(name, justify="right")
    for row in found["influence"][:10]:
        rows.add_row(*_row(row))
    return [entries, rows]


def stability_sections(found: Mapping[str, Any]) -> str:
    """The page's body, HTML."""
    quantity = str(found["quantity"])
    name = escape(str(found.get("name", "")))
    head = ["state", "action", escape(quantity), "mean shift", "95 % of shifts"]
    entries = [[escape(cell) for cell in _entry(entry)] for entry in _most(found)[:LISTED]]
    rows = [[escape(cell) for cell in _row(row)] for row in found["influence"][:LISTED]]
    return "".join(
        [
            f'<div class="title"><h1>{name}</h1></div>',
            f'<p class="lead">How far the estimated {escape(quantity)} would move, had one '
            f"observation been another. {escape(_method(found))}.</p>",
            _numbers(found),
            "<h2>Entries</h2>",
            parts.grid(_entry_figures(found)),
            parts.table(head, entries),
            f"<h2>Observations</h2><p class='note'>{INFLUENCE}</p>",
            parts.grid([_ranked(found)]),
            parts.table(["row", "influence", "state", "action", "reward", "next state"], rows),
            _curve(found),
            parts.details("Setting", json.dumps(_setting(found), indent=1)),
        ]
    )


INFLUENCE = (
    "Influence: the largest change of any entry as that row is replaced by others of the data, "
    "mean over replacements. Rows count from 0, over the rows that have a next state."
)


def _method(found: Mapping[str, Any]) -> str:
    tried = f"{text.count(found['tried'])} of {text.count(found['rows'])} observations replaced"
    if found["method"] == "exact":
        return f"{tried}, the table solved exactly each time"
    return f"{tried}, coupled runs; the same data twice: {text.number(found['control'])}"


def _slope_words(found: Mapping[str, Any]) -> list[str]:
    curve = found.get("curve")
    if not curve or curve["slope"] is None:
        return []
    low, high = curve["interval"]
    return [
        f"shift against rows: slope {text.number(curve['slope'], 3)} "
        f"({text.number(low, 3)} to {text.number(high, 3)})"
    ]


def _numbers(found: Mapping[str, Any]) -> str:
    shifts = [entry["shift"] for entry in found["entries"]]
    margin = found.get("margin") or {}
    cells = [
        ("Mean shift", text.number(float(np.mean(shifts))), "over entries"),
        ("Largest mean shift", text.number(max(shifts)), "of an entry"),
        ("Observations", text.count(found["rows"]), f"{text.count(found['tried'])} tried"),
        ("Same data twice", text.number(found["control"]), "0: runs are coupled"),
        (
            "Stability margin",
            text.number(margin.get("margin")),
            f"dual step {margin['step_ratio']:g} times the primal" if margin else "unknown saddle",
        ),
    ]
    if found.get("trained_error") is not None:
        cells.append(("Trained table", text.number(found["trained_error"]), "largest distance"))
    listed = "".join(f"<div><dt>{a}</dt><dd>{b}<small>{c}</small></dd></div>" for a, b, c in cells)
    return f'<dl class="numbers">{listed}</dl>'


def _entry_figures(found: Mapping[str, Any]) -> list[str]:
    entries, quantity = found["entries"], str(found["quantity"])
    actions = sorted({entry["action"] for entry in entries})
    shift = np.array([entry["shift"] for entry in entries]).reshape(-1, len(actions))
    if isinstance(entries[0]["state"], list):
        svg = decision_plots.ranks(
            "shifts", f"Mean shifts of {len(entries)} entries, ranked.", shift.ravel(), "mean shift"
        )
        note = f"{len(shift)} observations of the data, every action."
        return [parts.figure(f"Mean shift of the {quantity}", svg, note)]
    states = np.array([entry["state"] for entry in entries]).reshape(shift.shape)[:, 0]
    told = f"Mean shift of {quantity} by state and action, at most {text.number(shift.max())}."
    svg = decision_plots.heat_map("shift", told, shift.T, "state", "action")
    figures = [
        parts.figure("Mean shift", svg, f"Strongest shade: {text.number(shift.max())}."),
    ]
    if len(states) <= PLOTTED:
        estimate = np.array([entry["estimate"] for entry in entries]).reshape(shift.shape)
        interval = np.array([entry["interval"] for entry in entries]).reshape(*shift.shape, 2)
        shown = [
            Band(states, estimate[:, k], (estimate[:, k : k + 1] + interval[:, k]).T, k)
            for k in range(len(actions))
        ]
        svg = decision_plots.bands(
            "bands",
            f"Estimated {quantity} by state and action, and where one observation could move it.",
            shown,
            "state",
            quantity,
        )
        keys = parts.keys({f"action {action}": k for k, action in enumerate(actions)})
        figures.append(parts.figure(f"Estimated {quantity}", svg, keys + " Bars: 95 % of shifts."))
    return figures


def _ranked(found: Mapping[str, Any]) -> str:
    values = [row["influence"] for row in found["influence"] if row["influence"] is not None]
    alone = sum(bool(row["alone"]) for row in found["influence"])
    note = f"{alone} that are the only ones of their pair are left out." if alone else ""
    told = f"Influence of {len(values)} observations, ranked."
    svg = decision_plots.ranks("influence", told, np.array(values or [0.0]), "influence")
    return parts.figure("Influence of single observations", svg, note)


def _curve(found: Mapping[str, Any]) -> str:
    curve = found.get("curve")
    if not curve:
        return ""
    sizes = np.array([row["n"] for row in curve["sizes"]])
    shown, keys = [], {}
    for slot, (key, label) in enumerate(
        (("epsilon", "coupled runs"), ("saddle_shift", "exact saddle"))
    ):
        values = np.array([row[key] or np.nan for row in curve["sizes"]], dtype=np.float64)
        if (values > 0).all():
            shown.append(Power(sizes, values, slot))
            keys[label] = slot
    head = ["rows", "steps", "shift", "rows × shift", "exact", "of functions", "error"]
    names = ("n", "steps", "epsilon", "n_epsilon", "saddle_shift", "function_distance")
    rows = [
        [text.count(row["n"]), text.count(row["steps"])]
        + [text.number(row[name]) for name in (*names[2:], "optimisation_error")]
        for row in curve["sizes"]
    ]
    slopes = "; ".join(_slope_words(found))
    note = (
        "Parts of the data, one row replaced by another of the data: the shift of all parameters, "
        "coupled runs and exact. The error is the distance of a run to its own saddle: a shift far "
        f"below it says little of what longer runs would show. {escape(slopes)}."
    )
    body = parts.table(head, rows)
    if shown:
        svg = decision_plots.powers(
            "curve", f"Shift against the size of the data. {slopes}.", shown, "rows", "shift"
        )
        body = parts.grid([parts.figure("Shift against rows", svg, parts.keys(keys))]) + body
    return f'<h2>Size of the data</h2><p class="note">{note}</p>{body}'


def _setting(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key not in ("entries", "influence")}


def _most(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted(found["entries"], key=lambda entry: -entry["shift"])


def _entry(entry: Mapping[str, Any]) -> list[str]:
    low, high = entry["interval"]
    return [
        _state(entry["state"]),
        str(entry["action"]),
        text.number(entry["estimate"]),
        text.number(entry["shift"], 3),
        f"{text.number(low, 3)} to {text.number(high, 3)}",
    ]


def _row(row: Mapping[str, Any]) -> list[str]:
    influence = "alone" if row["alone"] else text.number(row["influence"], 3)
    ahead = "ended" if row["next_state"] is None else _state(row["next_state"])
    return [
        str(row["row"]),
        influence,
        _state(row["state"]),
        str(row["action"]),
        text.number(row["reward"]),
        ahead,
    ]


def _state(state: Any) -> str:
    if isinstance(state, list):
        return "(" + ", ".join(text.number(each, 3) for each in state) + ")"
    return str(state)
