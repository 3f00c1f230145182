"""How far would the answer move, had one observation been another? Measured, not bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from holdfast.bellman.draws import covered_dataset, drawer, neighbours, table_size
from holdfast.bellman.margin import stability_margin
from holdfast.bellman.mdp import TabularMDP
from holdfast.bellman.networks import Approximator, Tables
from holdfast.bellman.problem import Batch, SaddleProblem
from holdfast.bellman.sgda import Constant, Sgda, descend_ascend, harmonic
from holdfast.bellman.transitions import Transitions

Array = NDArray[np.float64]
STEP_RATIO = 4.0


@dataclass(frozen=True)
class StabilityResult:
    """Argument stability against the size of the data.

    Attributes
    ----------
    sizes : tuple of int
    distance : Array
        ``(sizes, datasets)``: ``|w - w'| + |v - v'|`` of coupled runs, mean over replaced rows.
    function_distance : Array
        ``(sizes, datasets)``: largest ``|Q - Q'|`` over the states of the data, mean over rows.
    saddle_shift : Array
        ``(sizes, datasets)``: what ``distance`` would be after infinitely many steps. NaN if the
        saddle is not known.
    optimisation_error : Array
        ``(sizes, datasets)``: distance of the run to its own saddle. A stability below the shift of
        the saddle beside a large error here means that nothing was learned yet.
    control : float
        Largest distance between two runs on the same data; 0 bit for bit if runs are coupled.
    slope, interval : float and pair of float
        Of ``log distance`` against ``log size``, with a 95 % interval from a bootstrap over data
        sets.
    saddle_slope, saddle_interval : float and pair of float
        The same of ``saddle_shift``.
    rejected : tuple of int
        Data sets drawn again for each size, since some pair occurred fewer than three times.
    steps : tuple of int
        For each size.
    """

    sizes: tuple[int, ...]
    distance: Array
    function_distance: Array
    saddle_shift: Array
    optimisation_error: Array
    control: float
    slope: float
    interval: tuple[float, float]
    saddle_slope: float
    saddle_interval: tuple[float, float]
    rejected: tuple[int, ...]
    steps: tuple[int, ...]

    @property
    def epsilon(self) -> Array:
        """Mean distance for each size, ``(sizes,)``."""
        return self.distance.mean(1)

    def table(self) -> list[dict[str, float]]:
        """A row a size: ``n``, ``steps``, ``epsilon``, ``n * epsilon``, shift, error, rejected."""
        return [
            {
                "n": n,
                "steps": self.steps[i],
                "epsilon": float(self.distance[i].mean()),
                "n_epsilon": float(n * self.distance[i].mean()),
                "function_distance": float(self.function_distance[i].mean()),
                "saddle_shift": float(self.saddle_shift[i].mean()),
                "optimisation_error": float(self.optimisation_error[i].mean()),
                "rejected": self.rejected[i],
            }
            for i, n in enumerate(self.sizes)
        ]


def measure_stability(
    source: TabularMDP | Transitions,
    *,
    discount: float | None = None,
    sizes: Sequence[int] = (64, 128, 256, 512),
    datasets: int = 6,
    replaced: int = 8,
    passes: float = 10.0,
    max_steps: int = 60_000,
    settings: Sgda | None = None,
    approximator: Approximator | None = None,
    anchor_action: int | None = None,
    weight: float = 1.0,
    coupled: bool = True,
    seed: int = 0,
) -> StabilityResult:
    """Replace one row, run again with everything else alike, and see how far the result moved.

    The on-average argument stability of Kang and Jang, definition 3: for data ``D`` and ``D^(i)``,
    whose row ``i`` is an independent draw from the same law, ``|w - w'| + |v - v'|`` of two runs
    with one start and one order of rows. All runs of a size are one batch.

    Parameters
    ----------
    source : TabularMDP or Transitions
        What data are drawn from: a model (choices at random; those of the soft-optimal policy with
        an anchor), or a user's own rows: each data set takes some, and replacements are others.
    discount : float, optional
        In [0, 1). By default that of the model.
    sizes : sequence of int
        At least two.
    datasets, replaced : int
        Data sets for each size, and rows replaced in each.
    passes : float
        Steps times rows a step, in units of ``n``.
    max_steps : int
        At most.
    settings : Sgda, optional
        ``steps`` is set by ``passes``. By default single rows and harmonic steps from the margin.
    approximator : Approximator, optional
        By default tables.
    anchor_action, weight
        As of :class:`SaddleProblem`, for inverse problems.
    coupled : bool
        False is a negative control: every run visits rows in its own order.
    seed : int
        The whole measurement is a function of it.

    Raises
    ------
    ValueError
        For sizes that do not fit, or data in which some pair stays too rare.
    TrainingError
        If the setting leaves the saddle.
    """
    if len(set(sizes)) < 2 or min(sizes) < 2:
        raise ValueError(f"sizes is {tuple(sizes)}: a slope needs two or more different ones")
    if datasets < 2 or replaced < 1:
        raise ValueError(f"datasets is {datasets} and replaced {replaced}: at least 2, and 1")
    if discount is None:
        if not isinstance(source, TabularMDP):
            raise ValueError("discount must be given with transitions")
        discount = source.discount
    draw = drawer(source, max(sizes), anchor_action)
    rng = np.random.default_rng(seed)
    sizes = tuple(sorted(set(sizes)))
    outcomes, rejected, steps = [], [], []
    for n in sizes:
        drawn = [covered_dataset(draw, n, approximator, source, rng) for _ in range(datasets)]
        rejected.append(sum(tries for _, _, tries in drawn))
        families = [neighbours(data, spare, replaced, rng) for data, spare, _ in drawn]
        problem = _problem(families[0][0], source, discount, approximator, anchor_action, weight)
        chosen = planned(settings or default_settings(problem), n, passes, max_steps)
        steps.append(chosen.steps)
        run_seed = int(rng.integers(2**31))
        outcomes.append(_measure(problem, families, chosen, run_seed, coupled))
    columns = [np.array([outcome[k] for outcome in outcomes]) for k in range(5)]
    distance, function, shift, error, control = columns
    slope, interval = fit_slope(sizes, distance, rng)
    saddle_slope, saddle_interval = fit_slope(sizes, shift, rng)
    return StabilityResult(
        sizes,
        distance,
        function,
        shift,
        error,
        float(control.max()),
        slope,
        interval,
        saddle_slope,
        saddle_interval,
        tuple(rejected),
        tuple(steps),
    )


def measure_controls(
    source: TabularMDP | Transitions, settings: Sgda, **options: Any
) -> dict[str, StabilityResult]:
    """The measurement beside those that must not look like it.

    Parameters
    ----------
    source, options
        As of :func:`measure_stability`.
    settings : Sgda
        Of the measurement itself.

    Returns
    -------
    dict
        ``measured``; ``own order``: runs are not coupled, so noise drowns the replaced row;
        ``constant step``: noise never dies away, and the optimisation error stays; ``common step``:
        one step for both players, which leaves the saddle where the discount is near 1 (distances
        then explode, beyond numbers in the end).
    """
    changes: dict[str, dict[str, Any]] = {
        "measured": {},
        "own order": {"coupled": False},
        "constant step": {"settings": replace(settings, step=Constant(settings.step(0)))},
        "common step": {"settings": replace(settings, step_ratio=1.0)},
    }
    return {
        name: measure_stability(source, **({"settings": settings} | options | change))
        for name, change in changes.items()
    }


def fit_slope(
    sizes: Sequence[int], values: Array, rng: np.random.Generator, draws: int = 1000
) -> tuple[float, tuple[float, float]]:
    """Slope of log mean values on log size, with a 95 % interval over data sets.

    ``values`` is ``(sizes, datasets)``; data sets are resampled within each size. NaN if a mean
    is not positive, as where everything is the same.
    """
    logs = np.log(np.asarray(sizes, dtype=np.float64))
    centred = logs - logs.mean()

    def slope(means: Array) -> Array:
        positive = np.where(means > 0, means, np.nan)
        return np.log(positive) @ centred / (centred @ centred)

    index = rng.integers(values.shape[1], size=(draws, *values.shape))
    resampled = np.take_along_axis(values[None], index, axis=2).mean(2)
    low, high = np.quantile(slope(resampled), [0.025, 0.975])
    return float(slope(values.mean(1))), (float(low), float(high))


def _problem(
    data: Transitions,
    source: TabularMDP | Transitions,
    discount: float,
    approximator: Approximator | None,
    anchor_action: int | None,
    weight: float,
) -> SaddleProblem:
    return SaddleProblem(
        data, discount, approximator or Tables(*table_size(source)), anchor_action, weight
    )


def default_settings(problem: SaddleProblem) -> Sgda:
    """Single rows and harmonic steps that suit the problem; ``steps`` is for the caller to set."""
    margin = stability_margin(problem, STEP_RATIO)
    margin.check()
    step = harmonic(problem.discount, STEP_RATIO, margin.margin)
    return Sgda(steps=1, step=step, step_ratio=STEP_RATIO)


def planned(settings: Sgda, n: int, passes: float, max_steps: int) -> Sgda:
    """The settings with as many steps as visit ``passes * n`` rows, or ``max_steps``."""
    steps = int(passes * n / (settings.batch_size or n))
    return replace(settings, steps=max(1, min(max_steps, steps)))


def _measure(
    problem: SaddleProblem,
    families: Sequence[Sequence[Transitions]],
    settings: Sgda,
    seed: int,
    coupled: bool,
) -> tuple[Array, Array, Array, Array, float]:
    """Distances of one size: argument, function, saddle, error ``(datasets,)``, and control."""
    members = [each for family in families for each in family]
    width = len(families[0])
    groups = [i // width if coupled else i for i in range(len(members))]
    data = Batch.stack(members)
    found = descend_ascend(problem, data, settings, seed=seed, groups=groups, may_diverge=True)
    shape = (len(families), width, -1)
    primal, dual = found.primal.reshape(shape), found.dual.reshape(shape)

    def apart(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(first - second, dim=-1)

    distance = apart(primal, primal[:, :1]) + apart(dual, dual[:, :1])
    states = data.state.reshape(len(families), width, *data.state.shape[1:])[:, :1]
    probe = states.expand(-1, width, *states.shape[2:]).flatten(0, 1)
    with torch.no_grad():
        q = problem.approximator.q(found.primal, probe).reshape(shape)
    function = (q - q[:, :1]).abs().amax(-1)
    shift = np.full(len(families), np.nan)
    error = np.full(len(families), np.nan)
    if isinstance(problem.approximator, Tables):
        saddles = [
            [np.stack([x.ravel() for x in problem.with_transitions(each).exact()]) for each in row]
            for row in families
        ]
        exact = np.array(saddles)
        shift = np.linalg.norm(exact[:, 2:] - exact[:, :1], axis=-1).sum(-1).mean(-1)
        ended = np.stack([primal[:, 0].numpy(), dual[:, 0].numpy()], axis=1)
        error = np.linalg.norm(ended - exact[:, 0], axis=-1).sum(-1)
    return (
        distance[:, 2:].mean(1).numpy(),
        function[:, 2:].mean(1).numpy(),
        shift,
        error,
        float(distance[:, 1].max()),
    )
