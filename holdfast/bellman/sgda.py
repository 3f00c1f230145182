"""Stochastic gradient descent-ascent on two time scales, for many coupled replicas at once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdfast.bellman.margin import stability_margin
from holdfast.bellman.networks import Linear, Tables
from holdfast.bellman.problem import Batch, SaddleProblem
from holdfast.bellman.solve import soft_policy, soft_value
from holdfast.bellman.transitions import Transitions
from holdfast.errors import TrainingError

Array = NDArray[np.float64]
Optimiser = Literal["sgd", "adam"]
CHUNK = 512
"""Steps whose rows are looked up at a time, and between looks for a divergence."""
DIVERGED = 1e9
"""Parameters of this size are on their way out."""
TUNED = 0.5
"""Share taken of the step tuned at the saddle: curvature differs on the way there."""
CERTIFIED_SIZE = 400
"""Parameters up to which eigenvalues are computed unasked."""
ACCURATE = 1e-5
"""Error of Q, as a share of its largest entry, up to which a solution is said to have converged."""


@dataclass(frozen=True)
class Harmonic:
    """Steps ``scale / (offset + t)`` for ``t = 0, 1, …``."""

    scale: float
    offset: float

    def __call__(self, t: int) -> float:
        return self.scale / (self.offset + t)


@dataclass(frozen=True)
class Constant:
    """Steps of one ``size``."""

    size: float

    def __call__(self, t: int) -> float:
        return self.size


@dataclass(frozen=True)
class Sgda:
    """How to descend and ascend.

    Attributes
    ----------
    steps : int
        Updates of both players, at the same time.
    step : callable
        Size of the primal step at ``t = 0, 1, …``.
    step_ratio : float
        Dual over primal step. One common step (1) leaves the saddle for discounts near 1.
    batch_size : int or None
        Rows a step; None takes all of them.
    replacement : bool
        Rows are drawn independently; otherwise data are shuffled, and passed through again.
    momentum : float
        Of heavy-ball steps, in [0, 1). SGD only.
    radius : float or None
        Primal and dual parameters are each projected onto the Euclidean ball around 0.
    averaging : float
        The result is the mean of this last share of the iterates, in [0, 1). 0: the last one.
    optimiser : str
        ``sgd`` or ``adam``, whose state is kept by parameter and so by replica.
    tolerance : float
        With all rows a step, stop once no gradient exceeds this.
    """

    steps: int
    step: Callable[[int], float]
    step_ratio: float = 4.0
    batch_size: int | None = 1
    replacement: bool = True
    momentum: float = 0.0
    radius: float | None = None
    averaging: float = 0.0
    optimiser: Optimiser = "sgd"
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}: it must be at least 1")
        if not (math.isfinite(self.step_ratio) and self.step_ratio > 0):
            raise ValueError(f"step_ratio is {self.step_ratio}: it must be positive and finite")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: it must be at least 1, or None")
        for name in ("momentum", "averaging"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must lie in [0, 1)")
        if self.radius is not None and not self.radius > 0:
            raise ValueError(f"radius is {self.radius}: it must be positive, or None")
        if self.optimiser not in get_args(Optimiser):
            raise ValueError(f"optimiser is {self.optimiser!r}: it must be sgd or adam")
        if self.optimiser == "adam" and self.momentum:
            raise ValueError("momentum is for sgd: adam has its own")


@dataclass(frozen=True)
class Iterates:
    """Where replicas ended: ``(replicas, primal)`` and ``(replicas, dual)``.

    ``record`` maps steps to the two at the end of them.
    """

    primal: Tensor
    dual: Tensor
    steps: int
    record: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


def descend_ascend(
    problem: SaddleProblem,
    data: Batch,
    settings: Sgda,
    *,
    seed: int = 0,
    groups: Sequence[int] | None = None,
    record: Sequence[int] = (),
    start: tuple[Tensor, Tensor] | None = None,
    may_diverge: bool = False,
) -> Iterates:
    """Run all replicas of ``data``, each on its own rows.

    Parameters
    ----------
    problem : SaddleProblem
        Loss and functions. Its own transitions are not looked at.
    data : Batch
        One replica a row.
    settings : Sgda
        Shared by all.
    seed : int
        Of the order in which rows are visited.
    groups : sequence of int, optional
        ``(replicas,)``: those with the same number visit rows in one order, which is what couples
        them. By default all.
    record : sequence of int
        Steps after which the parameters are kept.
    start : pair of Tensor, optional
        ``(primal,)`` and ``(dual,)``, for all replicas. By default the functions' own.
    may_diverge : bool
        Let parameters leave the finite numbers.

    Raises
    ------
    TrainingError
        If parameters did, with the step.
    """
    replicas, n = data.action.shape
    first, second = problem.approximator.initial() if start is None else start
    primal = first.expand(replicas, -1).clone().requires_grad_()
    dual = second.expand(replicas, -1).clone().requires_grad_()
    update = _adam if settings.optimiser == "adam" else _heavy_ball
    memories: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    orders = None
    if settings.batch_size is not None:
        orders = _Orders(groups or [0] * replicas, n, settings, seed)
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    wanted = set(record)
    averaged_from = settings.steps - int(settings.averaging * settings.steps)
    sums = [torch.zeros_like(primal), torch.zeros_like(dual)]
    chunk = data
    done = 0
    for t in range(settings.steps):
        place = t % CHUNK
        if place == 0 and orders is not None:
            chunk = data.rows(orders.next(min(CHUNK, settings.steps - t)))
        size = settings.batch_size
        batch = data if size is None else chunk.between(place * size, (place + 1) * size)
        gradients = problem.directions(primal, dual, batch)
        looks = size is None and settings.tolerance > 0 and t % 10 == 0
        if looks and max(float(each.abs().max()) for each in gradients) <= settings.tolerance:
            break
        step = settings.step(t)
        with torch.no_grad():
            update(primal, gradients[0], step, memories[0], settings)
            update(dual, gradients[1], step * settings.step_ratio, memories[1], settings)
            if settings.radius is not None:
                for each in (primal, dual):
                    norm = torch.linalg.vector_norm(each, dim=1, keepdim=True)
                    each.mul_((settings.radius / norm).clamp(max=1.0))
            if settings.averaging and t >= averaged_from:
                sums[0] += primal
                sums[1] += dual
        done = t + 1
        if done in wanted:
            kept[done] = (primal.detach().clone(), dual.detach().clone())
        looks = not may_diverge and (place == CHUNK - 1 or done == settings.steps)
        if looks and not (bool((primal.abs() < DIVERGED).all() & (dual.abs() < DIVERGED).all())):
            raise TrainingError(
                f"descent-ascent diverged within {done} steps: lower the step, raise "
                f"step_ratio (it is {settings.step_ratio:g}), or set a radius."
            )
    if settings.averaging and done > averaged_from:
        share = 1.0 / (done - averaged_from)
        return Iterates(sums[0] * share, sums[1] * share, done, kept)
    return Iterates(primal.detach(), dual.detach(), done, kept)


@dataclass(frozen=True)
class SaddleSolution:
    """What :func:`solve_saddle` found.

    Attributes
    ----------
    q, zeta, policy, reward : Array
        ``(states, actions)``; the reward is read off as ``q - discount * zeta``.
    v : Array
        ``(states,)``; 0 in states that only end episodes.
    gradient : float
        Largest entry of the full-data gradient at the result.
    residual : float
        Largest Bellman residual of ``q`` under the empirical model: ``q`` is within ``residual / (1
        - discount)`` of its solution. With an anchor action, the larger of that at the anchor and
        of the error of a logarithm of a choice probability; then within three times as much.
    converged : bool
        Whether that bound is below 1e-5 of the largest entry of ``q``, or of 1 if that is more.
    steps : int
        Taken.
    """

    q: Array
    zeta: Array
    v: Array
    policy: Array
    reward: Array
    gradient: float
    residual: float
    converged: bool
    steps: int


def solve_saddle(
    transitions: Transitions,
    *,
    discount: float,
    steps: int = 10_000,
    step_ratio: float = 4.0,
    step: Callable[[int], float] | float | None = None,
    batch_size: int | None = None,
    replacement: bool = True,
    momentum: float | None = None,
    radius: float | None = None,
    averaging: float = 0.0,
    optimiser: Optimiser = "adam",
    tolerance: float = 1e-10,
    anchor_action: int | NDArray[np.int64] | None = None,
    weight: float = 1.0,
    states: int | None = None,
    actions: int | None = None,
    seed: int = 0,
) -> SaddleSolution:
    """Solve the saddle problem of a table by gradient descent-ascent.

    All values start at what a state would be worth if every one earned the mean reward and chose
    at random. By default Adam takes all rows a step, with steps that fall linearly to 0. ``sgd``
    takes step and momentum tuned to the linearised dynamics, which is the faster where the discount
    is not near 1; with a ``batch_size``, its steps shrink harmonically. Whatever the optimiser, a
    ratio with which plain steps would leave the saddle is refused for tables of up to 200 pairs.

    Parameters
    ----------
    transitions : Transitions
        Of numbered states, covering every pair.
    discount : float
        In [0, 1).
    steps : int
        At most; fewer if all gradients fall to ``tolerance``.
    step : callable or float, optional
        Primal step. By default from :func:`stability_margin`.
    momentum : float, optional
        By default tuned with ``step``, else 0.
    anchor_action, weight, states, actions
        As of :meth:`SaddleProblem.tabular`.
    step_ratio, batch_size, replacement, radius, averaging, optimiser, tolerance
        As of :class:`Sgda`.
    seed : int
        Of the order of rows.

    Warns
    -----
    RuntimeWarning
        If the result has not converged: see :class:`SaddleSolution`.

    Raises
    ------
    ValueError
        For data that do not determine the table, or numbers out of range.
    TrainingError
        Before the first step, if the setting would leave the saddle; later, if it diverged.
    """
    problem = SaddleProblem.tabular(
        transitions,
        discount,
        states=states,
        actions=actions,
        anchor_action=anchor_action,
        weight=weight,
    )
    assert isinstance(problem.approximator, Tables)
    size = (problem.approximator.states, problem.approximator.actions)
    if isinstance(step, int | float):
        step = Constant(float(step))
    margin = None
    if 2 * size[0] * size[1] <= CERTIFIED_SIZE:
        margin = stability_margin(problem, step_ratio)
        plain = optimiser == "sgd" and batch_size is None and not momentum
        margin.check(step.size if plain and isinstance(step, Constant) else None)
    if step is None:
        if optimiser == "adam":
            step = _falling(problem, steps)
        elif margin is None:
            raise ValueError(f"a table of {size} is too large for steps by default: give a step")
        elif batch_size is not None:
            step = harmonic(
                discount, step_ratio, margin.margin, curvature=row_curvature(problem, step_ratio)
            )
        elif momentum is None:
            tuned, momentum = margin.tuned()
            step = Constant(TUNED * tuned)
        else:
            step = Constant(0.5 * margin.max_step)
    settings = Sgda(
        steps=steps,
        step=step,
        step_ratio=step_ratio,
        batch_size=batch_size,
        replacement=replacement,
        momentum=momentum or 0.0,
        radius=radius,
        averaging=averaging,
        optimiser=optimiser,
        tolerance=tolerance,
    )
    data = problem.compact() if batch_size is None else Batch.stack([transitions])
    found = descend_ascend(problem, data, settings, seed=seed, start=level_start(problem))
    primal, dual = found.primal.clone().requires_grad_(), found.dual.clone().requires_grad_()
    slopes = problem.directions(primal, dual, problem.compact())
    gradient = max(float(each.abs().max()) for each in slopes)
    q, zeta = (each[0].numpy().reshape(size) for each in (found.primal, found.dual))
    v = np.where(transitions.entered(len(q)), soft_value(q), 0.0)
    residual = _residual(problem, q)
    off = residual / (1.0 - discount) * (1.0 if anchor_action is None else 3.0)
    converged = off <= ACCURATE * max(1.0, float(np.abs(q).max()))
    if not converged:
        warnings.warn(
            f"solve_saddle has not converged after {found.steps} steps: q may be off by {off:.3g}, "
            f"and its largest entry is {np.abs(q).max():.3g}; give more steps"
            + ("" if batch_size is None else ", or batch_size=None for all rows a step"),
            RuntimeWarning,
            stacklevel=2,
        )
    return SaddleSolution(
        q,
        zeta,
        v,
        soft_policy(q),
        q - discount * zeta,
        gradient,
        residual,
        converged,
        found.steps,
    )


def _residual(problem: SaddleProblem, q: Array) -> float:
    largest = float(np.abs(problem.residuals(q)).max())
    if problem.anchor_action is None:
        return largest
    counts = problem.transitions.counts(*q.shape)
    seen = counts > 0
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    choices = np.log(soft_policy(q)[seen]) - np.log(shares[seen])
    return max(largest, float(np.abs(choices).max()))


def harmonic(
    discount: float, step_ratio: float, margin: float, *, curvature: float | None = None
) -> Harmonic:
    """Steps that single rows survive at first, and that end up contracting at rate ``1 / t``.

    ``margin`` is the least real part of an eigenvalue: see :func:`stability_margin`. ``curvature``
    is that of :func:`row_curvature`; by default that of tables with every reward observed.
    """
    if curvature is None:
        curvature = max(2.0 * (1.0 + discount) ** 2, 2.0 * step_ratio * discount**2)
    scale = 2.0 / margin
    return Harmonic(scale, scale * 2.0 * curvature)


def row_curvature(problem: SaddleProblem, step_ratio: float) -> float:
    """A bound on the curvature of one row's losses at the saddle, each times its player's step.

    The Bellman term's is at most ``2 (1 + discount)^2`` in ``Q`` and ``2 discount^2`` in ``zeta``;
    with an anchor, the likelihood's is 1, the Bellman term has its weight, and the fit of the dual
    ``2``. Features multiply it by their largest squared norm; a table's is 1.
    """
    discount = problem.discount
    primal, dual = 2.0 * (1.0 + discount) ** 2, 2.0 * discount**2
    if problem.anchor_action is not None:
        primal, dual = 1.0 + problem.weight * primal, 2.0
    scale = 1.0
    if isinstance(problem.approximator, Linear):
        scale = float(problem.approximator.features.square().sum(-1).max())
    return scale * max(primal, step_ratio * dual)


def level_start(problem: SaddleProblem) -> tuple[Tensor, Tensor]:
    """Tables of what a state would be worth if all earned the mean reward and chose at random.

    Descent-ascent is slowest along the constant, which is then right already.
    """
    data = problem.transitions
    assert isinstance(problem.approximator, Tables)
    known = data.reward if problem.anchor_action is None else data.reward[problem.anchored(data)]
    goes_on = problem.discount * float((~data.terminal).mean())
    actions = problem.approximator.actions
    level = (float(known.mean()) + math.log(actions)) / (1.0 - goes_on)
    table = torch.full((problem.approximator.states * actions,), level, dtype=torch.float64)
    return table, table.clone()


def _falling(problem: SaddleProblem, steps: int) -> Callable[[int], float]:
    """Steps in the units of values, falling linearly to 0."""
    reward = np.nan_to_num(problem.transitions.reward)
    spread = max(1.0, float(np.abs(reward).max())) / (1.0 - problem.discount)
    return lambda t: 0.01 * spread * (1.0 - t / steps)


class _Orders:
    """Which rows are visited, ``(replicas, steps * batch_size)`` at a time."""

    def __init__(self, groups: Sequence[int], n: int, settings: Sgda, seed: int) -> None:
        names = sorted(set(groups))
        self._member = torch.as_tensor([names.index(group) for group in groups])
        self._streams = [np.random.default_rng([seed, group]) for group in names]
        self._waiting: list[NDArray[np.int64]] = [np.empty(0, np.int64) for _ in names]
        self._n, self._settings = n, settings

    def next(self, steps: int) -> Tensor:
        rows = steps * (self._settings.batch_size or 1)
        drawn = np.stack([self._draw(i, rows) for i in range(len(self._streams))])
        return torch.as_tensor(drawn)[self._member]

    def _draw(self, i: int, rows: int) -> NDArray[np.int64]:
        if self._settings.replacement:
            return self._streams[i].integers(self._n, size=rows)
        waiting = self._waiting[i]
        while len(waiting) < rows:
            waiting = np.concatenate([waiting, self._streams[i].permutation(self._n)])
        self._waiting[i] = waiting[rows:]
        return waiting[:rows]


def _heavy_ball(
    x: Tensor, gradient: Tensor, step: float, memory: dict[str, Any], settings: Sgda
) -> None:
    if settings.momentum:
        velocity = memory.setdefault("velocity", torch.zeros_like(x))
        gradient = velocity.mul_(settings.momentum).add_(gradient)
    x.sub_(gradient, alpha=step)


def _adam(x: Tensor, gradient: Tensor, step: float, memory: dict[str, Any], settings: Sgda) -> None:
    """Kingma and Ba, "Adam", algorithm 1, with its default decay rates."""
    first = memory.setdefault("first", torch.zeros_like(x))
    second = memory.setdefault("second", torch.zeros_like(x))
    memory["t"] = t = memory.get("t", 0) + 1
    first.lerp_(gradient, 0.1)
    second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    root = (second / (1.0 - 0.999**t)).sqrt_().add_(1e-8)
    x.addcdiv_(first, root, value=-step / (1.0 - 0.9**t))
