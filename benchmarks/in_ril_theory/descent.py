"""Interleaved gradient descent on problems whose constants are known, and what it gains."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from benchmarks.in_ril_theory.problems import Array, Pair
from holdfast.joint.progress import Form, optimal_ratio

Ratio = float | Form
"""m; below 1, the number of imitation updates before one RL update is its inverse. Or a form."""
C_IL, C_RL = 1.0, 1.0
"""Step sizes in units of ``1 / L``."""
MAXIMUM = 15.0


@dataclass(frozen=True)
class Descent:
    """What happened.

    Attributes
    ----------
    gaps : array, (updates + 1, problems)
        RL loss less its optimum.
    imitated : array of bool, (updates, problems)
        Whether the update was by imitation.
    promised : array, (updates, problems)
        What smoothness promises that the update takes off the RL loss: for one by imitation, as the
        paper's balance has it.
    bound : array, (updates, problems)
        A lower bound of what it truly takes off: for imitation of the step that was taken, noise
        and all.
    """

    gaps: Array
    imitated: np.ndarray
    promised: Array
    bound: Array

    @property
    def gained(self) -> Array:
        """``(updates, problems)``: what each update took off the RL loss."""
        return self.gaps[:-1] - self.gaps[1:]


def descend(
    pair: Pair, ratio: Ratio, updates: int, *, batch: int, draw: np.random.Generator
) -> Descent:
    """Cycles of imitation and reinforcement, every problem in its own.

    Parameters
    ----------
    ratio : float or str
        ``inf``: RL alone. ``root`` or ``balance``: m from the exact geometry at the start of each
        cycle.
    batch : int
        Samples of an imitation gradient, ``N``; 0: the exact gradient.
    """
    theta = pair.start.copy()
    problems = len(theta)
    imitate = np.zeros(problems, dtype=np.int64)  # updates by imitation that are left in the cycle
    reinforce = np.zeros(problems, dtype=np.int64)
    gaps = [pair.rl_loss(theta) - pair.optimum]
    imitated, promised, bound = [], [], []
    for _ in range(updates):
        rl, il = pair.rl_gradient(theta), pair.il_gradient(theta)
        variance = pair.variance(theta) / batch if batch else np.zeros(problems)
        over = (imitate == 0) & (reinforce == 0)
        if over.any():
            first, then = _cycle(ratio, pair, rl, il, variance, over)
            imitate[over], reinforce[over] = first[over], then[over]
        by_imitation = imitate > 0
        imitate -= by_imitation
        reinforce -= ~by_imitation
        noisy = il + pair.noise(theta, batch, draw) if batch else il
        step_il = C_IL / pair.smoothness_il[:, None] * noisy
        step_rl = C_RL / pair.smoothness_rl[:, None] * rl
        step = np.where(by_imitation[:, None], step_il, step_rl)
        # The descent lemma at the step that is taken; for RL it is ``promised_progress``.
        sure = (rl * step).sum(axis=1) - pair.smoothness_rl / 2 * (step**2).sum(axis=1)
        promised.append(np.where(by_imitation, _benefit(pair, rl, il, variance), sure))
        bound.append(sure)
        imitated.append(by_imitation)
        theta = theta - step
        gaps.append(pair.rl_loss(theta) - pair.optimum)
    return Descent(*(np.array(rows) for rows in (gaps, imitated, promised, bound)))


def _cycle(
    ratio: Ratio, pair: Pair, rl: Array, il: Array, variance: Array, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Updates by imitation and by reinforcement in the cycles that begin."""
    problems = len(rl)
    ones = np.ones(problems, dtype=np.int64)
    if not isinstance(ratio, str):
        if ratio == math.inf:
            return 0 * ones, ones
        return max(1, round(1 / ratio)) * ones, max(1, round(ratio)) * ones
    then = ones.copy()
    for i in np.flatnonzero(wanted):
        norms = float(np.linalg.norm(rl[i])), float(np.linalg.norm(il[i]))
        product = norms[0] * norms[1]
        rho = -float(rl[i] @ il[i]) / product if product > 0 else 0.0
        power = C_IL if ratio == "root" else C_IL**2
        found = optimal_ratio(
            *norms,
            min(1.0, max(-1.0, rho)),
            variance_term=power
            * pair.smoothness_rl[i]
            * variance[i]
            / (2 * pair.smoothness_il[i] ** 2),
            form=ratio,
            maximum=MAXIMUM,
            c_il=C_IL,
            c_rl=C_RL,
            smoothness_il=pair.smoothness_il[i],
            smoothness_rl=pair.smoothness_rl[i],
        )
        then[i] = round(found)
    return ones, then


def _benefit(pair: Pair, rl: Array, il: Array, variance: Array) -> Array:
    """``Δ`` as the balance has it: :func:`~holdfast.joint.progress.promised_benefit`, by row."""
    noise = pair.smoothness_rl * C_IL**2 * variance / (2 * pair.smoothness_il**2)
    return C_IL / pair.smoothness_il * (rl * il).sum(axis=1) - noise
