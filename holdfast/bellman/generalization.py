"""Risk on the data against risk under the model that they came from, or on rows held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from holdfast.bellman.draws import covered_dataset, drawer, table_size
from holdfast.bellman.mdp import TabularMDP, check_discount
from holdfast.bellman.networks import Tables
from holdfast.bellman.problem import Batch, SaddleProblem
from holdfast.bellman.sgda import Sgda, descend_ascend
from holdfast.bellman.solve import soft_policy, soft_value
from holdfast.bellman.stability import check_settings, default_settings, fit_slope, planned
from holdfast.bellman.transitions import Transitions

Array = NDArray[np.float64]


@dataclass(frozen=True)
class GeneralizationResult:
    """Risks ``(sizes, datasets)`` and gaps ``(sizes,)`` of runs on fresh data.

    Attributes
    ----------
    sizes, steps : tuple of int
    risk : Array
        Of the result under the model: :func:`primal_risk`; with a user's own rows, on those held
        out: :func:`held_out_risk`. It is the excess risk too, as the best table has 0.
    empirical_risk : Array
        Of the result on its own data.
    optimum_empirical_risk : Array
        Of the model's own solution on the data. Above 0: data make the truth look wrong.
    weak_gap : Array
        ``max_v mean F(w, v) - min_w mean F(w, v)`` with means over runs, under the model, and the
        minimum within ``ball`` of the solution: beyond, it falls without end if the discount
        exceeds 1/2.
    empirical_weak_gap : Array
        The mean over runs of the same on the data of each run.
    slope, interval : float and pair of float
        Of ``log mean (risk - empirical_risk)`` against ``log size``, with a 95 % interval from a
        bootstrap over data sets. NaN if a mean is not positive.
    """

    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    risk: Array
    empirical_risk: Array
    optimum_empirical_risk: Array
    weak_gap: Array
    empirical_weak_gap: Array
    slope: float
    interval: tuple[float, float]

    @property
    def gap(self) -> Array:
        """``risk - empirical_risk``, mean over data sets, ``(sizes,)``."""
        return (self.risk - self.empirical_risk).mean(1)


def primal_risk(model: TabularMDP, q: Array, law: Array) -> float:
    """``sum law (T q - q)^2``, the largest saddle value of ``q`` over all dual tables.

    ``q`` and ``law`` are ``(states, actions)``.
    """
    return float((law * (model.backup(q) - q) ** 2).sum())


def empirical_risk(transitions: Transitions, q: Array, discount: float) -> float:
    """The same under the empirical model and the frequencies of pairs."""
    states, actions = q.shape
    counts = transitions.counts(states, actions)
    # Pairs without rows have no weight, whatever stands for them.
    anything = np.full((states, actions, states), 1.0 / states)
    fallback = TabularMDP(anything, np.zeros_like(q), discount)
    model = TabularMDP.empirical(transitions, states, actions, discount, fallback=fallback)
    return primal_risk(model, q, counts / len(transitions))


def held_out_risk(held_out: Transitions, q: Array, discount: float) -> float:
    """An unbiased estimate of ``sum law (T q - q)^2`` from rows that ``q`` was not fitted to.

    The square of a mean over ``m`` rows of a pair exceeds that of the expectation by the variance
    over ``m``, which is estimated and taken off; so the estimate may be negative. Pairs with fewer
    than two rows are left out. ``q`` is ``(states, actions)``.
    """
    pair = held_out.state * q.shape[1] + held_out.action
    ahead = np.where(held_out.terminal, 0.0, soft_value(q)[held_out.next_state])
    delta = held_out.reward + discount * ahead - q.ravel()[pair]
    count = np.bincount(pair, minlength=q.size)
    enough = count >= 2
    m = np.where(enough, count, 2)
    mean = np.bincount(pair, delta, minlength=q.size) / m
    spread = np.bincount(pair, (delta - mean[pair]) ** 2, minlength=q.size) / (m - 1)
    squares = np.where(enough, count * (mean**2 - spread / m), 0.0)
    return float(squares.sum() / count[enough].sum())


def measure_generalization(
    source: TabularMDP | Transitions,
    *,
    discount: float | None = None,
    sizes: Sequence[int] = (64, 128, 256, 512),
    datasets: int = 50,
    passes: float = 10.0,
    max_steps: int = 20_000,
    settings: Sgda | None = None,
    ball: float = 1.0,
    seed: int = 0,
) -> GeneralizationResult:
    """Run on many fresh data sets of each size, and compare risks.

    One run a data set, all runs of a size in one batch, each with its own order of rows.

    Parameters
    ----------
    source : TabularMDP or Transitions
        Where data come from, and what they are judged by: a model, whose pairs are drawn with the
        same probability, or a user's own rows. Half of those are held out, at random; data sets are
        parts of the other half, and overlap. What needs a model then takes that of the rows held
        out, whose own noise stays in the weak gap.
    discount : float, optional
        In [0, 1). By default that of the model.
    sizes, passes, max_steps, settings, seed
        As of :func:`~holdfast.bellman.measure_stability`.
    datasets : int
        For each size.
    ball : float
        Radius for the weak gap, positive.

    Raises
    ------
    ValueError
        For numbers out of range, or data in which some pair stays too rare.
    TrainingError
        If the setting leaves the saddle, or a run diverged.
    """
    if len(set(sizes)) < 2 or datasets < 2:
        raise ValueError(f"sizes is {tuple(sizes)}, datasets {datasets}: two or more of each")
    if not ball > 0:
        raise ValueError(f"ball is {ball}: it must be positive")
    rng = np.random.default_rng(seed)
    sizes = tuple(sorted(set(sizes)))
    pool: TabularMDP | Transitions = source
    held_out: Transitions | None = None
    if isinstance(source, TabularMDP):
        model = source
        live = np.repeat(~model.terminal[:, None], model.actions, 1)
        law = live / live.sum()
    else:
        if discount is None:
            raise ValueError("discount must be given with transitions")
        order = rng.permutation(len(source))
        held_out, pool = source[order[::2]], source[order[1::2]]
        model = TabularMDP.empirical(held_out, *table_size(source), check_discount(discount))
        law = held_out.counts(model.states, model.actions) / len(held_out)
    shape = (model.states, model.actions)
    tables = Tables(*shape)
    truth = model.soft_policy_iteration().q

    def risk_of(q: Array) -> float:
        if held_out is None:
            return primal_risk(model, q, law)
        return held_out_risk(held_out, q, model.discount)

    draw = drawer(pool, max(sizes), None)
    rows: list[tuple[list[float], ...]] = []
    gaps, steps = [], []
    for n in sizes:
        drawn = [covered_dataset(draw, n, tables, pool, rng)[0] for _ in range(datasets)]
        problem = SaddleProblem(drawn[0], model.discount, tables)
        if settings is not None:
            check_settings(problem, settings)
        chosen = planned(settings or default_settings(problem), n, passes, max_steps)
        steps.append(chosen.steps)
        found = descend_ascend(
            problem,
            Batch.stack(drawn),
            chosen,
            seed=int(rng.integers(2**31)),
            groups=range(datasets),
        )
        qs = found.primal.numpy().reshape(-1, *shape)
        zetas = found.dual.numpy().reshape(-1, *shape)
        rows.append(
            (
                [risk_of(q) for q in qs],
                [empirical_risk(d, q, model.discount) for d, q in zip(drawn, qs, strict=True)],
                [empirical_risk(d, truth, model.discount) for d in drawn],
            )
        )
        own = []
        for data, q, zeta in zip(drawn, qs, zetas, strict=True):
            empirical = TabularMDP.empirical(data, *shape, model.discount)
            frequency = data.counts(*shape) / n
            own.append(weak_gap(empirical, q[None], zeta[None], frequency, ball))
        gaps.append((weak_gap(model, qs, zetas, law, ball), float(np.mean(own))))
    risk, seen, optimum = (np.array([row[k] for row in rows]) for k in range(3))
    slope, interval = fit_slope(sizes, risk - seen, rng)
    population, own_gap = np.array(gaps).T
    return GeneralizationResult(
        sizes, tuple(steps), risk, seen, optimum, population, own_gap, slope, interval
    )


def weak_gap(
    model: TabularMDP, q: Array, zeta: Array, law: Array, ball: float, *, steps: int = 200
) -> float:
    """The weak primal-dual gap of runs ``(runs, states, actions)``, for ``F`` under ``model``.

    ``F(w, v) = |T w - w|^2 - discount^2 |P V_w - v|^2`` in the norm of ``law``. The maximum is in
    closed form; the minimum is sought by projected gradient descent from the model's solution and
    is an upper bound on it, so that the gap is, if anything, too small.
    """
    squared = model.discount**2

    def value(w: Array, v: Array) -> float:
        ahead = model.expected(soft_value(w))
        residual = model.rewards + model.discount * ahead - w
        return float((law * (residual**2 - squared * (ahead - v) ** 2)).sum(axis=(-2, -1)).mean())

    aheads = np.stack([model.expected(soft_value(each)) for each in q])
    residuals = np.stack([model.backup(each) - each for each in q])
    best = aheads.mean(0)
    highest = (law * (residuals**2 - squared * (aheads - best) ** 2)).sum(axis=(1, 2)).mean()
    centre = model.soft_policy_iteration().q
    mean = zeta.mean(0)
    spread = squared * (law * (zeta - mean) ** 2).sum(axis=(1, 2)).mean()
    w, lowest = centre.copy(), value(centre, mean)
    step = 0.25 / ((1.0 + model.discount) ** 2 * law.max())
    for _ in range(steps):
        ahead = model.expected(soft_value(w))
        residual = law * (model.rewards + model.discount * ahead - w)
        lag = law * (ahead - mean)
        pull = (2 * model.discount * residual - 2 * squared * lag).ravel() @ model.kernel
        pull = np.where(model.terminal, 0.0, pull)
        w = w - step * (pull[:, None] * soft_policy(w) - 2 * residual)
        away = w - centre
        w = centre + away * min(1.0, ball / max(float(np.linalg.norm(away)), 1e-300))
        lowest = min(lowest, value(w, mean))
    return float(highest - (lowest - spread))
