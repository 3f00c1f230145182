"""Cells that are missing are run once, and kept."""

import json
import time

from benchmarks.pool import run_jobs
from benchmarks.results import Results


def square(number: int) -> dict:
    return {"square": number * number}


def run(results: Results, deadline: float) -> bool:
    jobs = {f"cell {n}": n for n in range(5)}
    return run_jobs(results, jobs, square, str, workers=2, deadline=deadline)


def test_only_missing_cells_are_run_and_all_are_kept(tmp_path, capfd):
    results = Results(tmp_path / "results.json", {}, {})
    results.cell("cell 3", lambda: {"square": "known"})
    assert run(results, time.monotonic() + 600)
    kept = json.loads((tmp_path / "results.json").read_text())["cells"]
    expected = {f"cell {n}": {"square": n * n} for n in range(5)}
    assert kept == expected | {"cell 3": {"square": "known"}}
    assert capfd.readouterr().out.count("/4 ") == 4


def test_no_cell_is_begun_after_the_deadline(tmp_path):
    results = Results(tmp_path / "results.json", {}, {})
    assert not run(results, time.monotonic() - 1)
    assert results.content["cells"] == {}
