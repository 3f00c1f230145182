"""Coupled runs on data sets that differ in one row, looked at after several numbers of steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.bellman_stability import bed
from holdfast.bellman import Constant, Harmonic, SaddleProblem, Sgda
from holdfast.bellman.draws import covered_dataset, drawer, neighbours
from holdfast.bellman.problem import Batch
from holdfast.bellman.sgda import descend_ascend


@dataclass(frozen=True)
class Setting:
    """One line of the study.

    Attributes
    ----------
    discount, ratio : float
    scale : float
        c1 of harmonic steps c1 / (c2 + t); or, with ``constant``, the step itself.
    constant, coupled : bool
    models : int
        Different models; data sets are spread over them evenly.
    cap : int
        Bound on the third number of steps; 0 leaves it out.
    """

    discount: float = bed.DISCOUNT
    ratio: float = 1.0
    scale: float = bed.SCALE
    constant: bool = False
    coupled: bool = True
    models: int = 1
    cap: int = 0

    def step(self) -> Callable[[int], float]:
        if self.constant:
            return Constant(self.scale)
        return Harmonic(self.scale, bed.offset(bed.model(self.discount), self.scale, self.ratio))

    def marks(self, n: int) -> dict[str, int]:
        """Numbers of steps by name."""
        named = {"n": n, "10n": 10 * n}
        return named | ({"n2": min(n * n // 4, self.cap)} if self.cap else {})


def measure(setting: Setting, n: int, datasets: int, replaced: int, seed: int) -> dict[str, Any]:
    """Everything at one size; all runs are one batch.

    Returns
    -------
    dict
        By mark, means over replaced rows for each data set: ``distance`` (``|w - w'| + |v - v'|``),
        ``error`` (of the run from its own saddle), ``same`` (share of distances that are exactly
        0). ``shift``: the same distance between exact saddles; ``same_shift``: share of 0. Also
        ``control`` (the largest distance between two runs on the same data), ``rejected``,
        ``least_count``.
    """
    rng = np.random.default_rng([seed, n])
    sources = [bed.model(setting.discount, seed=i) for i in range(setting.models)]
    draws = [drawer(source, n, None) for source in sources]
    families, rejected, counts = [], 0, []
    for i in range(datasets):
        which = i % setting.models
        data, spare, tries = covered_dataset(draws[which], n, None, sources[which], rng)
        rejected += tries
        counts.append(int(data.counts(bed.STATES, bed.ACTIONS).min()))
        families.append(neighbours(data, spare, replaced, rng))
    size = {"states": bed.STATES, "actions": bed.ACTIONS}
    problem = SaddleProblem.tabular(families[0][0], setting.discount, **size)
    members = [member for family in families for member in family]
    width = 2 + replaced
    groups = [i // width if setting.coupled else i for i in range(len(members))]
    marks = setting.marks(n)
    found = descend_ascend(
        problem,
        Batch.stack(members),
        Sgda(steps=max(marks.values()), step=setting.step(), step_ratio=setting.ratio),
        seed=int(rng.integers(2**31)),
        groups=groups,
        record=sorted(set(marks.values())),
        may_diverge=True,
    )
    exact = torch.as_tensor(
        np.array(
            [[x.ravel() for x in problem.with_transitions(each).exact()] for each in members]
        ).reshape(datasets, width, 2, -1)
    )
    shift = _apart(exact, exact[:, :1])[:, 2:]
    outcome: dict[str, Any] = {
        "marks": marks,
        "shift": _rounded(shift.mean(1)),
        "same_shift": float((shift == 0).double().mean()),
        "rejected": rejected,
        "least_count": min(counts),
        "control": 0.0,
    }
    for name, t in marks.items():
        point = torch.stack(found.record[t], 1).reshape(datasets, width, 2, -1)
        distance = _apart(point, point[:, :1])
        outcome["control"] = max(outcome["control"], _finite(distance[:, 1].max()))
        outcome[name] = {
            "distance": _rounded(distance[:, 2:].mean(1)),
            "error": _rounded(_apart(point[:, 0], exact[:, 0])),
            "same": float((distance[:, 2:] == 0).double().mean()),
        }
    return outcome


def _apart(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """``|w - w'| + |v - v'|`` over the last two dimensions."""
    return torch.linalg.vector_norm(first - second, dim=-1).sum(-1)


def _finite(value: torch.Tensor) -> float:
    return float(torch.nan_to_num(value, nan=1e300, posinf=1e300))


def _rounded(values: torch.Tensor) -> list[float]:
    return [float(f"{_finite(x):.6g}") for x in values]
