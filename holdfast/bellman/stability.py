"""How far would the answer move, had one observation been another? Measured, not bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t as student

from holdfast.bellman.draws import covered_dataset, drawer, neighbours, table_size
from holdfast.bellman.margin import saddle_point, stability_margin
from holdfast.bellman.mdp import TabularMDP
from holdfast.bellman.networks import Approximator, Linear, Tables
from holdfast.bellman.problem import Batch, SaddleProblem
from holdfast.bellman.sgda import (
    CERTIFIED_SIZE,
    DIVERGED,
    Constant,
    Harmonic,
    Sgda,
    descend_ascend,
    harmonic,
    level_start,
    row_curvature,
)
from holdfast.bellman.transitions import Transitions
from holdfast.errors import TrainingError

Array = NDArray[np.float64]
STEP_RATIO = 4.0
FORGOTTEN = 30.0
"""Steps, in units of the offset of the default's, that leave 0.1 % of the error of a start."""


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
        ``(sizes, datasets)``: what ``distance`` would be after infinitely many steps. NaN for
        networks, whose saddle is not known.
    optimisation_error : Array
        ``(sizes, datasets)``: distance of the run to its own saddle. A stability below the shift of
        the saddle beside a large error here means that nothing was learned yet.
    control : float
        Largest distance between two runs on the same data; 0 bit for bit if runs are coupled.
    slope, interval : float and pair of float
        Of ``log distance`` against ``log size``, with a 95 % interval from a bootstrap over data
        sets: see :func:`fit_slope`.
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
    source: TabularMDP | Transitions | SaddleProblem,
    *,
    discount: float | None = None,
    sizes: Sequence[int] = (64, 128, 256, 512),
    datasets: int = 12,
    replaced: int = 8,
    passes: float = 10.0,
    max_steps: int = 20_000,
    settings: Sgda | None = None,
    approximator: Approximator | None = None,
    anchor_action: int | NDArray[np.int64] | None = None,
    weight: float = 1.0,
    coupled: bool = True,
    may_diverge: bool = False,
    seed: int = 0,
) -> StabilityResult:
    """Replace one row, run again with everything else alike, and see how far the result moved.

    The on-average argument stability of Kang and Jang, definition 3: for data ``D`` and ``D^(i)``,
    whose row ``i`` is an independent draw from the same law, ``|w - w'| + |v - v'|`` of two runs
    with one start and one order of rows. All runs of a size are one batch.

    Parameters
    ----------
    source : TabularMDP, Transitions or SaddleProblem
        What data are drawn from: a model (choices at random; those of the soft-optimal policy with
        an anchor), or a user's own rows: each data set takes some, and replacements are others. A
        problem gives its rows, and its discount, functions, anchor and weight for those below.
    discount : float, optional
        In [0, 1). By default that of the model.
    sizes : sequence of int
        At least two.
    datasets, replaced : int
        Data sets for each size, and rows replaced in each.
    passes : float
        Steps times rows a step, in units of ``n``. Without ``settings``, small data get more of
        them, until the start is all but forgotten.
    max_steps : int
        At most.
    settings : Sgda, optional
        ``steps`` is set by ``passes``. By default single rows and harmonic steps from the margin,
        tables starting level (:func:`~holdfast.bellman.sgda.level_start`, from further rows);
        networks, which have no margin, need them.
    approximator : Approximator, optional
        By default tables.
    anchor_action, weight
        As of :class:`SaddleProblem`, for inverse problems.
    coupled : bool
        False is a negative control: every run visits rows in its own order.
    may_diverge : bool
        True is for negative controls too: distances may leave the finite numbers, and slopes with
        them.
    seed : int
        The whole measurement is a function of it.

    Raises
    ------
    ValueError
        For sizes that do not fit, observations without an approximator, or networks without
        settings; a ``CoverageError`` for data in which some pair stays too rare.
    TrainingError
        If the setting leaves the saddle, or a run diverged, with its size and what to change.
    """
    if len(set(sizes)) < 2 or min(sizes) < 2:
        raise ValueError(f"sizes is {tuple(sizes)}: a slope needs two or more different ones")
    if datasets < 2 or replaced < 1:
        raise ValueError(f"datasets is {datasets} and replaced {replaced}: at least 2, and 1")
    if isinstance(source, SaddleProblem):
        discount, approximator = source.discount, source.approximator
        anchor_action, weight = source.anchor_action, source.weight
        source = source.transitions
    if discount is None:
        if not isinstance(source, TabularMDP):
            raise ValueError("discount must be given with transitions")
        discount = source.discount
    draw = drawer(source, max(sizes), anchor_action)
    rng = np.random.default_rng(seed)
    sizes = tuple(sorted(set(sizes)))
    outcomes, rejected, steps = [], [], []
    start = None
    for n in sizes:
        drawn = [covered_dataset(draw, n, approximator, source, rng) for _ in range(datasets)]
        rejected.append(sum(tries for _, _, tries in drawn))
        families = [neighbours(data, spare, replaced, rng) for data, spare, _ in drawn]
        problem = _problem(families[0][0], source, discount, approximator, anchor_action, weight)
        if settings is None:
            chosen = default_settings(problem)
            assert isinstance(chosen.step, Harmonic)
            chosen = planned(chosen, n, max(passes, FORGOTTEN * chosen.step.offset / n), max_steps)
            if start is None and isinstance(problem.approximator, Tables):
                further, _ = draw(max(sizes), np.random.default_rng([seed, 1]))
                start = level_start(problem.with_transitions(further))
        else:
            if not may_diverge:
                check_settings(problem, settings)
            chosen = planned(settings, n, passes, max_steps)
        steps.append(chosen.steps)
        run_seed = int(rng.integers(2**31))
        outcome = _measure(problem, families, chosen, run_seed, coupled, start)
        if not (may_diverge or outcome[-1]):
            raise TrainingError(
                f"runs on {n} rows diverged within {chosen.steps} steps, so their distance means "
                f"nothing: give settings with smaller steps, a larger step_ratio (it is "
                f"{chosen.step_ratio:g}) or a radius."
            )
        outcomes.append(outcome)
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
    source: TabularMDP | Transitions | SaddleProblem, settings: Sgda, **options: Any
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
    given = {"settings": settings} | options
    return {
        name: measure_stability(source, may_diverge=name != "measured", **(given | change))
        for name, change in changes.items()
    }


def fit_slope(
    sizes: Sequence[int], values: Array, rng: np.random.Generator, draws: int = 1000
) -> tuple[float, tuple[float, float]]:
    """Slope of log mean values on log size, with a 95 % interval over data sets.

    ``values`` is ``(sizes, datasets)``; data sets are resampled within each size. NaN if a mean
    is not positive, as where everything is the same.

    A bootstrap of ``k`` data sets has the spread of ``k`` deviations about their own mean, and
    normal tails: with six, its intervals of nominally 95 % hold the slope in 89 to 91 % of cases
    (simulated, log-normal values). So the interval is widened about the slope by ``sqrt(k / (k -
    1))`` and by the quantile of Student's distribution over the normal one, its degrees of freedom
    those of the slope's variance (Satterthwaite); it then holds it in 94 to 95 %, down to four.
    """
    count = values.shape[1]
    logs = np.log(np.asarray(sizes, dtype=np.float64))
    centred = logs - logs.mean()

    def slope(means: Array) -> Array:
        positive = np.where(means > 0, means, np.nan)
        return np.log(positive) @ centred / (centred @ centred)

    found = float(slope(values.mean(1)))
    index = rng.integers(count, size=(draws, *values.shape))
    resampled = np.take_along_axis(values[None], index, axis=2).mean(2)
    ends = np.quantile(slope(resampled), [0.025, 0.975])
    means = values.mean(1)
    parts = (centred / np.where(means > 0, means, np.nan)) ** 2 * values.var(1)
    squares = float((parts**2).sum())
    freedom = (count - 1) * (float(parts.sum()) ** 2 / squares if squares > 0 else 1.0)
    wider = np.sqrt(count / (count - 1)) * student.ppf(0.975, freedom) / student.ppf(0.975, np.inf)
    low, high = found + wider * (ends - found)
    return found, (float(low), float(high))


def _problem(
    data: Transitions,
    source: TabularMDP | Transitions,
    discount: float,
    approximator: Approximator | None,
    anchor_action: int | NDArray[np.int64] | None,
    weight: float,
) -> SaddleProblem:
    return SaddleProblem(
        data, discount, approximator or Tables(*table_size(source)), anchor_action, weight
    )


def default_settings(problem: SaddleProblem) -> Sgda:
    """Single rows and harmonic steps that suit the problem; ``steps`` is for the caller to set."""
    if not isinstance(problem.approximator, Tables | Linear):
        raise ValueError(
            "settings must be given for networks, whose saddle is not known: for instance "
            "Sgda(steps=1, step=Constant(0.001), batch_size=32, optimiser='adam')"
        )
    margin = stability_margin(problem, STEP_RATIO)
    margin.check()
    step = harmonic(
        problem.discount, STEP_RATIO, margin.margin, curvature=row_curvature(problem, STEP_RATIO)
    )
    return Sgda(steps=1, step=step, step_ratio=STEP_RATIO)


def check_settings(problem: SaddleProblem, settings: Sgda) -> None:
    """Refuse a ratio with which plain steps leave the saddle, for up to 400 parameters.

    Where that is slow, runs end before any number tells that they are on their way out.

    Raises
    ------
    TrainingError
        With the reason, and a ratio that works.
    """
    functions = problem.approximator
    if not isinstance(functions, Tables | Linear):
        return
    if sum(each.numel() for each in functions.initial()) <= CERTIFIED_SIZE:
        stability_margin(problem, settings.step_ratio).check()


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
    start: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[Array, Array, Array, Array, float, bool]:
    """Distances of one size: argument, function, saddle, error ``(datasets,)``, and control.

    The last says whether all parameters stayed of a size at which that means something.
    """
    members = [each for family in families for each in family]
    width = len(families[0])
    groups = [i // width if coupled else i for i in range(len(members))]
    data = Batch.stack(members)
    found = descend_ascend(
        problem, data, settings, seed=seed, groups=groups, start=start, may_diverge=True
    )
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
    stayed = bool((found.primal.abs() < DIVERGED).all() and (found.dual.abs() < DIVERGED).all())
    if isinstance(problem.approximator, Tables | Linear):
        exact = np.array([_saddles(problem, row) for row in families])
        shift = np.linalg.norm(exact[:, 2:] - exact[:, :1], axis=-1).sum(-1).mean(-1)
        ended = np.stack([primal[:, 0].numpy(), dual[:, 0].numpy()], axis=1)
        error = np.linalg.norm(ended - exact[:, 0], axis=-1).sum(-1)
    return (
        distance[:, 2:].mean(1).numpy(),
        function[:, 2:].mean(1).numpy(),
        shift,
        error,
        float(distance[:, 1].max()),
        stayed,
    )


def _saddles(problem: SaddleProblem, family: Sequence[Transitions]) -> list[list[Array]]:
    """Parameters of the saddles of a data set and its neighbours, from each to the next."""
    at = saddle_point(problem.with_transitions(family[0]))
    points = [at] + [saddle_point(problem.with_transitions(each), start=at) for each in family[1:]]
    return [[each.numpy() for each in point] for point in points]
