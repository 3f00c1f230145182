"""The stability envelope: learning rates over four decades, methods, and guards on them.

``python -m benchmarks.envelope.run [--jobs 2] [--minutes 60]``. Finished cells are kept in
``results.json`` and not run again; stop it at any time and start it again. ``--plot`` only draws
what is there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one run a core, one thread a run

from benchmarks.arithmetic.prepare import base
from benchmarks.arithmetic.run import run_cell
from benchmarks.arithmetic.study import GROUP, ROLLOUTS
from benchmarks.envelope import study
from benchmarks.envelope.analysis import analyse, chosen_options, edges, table
from benchmarks.envelope.study import Cell
from benchmarks.pool import arguments, run_jobs
from benchmarks.results import Results

HERE = Path(__file__).parent
PICTURE = HERE.parent.parent / "docs" / "stability_envelope.png"
SETTINGS = {
    "samples": study.SAMPLES,
    "rollouts": ROLLOUTS,
    "group": GROUP,
    "inner": study.INNER,
    "learning_rates": study.LEARNING_RATES,
    "methods": study.METHODS,
    "options": study.OPTIONS,
}
ABOUT = {
    "command": "python -m benchmarks.envelope.run",
    "seeds": {"methods": len(study.ALL), "guards": len(study.SOME), "edges": len(study.ALL)},
    "budget": "the same number of completions for every run; one torch thread",
}


def run_cells(results: Results, cells: Iterable[Cell], workers: int, deadline: float) -> bool:
    """Run what is missing. ``False``: time ran out."""
    jobs = {cell.key: cell for cell in cells}
    return run_jobs(results, jobs, run_cell, _told, workers=workers, deadline=deadline)


def _told(values: dict[str, Any]) -> str:
    return (
        f"{values['validation'][-1]:.2f} of {max(values['validation']):.2f}, {values['seconds']} s"
    )


def run_all(results: Results, workers: int, deadline: float) -> None:
    """Everything, in the order in which it is needed."""
    cells = results.content["cells"]
    if not run_cells(results, study.tuning(), workers, deadline):
        return
    options = chosen_options(cells)
    for wanted in (study.crossed(options), study.alone()):
        if not run_cells(results, wanted, workers, deadline):
            return
    run_cells(results, edges(cells, options), workers, deadline)


def main() -> None:
    parser = arguments(__doc__)
    options = parser.parse_args()
    results = Results(HERE / "results.json", SETTINGS, ABOUT, options.fresh)
    if not options.plot:
        base()
        run_all(results, options.jobs, time.monotonic() + 60 * options.minutes)
    summary = analyse(results.content["cells"], PICTURE)
    results.finish(summary)
    print(table(summary))


if __name__ == "__main__":
    main()
