"""Soft value iteration on a sparse model, alone in a process: ``python -m ... STATES DISCOUNT``."""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

from benchmarks.cost.worker import resident_bytes
from holdfast.bellman import TabularMDP

ACTIONS, SUCCESSORS = 4, 5


def measure(states: int, discount: float) -> dict[str, Any]:
    before = resident_bytes()
    started = time.process_time()
    model = TabularMDP.random(states, ACTIONS, discount, seed=0, successors=SUCCESSORS)
    built = time.process_time() - started
    entry: dict[str, Any] = {
        "entries": int(model.kernel.nnz),
        "kernel MB": (model.kernel.data.nbytes + model.kernel.indices.nbytes) / 1e6,
        "build seconds": built,
    }
    for name, solve in (
        ("value iteration", model.soft_value_iteration),
        ("policy iteration", model.soft_policy_iteration),
    ):
        started = time.process_time()
        found = solve(1e-10)
        seconds = time.process_time() - started
        entry[name] = {
            "seconds": seconds,
            "iterations": found.iterations,
            "residual": found.residual,
        }
        # Linux counts in KiB. The peak never falls, so the first solver's comes first.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        entry[name]["extra MB"] = (peak - before) / 1e6
    return entry


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), float(sys.argv[2]))))
