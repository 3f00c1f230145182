"""Dynamic discrete choice with rewards that are linear in a few parameters.

The model behind the nested fixed point, the conditional choice probabilities and maximum-entropy
inverse reinforcement learning: rewards ``r(s, a) = offset(s, a) + features(s, a) · theta``, values
``W(s) = log sum_a exp Q(s, a)`` with ``Q(s, a) = r(s, a) + discount * E[W(s') | s, a]``, choices
``pi(a | s) = exp(Q(s, a) - W(s))`` (Rust, 1987, eq. 4.11 to 4.14, with the Gumbel shocks' mean
taken out).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from holdfast.bellman.estimators.newton import Curve
from holdfast.bellman.mdp import ROW_SUM_TOLERANCE
from holdfast.errors import TrainingError

Array = NDArray[np.float64]


class ChoiceModel:
    """Rewards that are linear in ``K`` parameters, on ``S`` states with ``A`` actions.

    Parameters
    ----------
    features : array
        ``(S, A, K)``.
    transitions : array
        ``(S, A, S)``: the probability of every next state.
    discount : float
        In [0, 1). 0.9999 works: the fixed point is solved by policy iteration.
    offset : array, optional
        ``(S, A)``: the part of the reward that is known. 0 if not given.
    terminal : array, optional
        ``(S,)``, bool: nothing is earned from such a state on. None are by default.

    Raises
    ------
    ValueError
        For shapes that do not match, numbers that are not finite, rows of ``transitions`` that are
        no probabilities, or a discount out of range.
    """

    def __init__(
        self,
        features: ArrayLike,
        transitions: ArrayLike,
        discount: float,
        *,
        offset: ArrayLike | None = None,
        terminal: ArrayLike | None = None,
    ) -> None:
        self.features = _finite("features", features, 3)
        states, actions, self.parameters = self.features.shape
        self.transitions = _finite("transitions", transitions, 3)
        if self.transitions.shape != (states, actions, states):
            raise ValueError(
                f"transitions has shape {self.transitions.shape}, not the (S, A, S) = "
                f"{(states, actions, states)} that features of shape {self.features.shape} need"
            )
        rows = self.transitions.sum(-1)
        wrong = np.argwhere((abs(rows - 1) > ROW_SUM_TOLERANCE) | (self.transitions < 0).any(-1))
        if len(wrong):
            state, action = wrong[0]
            raise ValueError(
                f"transitions[{state}, {action}] is no distribution: its entries must not be "
                f"negative and sum to 1, not to {rows[state, action]:.6g}"
            )
        self.transitions = self.transitions / rows[..., None]
        if not 0 <= discount < 1:
            raise ValueError(f"discount is {discount}: it must lie in [0, 1)")
        self.discount = float(discount)
        self.offset = (
            np.zeros((states, actions)) if offset is None else _finite("offset", offset, 2)
        )
        if self.offset.shape != (states, actions):
            raise ValueError(f"offset has shape {self.offset.shape}, not {(states, actions)}")
        if terminal is not None:
            ended = np.asarray(terminal, dtype=bool)
            if ended.shape != (states,):
                raise ValueError(f"terminal has shape {ended.shape}, not {(states,)}")
            # What is lost from the rows has ended, and the values after it are 0.
            self.transitions = np.where(ended, 0.0, self.transitions)

    def rewards(self, theta: ArrayLike) -> Array:
        """``(S, A)`` under the parameters ``theta (K,)``."""
        theta = _finite("theta", theta, 1)
        if theta.shape != (self.parameters,):
            raise ValueError(f"theta has shape {theta.shape}, not {(self.parameters,)}")
        return self.offset + self.features @ theta

    def solve(self, theta: ArrayLike, *, start: Array | None = None) -> Solution:
        """The fixed point under the parameters ``theta (K,)``, by Newton's method.

        Newton's method on ``W = log sum exp Q`` is policy iteration for soft values (Rust, 2000,
        *NFXP manual*, section 2.3): it converges from any start, and quadratically, whatever the
        discount.

        Parameters
        ----------
        theta : array
            ``(K,)``.
        start : array, optional
            ``(S,)``: a guess of the values.

        Raises
        ------
        TrainingError
            If the iteration stalls above rounding error.
        """
        rewards = self.rewards(theta)
        values = np.zeros(len(rewards)) if start is None else np.array(start, dtype=np.float64)
        for _ in range(200):
            q = rewards + self.discount * self.transitions @ values
            solution = Solution(self, q)
            residual = solution.values - values
            # An exact solve at the last policy turns a residual of this size into one of rounding.
            step = np.linalg.solve(solution.resolvent, residual)
            values = values + step
            if abs(step).max() <= 1e-9 * (1 + abs(values).max()):
                return Solution(self, rewards + self.discount * self.transitions @ values)
        raise TrainingError(
            f"soft policy iteration did not converge at discount {self.discount}: the last step "
            f"was {abs(step).max():.3g} at values up to {abs(values).max():.3g}. Are rewards of "
            f"up to {abs(rewards).max():.3g} meant?"
        )

    def likelihood(self, theta: ArrayLike, counts: ArrayLike) -> Curve:
        """Log-likelihood of the choices, differentiated through the fixed point.

        Parameters
        ----------
        theta : array
            ``(K,)``.
        counts : array
            ``(S, A)``, not negative: how often every action was chosen in every state.

        Returns
        -------
        Curve
            Value, gradient and Hessian in ``theta``, exact; and the information expected given the
            states that were visited.
        """
        return self.solve(theta).likelihood(checked_counts(counts, self.offset.shape))


@dataclass(frozen=True)
class Solution:
    """The fixed point for one value of the parameters, with its derivatives in them."""

    model: ChoiceModel
    q: Array
    """``(S, A)``"""

    @cached_property
    def values(self) -> Array:
        """``(S,)``: ``log sum_a exp q``."""
        top = self.q.max(-1, keepdims=True)
        return (top + np.log(np.exp(self.q - top).sum(-1, keepdims=True)))[:, 0]

    @cached_property
    def log_policy(self) -> Array:
        """``(S, A)``"""
        return self.q - self.values[:, None]

    @cached_property
    def policy(self) -> Array:
        """``(S, A)``"""
        return np.exp(self.log_policy)

    @cached_property
    def resolvent(self) -> Array:
        """``(S, S)``: identity minus the discounted transitions under the policy."""
        chosen = np.einsum("sa,sat->st", self.policy, self.model.transitions)
        return np.eye(len(chosen)) - self.model.discount * chosen

    @cached_property
    def value_slopes(self) -> Array:
        """``(S, K)``: derivative of the values, by differentiating the fixed point implicitly."""
        return np.linalg.solve(
            self.resolvent, np.einsum("sa,sak->sk", self.policy, self.model.features)
        )

    @cached_property
    def q_slopes(self) -> Array:
        """``(S, A, K)``: derivative of ``q``."""
        model = self.model
        return model.features + model.discount * model.transitions @ self.value_slopes

    @cached_property
    def scores(self) -> Array:
        """``(S, A, K)``: derivative of ``log_policy``."""
        return self.q_slopes - self.value_slopes[:, None]

    @cached_property
    def covariances(self) -> Array:
        """``(S, K, K)``: covariance of the scores under the policy."""
        return np.einsum("sa,sak,sal->skl", self.policy, self.scores, self.scores)

    def likelihood(self, counts: Array) -> Curve:
        """As :meth:`ChoiceModel.likelihood`, for counts ``(S, A)``."""
        return Curve(
            value=float(np.sum(counts * self.log_policy, where=counts > 0)),
            gradient=np.einsum("sa,sak->k", counts, self.scores),
            # log_policy is q - values. What a second derivative of the values does to it is linear
            # in its source, the covariance: one adjoint solve serves all pairs of parameters.
            hessian=np.einsum("s,skl->kl", self._adjoint(counts), self.covariances),
            information=np.einsum("s,skl->kl", counts.sum(-1), self.covariances),
        )

    def score_products(self, counts: Array) -> Array:
        """``(K, K)``: outer products of the scores, summed over the choices ``counts (S, A)``."""
        return np.einsum("sa,sak,sal->kl", counts, self.scores, self.scores)

    def cross_derivative(self, counts: Array, direction: Array) -> Array:
        """How the gradient ``(K,)`` of the likelihood moves as the transitions do.

        Parameters
        ----------
        counts : array
            ``(S, A)``.
        direction : array
            ``(S, A, S)``: derivative of the transitions; its rows need not sum to 0.
        """
        discount, policy = self.model.discount, self.policy
        shift = discount * direction @ self.values  # (S, A)
        value_shift = np.linalg.solve(self.resolvent, (policy * shift).sum(-1))
        q_shift = shift + discount * self.model.transitions @ value_shift
        slope_shift = discount * direction @ self.value_slopes  # (S, A, K)
        source = np.einsum("sa,sa,sak->sk", policy, q_shift, self.scores)
        source += np.einsum("sa,sak->sk", policy, slope_shift)
        return self._adjoint(counts) @ source + np.einsum("sa,sak->k", counts, slope_shift)

    def _adjoint(self, counts: Array) -> Array:
        """``(S,)``: derivative of the summed ``log_policy`` in a source of the value equation."""
        flow = np.einsum("sa,sat->t", counts, self.model.transitions)
        return np.linalg.solve(self.resolvent.T, self.model.discount * flow - counts.sum(-1))


def _finite(name: str, values: ArrayLike, ndim: int) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != ndim or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}: it must have {ndim} dimensions")
    if not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"{name} is {array[where]} at {where}: it must be finite")
    return array


def checked_counts(counts: ArrayLike, shape: tuple[int, ...]) -> Array:
    """Counts of choices as an array of that shape, or a ``ValueError``."""
    array = _finite("counts", counts, 2)
    if array.shape != shape:
        raise ValueError(f"counts has shape {array.shape}, not the (S, A) = {shape} of the model")
    if (array < 0).any() or not array.any():
        raise ValueError("counts must not be negative, and one at least must be positive")
    return array
