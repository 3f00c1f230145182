"""Exact solutions of soft Markov decision problems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import bicgstab, splu

from holdfast.errors import HoldfastError

if TYPE_CHECKING:
    from holdfast.bellman.mdp import TabularMDP

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Solution:
    """A soft-optimal solution; in terminal states ``q`` and ``v`` are 0 and the policy uniform.

    Attributes
    ----------
    q, policy : Array
        ``(states, actions)``.
    v : Array
        ``(states,)``, the log-sum-exp of ``q``.
    residual : float
        Largest ``|T q - q|``. The error of ``q`` is at most ``residual / (1 - discount)``.
    iterations : int
        Sweeps, or linear solves.
    """

    q: Array
    v: Array
    policy: Array
    residual: float
    iterations: int


def soft_value(q: Array) -> Array:
    """``log sum_a exp q(s, a)`` of ``(..., actions)``."""
    top = q.max(-1)
    return top + np.log(np.exp(q - top[..., None]).sum(-1))


def soft_policy(q: Array) -> Array:
    """``exp(q - v)``, the probabilities of actions, of ``(..., actions)``."""
    weights = np.exp(q - q.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def soft_value_iteration(
    mdp: TabularMDP, tolerance: float = 1e-10, *, max_sweeps: int = 1_000_000
) -> Solution:
    """Apply the soft Bellman operator until it changes nothing by more than ``tolerance``.

    The residual shrinks at least by the discount in every sweep. Where no state is terminal, the
    part of the change that all states share is extrapolated to its limit (MacQueen's bounds):
    ``T (q + c) = T q + discount c``, so it costs nothing and leaves the rate to the mixing of the
    chain.

    Parameters
    ----------
    mdp : TabularMDP
        Dense or sparse.
    tolerance : float
        For the largest ``|T q - q|``, positive. Raised to the rounding error of ``q``, if below.
    max_sweeps : int
        When to give up.

    Raises
    ------
    ValueError
        If ``tolerance`` is not positive.
    HoldfastError
        If ``max_sweeps`` did not suffice.
    """
    _check_tolerance(tolerance)
    shift = 0.0 if mdp.terminal.any() else mdp.discount / (1.0 - mdp.discount)
    live = ~mdp.terminal[:, None]
    q = np.where(live, mdp.rewards, 0.0)
    for sweep in range(1, max_sweeps + 1):
        v = soft_value(q)
        update = np.where(live, mdp.rewards + mdp.discount * mdp.expected(v), 0.0)
        change = update - q
        low, high = change.min(), change.max()
        settled = max(-low, high) <= max(tolerance, _rounding(q))
        q = update + shift * 0.5 * (low + high)
        if settled:
            return _solution(mdp, q, sweep)
    raise HoldfastError(
        f"soft value iteration left a residual of {max(-low, high):.3g} after {max_sweeps} sweeps "
        f"(tolerance {tolerance:.3g}, discount {mdp.discount}): use soft_policy_iteration."
    )


def soft_policy_iteration(
    mdp: TabularMDP, tolerance: float = 1e-10, *, max_solves: int = 200
) -> Solution:
    """Evaluate the soft policy of ``q`` by a linear solve, and repeat.

    It is Newton's method on ``v - log sum exp (r + discount P v)``, whose derivative is the
    identity less the discounted chain of the policy (Rust 1987, section 4). It climbs from any
    start, quadratically in the end, and needs a handful of solves at any discount.

    Parameters, errors and result as in :func:`soft_value_iteration`.
    """
    _check_tolerance(tolerance)
    v = np.zeros(mdp.states)
    live = ~mdp.terminal[:, None]
    q = np.where(live, mdp.rewards, 0.0)
    for solves in range(1, max_solves + 1):
        # Solving for the change, not for the values, keeps the digits that a high discount takes.
        change = np.where(mdp.terminal, 0.0, soft_value(q) - v)
        v = v + _evaluate(mdp, soft_policy(q), change)
        q = np.where(live, mdp.rewards + mdp.discount * mdp.expected(v), 0.0)
        found = _solution(mdp, q, solves)
        if found.residual <= max(tolerance, _rounding(q)):
            return found
    raise HoldfastError(
        f"soft policy iteration left a residual of {found.residual:.3g} after {max_solves} solves "
        f"(tolerance {tolerance:.3g}, discount {mdp.discount}): raise the tolerance."
    )


def chain(mdp: TabularMDP, policy: Array) -> Any:
    """State-to-state probabilities under ``policy``, ``(states, states)``, 0 out of and into ends.

    Sparse where the model is.
    """
    live = (~mdp.terminal).astype(np.float64)
    weights = policy * live[:, None]
    if not sparse.issparse(mdp.kernel):
        kernel = mdp.kernel.reshape(mdp.states, mdp.actions, mdp.states)
        return np.einsum("sa,sax->sx", weights, kernel) * live
    rows = np.repeat(np.arange(mdp.states), mdp.actions)
    pick = sparse.csr_array(
        (weights.ravel(), (rows, np.arange(weights.size))), shape=(mdp.states, weights.size)
    )
    return (pick @ mdp.kernel) @ sparse.diags_array(live)


def _evaluate(mdp: TabularMDP, policy: Array, rewards: Array) -> Array:
    """``(I - discount P_policy)^-1 rewards``, ``(states,)``."""
    return discounted(chain(mdp, policy), mdp.discount, rewards)


def discounted(moves: Any, discount: float, rewards: Array) -> Array:
    """``(I - discount moves)^-1 rewards``, ``(states,)``: to 1e-10 of ``rewards`` if sparse."""
    states = len(rewards)
    if not sparse.issparse(moves):
        return np.linalg.solve(np.eye(states) - discount * moves, rewards)
    system = (sparse.eye_array(states) - discount * moves).tocsc()
    # Factors of a random sparse chain fill memory; its Krylov solution takes a few products.
    found, failed = bicgstab(system, rewards, rtol=1e-10, maxiter=500)
    return splu(system).solve(rewards) if failed else found


def _solution(mdp: TabularMDP, q: Array, iterations: int) -> Solution:
    residual = float(np.abs(mdp.backup(q) - q)[~mdp.terminal].max())
    q = np.where(mdp.terminal[:, None], 0.0, q)
    v = np.where(mdp.terminal, 0.0, soft_value(q))
    return Solution(q, v, soft_policy(q), residual, iterations)


def _rounding(q: Array) -> float:
    """What the residual of the exact solution comes to in float64."""
    return 8.0 * float(np.finfo(np.float64).eps) * max(1.0, float(np.abs(q).max()))


def _check_tolerance(tolerance: float) -> None:
    if not (np.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance is {tolerance}: it must be positive and finite")
