"""Holdfast's side of the race: ``python -m benchmarks.bellman.worker BATCH``."""

from __future__ import annotations

import sys

import numpy as np
import torch

from benchmarks.bellman.race import (
    ACTIONS,
    DISCOUNT,
    FEATURES,
    HIDDEN,
    ROWS,
    UPDATES,
    report_blocks,
    standard_output,
)
from holdfast.bellman import Constant, Networks, SaddleProblem, Sgda, Transitions, mlp
from holdfast.bellman.problem import Batch
from holdfast.bellman.sgda import descend_ascend


def main() -> None:
    report = standard_output()
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    data = Transitions(
        random.normal(size=(ROWS, FEATURES)),
        random.integers(ACTIONS, size=ROWS),
        random.normal(size=ROWS),
        random.normal(size=(ROWS, FEATURES)),
    )
    q, zeta = (mlp(FEATURES, HIDDEN, ACTIONS, seed=number) for number in range(2))
    problem = SaddleProblem(data, DISCOUNT, Networks(q, zeta, dtype=torch.float32))
    settings = Sgda(
        steps=UPDATES, step=Constant(1e-4), batch_size=int(sys.argv[1]), optimiser="adam"
    )
    rows = Batch.stack([data])
    place = problem.approximator.initial()

    def block() -> None:
        nonlocal place
        found = descend_ascend(problem, rows, settings, start=place)
        place = found.primal[0], found.dual[0]

    report_blocks(report, {"sampled": block})


if __name__ == "__main__":
    main()
