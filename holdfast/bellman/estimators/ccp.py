"""Conditional choice probabilities: estimating rewards without solving the dynamic programme."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from holdfast.bellman.estimators.choice_model import ChoiceModel, Solution, checked_counts
from holdfast.bellman.estimators.newton import Curve, inverse_information, maximise
from holdfast.bellman.estimators.nfxp import Estimate

Array = NDArray[np.float64]


def choice_shares(counts: ArrayLike, *, pseudo_count: float = 1.0) -> Array:
    """Choice probabilities as shares, drawn towards those of all states together.

    Parameters
    ----------
    counts : array
        ``(S, A)``.
    pseudo_count : float
        How many choices the shares of all states weigh as, in every state. At least 0; a state
        without choices has no shares of its own, so 0 needs choices in all.

    Returns
    -------
    array
        ``(S, A)``, rows sum to 1.
    """
    counts = np.asarray(counts, dtype=np.float64)
    if counts.ndim != 2 or (counts < 0).any() or not counts.any():
        raise ValueError("counts must be (S, A), not negative, and not all 0")
    if not pseudo_count >= 0:
        raise ValueError(f"pseudo_count is {pseudo_count}: it must not be negative")
    blank = np.flatnonzero(counts.sum(-1) == 0)
    if pseudo_count == 0 and len(blank):
        raise ValueError(f"pseudo_count is 0, but state {blank[0]} has no choices: give more")
    smoothed = counts + pseudo_count * counts.sum(0) / counts.sum()
    return smoothed / smoothed.sum(-1, keepdims=True)


def conditional_choice_probabilities(
    model: ChoiceModel,
    counts: ArrayLike,
    *,
    policy: ArrayLike | None = None,
    iterations: int = 1,
) -> Estimate:
    """Estimate a linear reward from estimated choice probabilities (Hotz & Miller, 1993).

    The values of following a *given* policy are linear in the parameters: with rewards ``r`` and
    the mean shock ``-log pi`` of the chosen action, one linear solve gives them. So the choices
    follow a conditional logit, which is concave. Each further iteration takes the policy from the
    one before (nested pseudo-likelihood; Aguirregabiria & Mira, 2002, section 3); where that
    settles, it is the maximum of the likelihood.

    Parameters
    ----------
    model : ChoiceModel
        On ``S`` states with ``A`` actions.
    counts : array
        ``(S, A)``: how often every action was chosen in every state.
    policy : array, optional
        ``(S, A)``: the choice probabilities. :func:`choice_shares` of the counts if not given.
    iterations : int
        At least 1.

    Returns
    -------
    Estimate
        ``log_likelihood`` and ``solution`` belong to the model solved at the parameters. The
        covariances are the pseudo-likelihood's: the error of the policy adds nothing to first
        order, since values do not move with the policy that they are evaluated at where it is
        optimal (the same paper, proposition 2).

    Raises
    ------
    ValueError
        For a policy that is none, or counts of another shape.
    TrainingError
        If the choices do not determine the parameters.
    """
    counts = checked_counts(counts, model.offset.shape)
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}: it must be at least 1")
    followed = choice_shares(counts) if policy is None else np.asarray(policy, dtype=np.float64)
    if (
        followed.shape != model.offset.shape
        or not (followed >= 0).all()
        or not np.allclose(followed.sum(-1), 1)
    ):
        raise ValueError(f"policy must be probabilities of shape {model.offset.shape}")
    theta, steps = np.zeros(model.parameters), 0
    for _ in range(iterations):
        constant, slopes = _linear_q(model, followed)

        def curve(theta: Array, constant: Array = constant, slopes: Array = slopes) -> Curve:
            return _logit(constant + slopes @ theta, slopes, counts)

        found = maximise(curve, theta)
        theta, steps = found.parameters, steps + found.iterations
        chosen = Solution(model, constant + slopes @ theta)
        followed = chosen.policy
    solution = model.solve(theta)
    scores = slopes - np.einsum("sa,sak->sk", followed, slopes)[:, None]
    return Estimate(
        parameters=theta,
        covariance=inverse_information(-found.curve.hessian),
        covariance_from_scores=inverse_information(
            np.einsum("sa,sak,sal->kl", counts, scores, scores)
        ),
        log_likelihood=solution.likelihood(counts).value,
        solution=solution,
        iterations=steps,
    )


def _linear_q(model: ChoiceModel, policy: Array) -> tuple[Array, Array]:
    """``q`` of following ``policy``: ``(S, A)`` at parameters 0 and ``(S, A, K)`` its slopes."""
    discount, transitions = model.discount, model.transitions
    surprise = -np.log(policy, out=np.zeros_like(policy), where=policy > 0)
    followed = np.eye(len(policy)) - discount * np.einsum("sa,sat->st", policy, transitions)
    constant = (policy * (model.offset + surprise)).sum(-1)
    sources = np.column_stack([constant, np.einsum("sa,sak->sk", policy, model.features)])
    values = np.linalg.solve(followed, sources)
    return (
        model.offset + discount * transitions @ values[:, 0],
        model.features + discount * transitions @ values[:, 1:],
    )


def _logit(q: Array, slopes: Array, counts: Array) -> Curve:
    top = q.max(-1, keepdims=True)
    log_policy = q - top - np.log(np.exp(q - top).sum(-1, keepdims=True))
    policy = np.exp(log_policy)
    scores = slopes - np.einsum("sa,sak->sk", policy, slopes)[:, None]
    information = np.einsum("s,sa,sak,sal->kl", counts.sum(-1), policy, scores, scores)
    return Curve(
        value=float(np.sum(counts * log_policy, where=counts > 0)),
        gradient=np.einsum("sa,sak->k", counts, scores),
        hessian=-information,
        information=information,
    )
