"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from holdfast.report import text
from holdfast.report.read import read_run, read_runs
from holdfast.report.runs import EMPTY, all_objectives, labels, relative_change


def summary_table(run: Path) -> Table:
    """One run: a row for each objective; ideal distance, time and peak memory in the caption.

    Raises
    ------
    RunError
        If ``run`` is not a run directory.
    """
    found = read_run(run)
    caption = " · ".join(
        [
            f"ideal distance {text.number(found.ideal_distance)}",
            f"{text.count(found.steps)} steps in {text.duration(found.wall_seconds)}",
            f"peak memory {text.size(found.peak_memory)}",
        ]
    )
    table = _table(f"{escape(found.name)} ({escape(found.status)})", caption)
    for column in ("objective", "updates", "held-out, first", "last", "optimum", "gap"):
        _column(table, column)
    for name in found.objectives:
        held_out = found.held_out.get(name, EMPTY)
        table.add_row(
            escape(name),
            text.count(found.updates(name)),
            text.number(held_out.first),
            text.number(held_out.last),
            text.number(found.optimum(name)),
            text.number(found.gap(name)),
        )
    return table


def comparison_table(runs: Sequence[Path]) -> Table:
    """Several runs, a row for each; time and memory also relative to the first.

    Raises
    ------
    RunError
        If there are no ``runs`` or one is not a run directory.
    """
    found = read_runs(runs)
    objectives = all_objectives(found)
    table = _table(None, "held-out loss (gap to the optimum) at the last evaluation")
    names = [escape(name) for name in objectives]
    for column in ("run", "ideal\ndistance", *names, "steps", "time", "peak\nmemory"):
        _column(table, column)
    for name, run in zip(labels(found), found, strict=True):
        time = relative_change(run.wall_seconds, found[0].wall_seconds)
        memory = relative_change(run.peak_memory, found[0].peak_memory)
        table.add_row(
            escape(name) + ("" if run.status == "finished" else f"\n({escape(run.status)})"),
            text.number(run.ideal_distance),
            *(
                f"{text.number(run.held_out.get(objective, EMPTY).last)}\n"
                f"({text.number(run.gap(objective), 3)})"
                for objective in objectives
            ),
            text.count(run.steps),
            text.duration(run.wall_seconds) + _change(time, run is found[0]),
            text.size(run.peak_memory) + _change(memory, run is found[0]),
        )
    return table


def _change(value: float | None, first: bool) -> str:
    return "" if value is None or first else f"\n({text.percent(value, signed=True)})"


def _table(title: str | None, caption: str) -> Table:
    return Table(
        box=SIMPLE_HEAD, title=title, caption=caption, title_justify="left", caption_justify="left"
    )


def _column(table: Table, name: str) -> None:
    left = not table.columns
    table.add_column(name, justify="left" if left else "right", overflow="fold")
