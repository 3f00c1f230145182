"""The simulated bus engines of GLADIUS: how far off are recovered rewards?

``python -m benchmarks.simulated_bus.run [--jobs 1] [--minutes 60]``. Finished cells are kept in
``results.json`` and not run again. ``--plot`` only draws what is there.
"""

from __future__ import annotations

import os
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one run a core, one thread a run

from benchmarks.pool import arguments, run_jobs
from benchmarks.results import Results
from benchmarks.simulated_bus import study
from benchmarks.simulated_bus.analysis import HERE, analyse, draw, table

SETTINGS = {
    "sizes": study.SIZES,
    "dummies": study.DUMMIES,
    "hidden": study.HIDDEN,
    "steps": study.STEPS,
    "batch": study.BATCH,
    "grids": study.GRIDS,
}
ABOUT = {
    "command": "python -m benchmarks.simulated_bus.run",
    "seeds": {"tuning": len(study.TUNING_SEEDS), "compared": len(study.SEEDS)},
    "budget": "three quarters of an hour of one core",
}


def run_cells(results: Results, cells: Any, workers: int, deadline: float) -> bool:
    """Run what is missing. ``False``: time ran out."""
    jobs = {cell.key: cell for cell in cells}
    return run_jobs(results, jobs, study.run_cell, _told, workers=workers, deadline=deadline)


def _told(values: dict[str, float]) -> str:
    return f"{values['error']:.2f} % in {values['seconds']:.1f} s"


def main() -> None:
    parser = arguments(__doc__, jobs=1)
    options = parser.parse_args()
    results = Results(HERE / "results.json", SETTINGS, ABOUT, options.fresh)
    cells = results.content["cells"]
    deadline = time.monotonic() + 60 * options.minutes
    if not options.plot:
        if not run_cells(results, study.tuning(), options.jobs, deadline):
            raise SystemExit("Time is up; start again to go on.")
        run_cells(results, study.evaluation(study.chosen_settings(cells)), options.jobs, deadline)
    summary = analyse(cells)
    results.finish(summary)
    print(table(summary))
    draw(summary)


if __name__ == "__main__":
    main()
