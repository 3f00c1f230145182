"""Prints the study as tables: ``python -m benchmarks.in_ril.table``.

One table for the tasks on which everything ran, one for imitation beside reinforcement by policy
and task, and the gains of all Meta-World tasks together, which four seeds of one cannot tell.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.in_ril.analysis import HERE, gains, groups_of, middle
from benchmarks.in_ril.study import POLICIES
from benchmarks.in_ril.tasks import TASKS, Task

Rows = Mapping[str, Mapping[str, Any]]
TOGETHER = ("alternate", "surgery")
"""How reinforcement is compared with interleaving by policy."""


def figure(row: Mapping[str, Any], name: str, digits: int) -> str:
    """A figure and its interval; nothing where it is not known."""
    if name not in row:
        return ""
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]".replace("-", "−")


def lines(rows: Rows, digits: int, *, before: str = "", after: str = "") -> Iterator[str]:
    """A line of a table for every group."""
    for group, row in rows.items():
        own = group.endswith("/rl")
        match row.get("steps_to_rl_final"), row.get("share_of_rl_steps"):
            case None, _:
                steps = "never"
            case 0.0, _:
                steps = "from the start"
            case _, None:  # The middle curve of RL alone stays below its own final level.
                steps = "not known"
            case _, share:
                steps = f"{share:.2f}"
        cells = [
            f"{before}{group}{after}",
            str(row["seeds"]),
            f"{row['start']:.{digits}f}",
            figure(row, "final", digits),
            "" if own else figure(row, "over_rl", digits),
            "" if own else steps,
            f"{row['collapse_rate']:.2f}",
            f"{row['imitation_start']:.2f}, {row['imitation']:.2f}",
        ]
        yield "| " + " | ".join(cells) + " |"


def stratified(strata: list[NDArray[np.float64]], resamples: int = 2000) -> dict[str, Any]:
    """Interquartile mean of all gains together; seeds are drawn within each task."""
    generator = np.random.default_rng(0)
    draws = [
        float(middle(np.concatenate([generator.choice(s, len(s)) for s in strata])))
        for _ in range(resamples)
    ]
    return {
        "gain": float(middle(np.concatenate(strata))),
        "gain_interval": [float(v) for v in np.percentile(draws, [2.5, 97.5])],
    }


def pooled(found: Mapping[str, Mapping[str, Any]], tasks: Iterable[Task]) -> Iterator[str]:
    """A line for every policy: gains of interleaving over reinforcement alone."""
    for policy in POLICIES[1:]:
        strata = []
        for task in tasks:
            cells = found[task.name]["cells"] if task.name in found else {}
            for group in groups_of(cells, task):
                if group[0] == policy and group[1] in TOGETHER:
                    strata.append(gains(cells, task, *group))
        if strata:
            runs = sum(map(len, strata))
            text = figure(stratified(strata), "gain", 2)
            yield f"| {policy} | {len(strata)} | {runs} | {text} |"


def main() -> None:
    paths = {name: HERE / f"{name}.json" for name in TASKS}
    found = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name, path in paths.items()
        if path.exists()
    }
    columns = "seeds | start | final | over RL alone | share of its steps | collapsed | imitation"
    for name, content in found.items():
        if TASKS[name].whole:
            print(f"\n{name}\n\n| method | {columns} |\n|---|---|---|---|---|---|---|---|")
            print(*lines(content["summary"].get("groups", {}), 2), sep="\n")
            highest = content["summary"].get("at_highest_rate", {"rate": 0.0, "groups": {}})
            after = f" at {highest['rate']:g}"
            print(*lines(highest["groups"], 2, after=after), sep="\n")
    print(f"\n| task | method | {columns} |\n|---|---|---|---|---|---|---|---|---|")
    for name, content in found.items():
        if not TASKS[name].whole:
            digits = 2 if TASKS[name].sparse else 0
            groups = content["summary"].get("groups", {})
            print(*lines(groups, digits, before=f"{name} | "), sep="\n")
    print("\n| policy | Meta-World tasks | pairs | over RL alone |\n|---|---|---|---|")
    manipulation = [task for task in TASKS.values() if task.environment.startswith("metaworld/")]
    print(*pooled(found, manipulation), sep="\n")


if __name__ == "__main__":
    main()
