"""The Bellman residual as a saddle problem, without the bias of one sampled next state.

For a transition ``(s, a, r, s')`` with ``V(s) = log sum_a exp Q(s, a)``, let ``delta = r + discount
* V(s') - Q(s, a)``. The mean of ``delta^2`` is the squared Bellman residual *plus* ``discount^2
Var(V(s') | s, a)``. Subtracting the least mean square that a dual function ``zeta(s, a)`` leaves of
``discount * V(s')`` removes it:

    min over Q, max over zeta of  delta^2 - discount^2 (V(s') - zeta(s, a))^2

(Kang and Jang, "Stability and Generalization for Bellman Residuals", equations 1 to 5; Dai et al.,
"SBEED", for the device). In the second difference the squares of ``V(s')`` cancel: it is linear in
what is sampled, which is why it is unbiased.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from holdfast.bellman.mdp import check_discount
from holdfast.bellman.transitions import Transitions
from holdfast.joint.objective import LossTerms

Array = NDArray[np.floating[Any]]


def bellman_saddle(
    q: Tensor | Array, zeta: Tensor | Array, transitions: Transitions, *, discount: float
) -> LossTerms:
    """The saddle objective of tables: to descend in ``q`` and ascend in ``zeta``.

    Parameters
    ----------
    q, zeta : Tensor or array
        ``(states, actions)``, floating point. ``zeta`` stands for ``E[V(s') | s, a]``. Under an
        optimiser that descends in everything, pass ``ascend(zeta)``.
    transitions : Transitions
        With every reward observed.
    discount : float
        In [0, 1).

    Returns
    -------
    LossTerms
        As of :func:`saddle_of_values`, summed over transitions.

    Raises
    ------
    ValueError
        For shapes that do not fit, a row outside the table, an unobserved reward, or a bad
        discount.
    """
    seen = _look_up(q, zeta, transitions)
    return saddle_of_values(
        seen["q"], seen["zeta"], seen["next_value"], seen["reward"], discount=discount
    )


def saddle_of_values(
    q: Tensor, zeta: Tensor, next_value: Tensor, reward: Tensor, *, discount: float
) -> LossTerms:
    """The saddle objective of values that were evaluated at the transitions.

    Parameters
    ----------
    q, zeta : Tensor
        ``(...)``: ``Q(s, a)`` and ``zeta(s, a)``.
    next_value : Tensor
        ``(...)``: ``V(s')``, 0 where the episode ended; see :func:`soft_value`.
    reward : Tensor
        ``(...)``, finite.
    discount : float
        In [0, 1).

    Returns
    -------
    LossTerms
        Summed over all elements, at least in float32. Metrics, as sums: ``bellman/td_squared``
        (``delta^2``, biased), ``bellman/dual_error`` (``(V(s') - zeta)^2``).

    Raises
    ------
    ValueError
        For shapes that differ, a reward that is not finite, or a bad discount.
    """
    q, zeta, next_value, reward = _alike(q=q, zeta=zeta, next_value=next_value, reward=reward)
    _check_observed(reward)
    values = saddle_elements(q, zeta, next_value, reward, check_discount(discount))
    metrics = {
        "bellman/td_squared": (reward + discount * next_value - q).detach().square().sum(),
        "bellman/dual_error": (next_value - zeta).detach().square().sum(),
    }
    return LossTerms(values.sum(), _count(values), metrics)


def saddle_elements(
    q: Tensor, zeta: Tensor, next_value: Tensor, reward: Tensor, discount: float
) -> Tensor:
    """``delta^2 - discount^2 (V(s') - zeta)^2`` of each element, unchecked."""
    delta = reward + discount * next_value - q
    return delta.square() - discount**2 * (next_value - zeta).square()


def td_error(q: Tensor | Array, transitions: Transitions, *, discount: float) -> LossTerms:
    """The mean squared TD error of a table: the biased alternative.

    Its minimiser gives up Bellman consistency for values that vary less where next states do.
    Parameters and errors as of :func:`bellman_saddle`.
    """
    q = torch.as_tensor(q)
    seen = _look_up(q, torch.zeros_like(q), transitions)
    return td_error_of_values(seen["q"], seen["next_value"], seen["reward"], discount=discount)


def td_error_of_values(
    q: Tensor, next_value: Tensor, reward: Tensor, *, discount: float
) -> LossTerms:
    """The squared TD error ``delta^2`` of evaluated values, as of :func:`saddle_of_values`."""
    q, next_value, reward = _alike(q=q, next_value=next_value, reward=reward)
    _check_observed(reward)
    squared = (reward + check_discount(discount) * next_value - q).square()
    return LossTerms(squared.sum(), _count(q), {"bellman/td_squared": squared.detach().sum()})


def gladius(
    q: Tensor | Array,
    zeta: Tensor | Array,
    transitions: Transitions,
    *,
    discount: float,
    anchor_action: ArrayLike,
    weight: float = 1.0,
) -> LossTerms:
    """Offline inverse RL from tables: choices, and the Bellman residual of an anchor action.

    See :func:`gladius_of_values`.

    Parameters
    ----------
    q, zeta : Tensor or array
        ``(states, actions)``.
    transitions : Transitions
        Rewards are read where the anchor was taken, and nowhere else.
    discount : float
        In [0, 1).
    anchor_action : int or array
        The action whose reward is known; one for all states, or ``(states,)``.
    weight : float
        Of the Bellman term against the likelihood, positive.

    Raises
    ------
    ValueError
        As of :func:`bellman_saddle`, and for an anchor that is no action.
    """
    q = torch.as_tensor(q)
    seen = _look_up(q, zeta, transitions)
    anchors = torch.as_tensor(anchor_action, device=q.device)
    if anchors.is_floating_point() or bool(((anchors < 0) | (anchors >= q.shape[1])).any()):
        raise ValueError(
            f"anchor_action is {anchors.tolist()}: it must be an integer in 0 ... {q.shape[1] - 1}"
        )
    state = torch.as_tensor(transitions.state, device=q.device)
    if anchors.ndim:
        if anchors.shape != q.shape[:1]:
            raise ValueError(
                f"anchor_action has shape {tuple(anchors.shape)}: it must be a number or "
                f"({len(q)},)"
            )
        anchors = anchors[state]
    action = torch.as_tensor(transitions.action, device=q.device)
    return gladius_of_values(
        q[state],
        action,
        seen["zeta"],
        seen["next_value"],
        seen["reward"],
        action == anchors,
        discount=discount,
        weight=weight,
    )


def gladius_of_values(
    q_row: Tensor,
    action: Tensor,
    zeta: Tensor,
    next_value: Tensor,
    reward: Tensor,
    anchor: Tensor,
    *,
    discount: float,
    weight: float = 1.0,
) -> LossTerms:
    """Likelihood of the choices, Bellman residual of the anchor rows, and the fit of the dual.

    ``-log pi(a | s) + weight [a is anchor] (delta^2 - discount^2 (V(s') - zeta)^2) + (V(s') -
    zeta)^2``, where ``zeta`` is a constant to the second term and ``V`` to the third: all is to be
    *descended* (Kang et al., "Empirical risk minimization approach for offline inverse RL and
    dynamic discrete choice", equation 15 and algorithm 1). The dual is fitted on all rows, the
    reward is read off as ``Q - discount * zeta``.

    Parameters
    ----------
    q_row : Tensor
        ``(..., actions)``: ``Q(s, .)``.
    action : Tensor
        ``(...)``, integers.
    zeta, next_value : Tensor
        ``(...)``, as of :func:`saddle_of_values`.
    reward : Tensor
        ``(...)``. Read at anchors only; anything elsewhere.
    anchor : Tensor
        ``(...)``, bool: the reward is known.
    discount : float
        In [0, 1).
    weight : float
        Positive.

    Returns
    -------
    LossTerms
        Summed over all rows. Metrics: ``nll``, ``bellman/dual_error``, ``accuracy`` as sums over
        rows; ``bellman/anchor`` with its own count, the anchors.

    Raises
    ------
    ValueError
        For shapes that do not fit, no reward at an anchor, or a number out of range.
    """
    _check_weight(weight)
    choices = choice_likelihood(q_row, action)
    chosen = q_row.gather(-1, action[..., None])[..., 0]
    fixed = zeta.detach()
    bellman = anchor_bellman(chosen, fixed, next_value, reward, anchor, discount=discount)
    dual = dual_fit(zeta, next_value)
    total = choices.total + weight * bellman.total + dual.total
    return LossTerms(total, choices.count, {**choices.metrics, **bellman.metrics, **dual.metrics})


def choice_likelihood(q_row: Tensor, action: Tensor) -> LossTerms:
    """Negative log-likelihood of choices under ``softmax Q``, in nats, summed over rows.

    ``q_row`` is ``(..., actions)`` and ``action`` ``(...)``. Metrics ``nll`` and ``accuracy``.
    """
    if q_row.ndim < 1 or q_row.shape[:-1] != action.shape:
        raise ValueError(
            f"q_row has shape {tuple(q_row.shape)} and action {tuple(action.shape)}: they must be "
            "(..., actions) and (...)"
        )
    q_row = _at_least_float32(q_row)
    losses = soft_value(q_row) - q_row.gather(-1, action[..., None])[..., 0]
    correct = (q_row.detach().argmax(-1) == action).to(losses.dtype)
    metrics = {"nll": losses.detach().sum(), "accuracy": correct.sum()}
    return LossTerms(losses.sum(), _count(losses), metrics)


def anchor_bellman(
    q: Tensor, zeta: Tensor, next_value: Tensor, reward: Tensor, anchor: Tensor, *, discount: float
) -> LossTerms:
    """The saddle objective of the anchor rows only, over the count of *all* rows.

    Parameters as of :func:`gladius_of_values`, with ``q`` at the action taken. Metric
    ``bellman/anchor``, with its own count.
    """
    if anchor.shape != q.shape or anchor.dtype != torch.bool:
        raise ValueError(
            f"anchor is {anchor.dtype} {tuple(anchor.shape)}: it must be bool {tuple(q.shape)}"
        )
    # Selected before any arithmetic: what is not observed may be NaN, and 0 * NaN is NaN.
    reward = reward.masked_fill(~anchor, 0.0)
    q, zeta, next_value, reward = _alike(q=q, zeta=zeta, next_value=next_value, reward=reward)
    _check_observed(reward)
    values = saddle_elements(q, zeta, next_value, reward, check_discount(discount))
    values = values.masked_fill(~anchor, 0.0)
    own = torch.stack([values.detach().sum(), anchor.sum().to(values.dtype)])
    return LossTerms(values.sum(), _count(q), {"bellman/anchor": own})


def dual_fit(zeta: Tensor, next_value: Tensor) -> LossTerms:
    """``(V(s') - zeta)^2`` with ``V`` held constant: its minimum is the conditional mean."""
    zeta, next_value = _alike(zeta=zeta, next_value=next_value)
    squared = (next_value.detach() - zeta).square()
    return LossTerms(squared.sum(), _count(zeta), {"bellman/dual_error": squared.detach().sum()})


def recovered_reward(q: Tensor, zeta: Tensor, *, discount: float) -> Tensor:
    """``Q - discount * zeta``: the reward that makes ``Q`` consistent, of any one shape."""
    return q - check_discount(discount) * zeta


def soft_value(q_row: Tensor, terminal: Tensor | None = None) -> Tensor:
    """``log sum_a exp q`` over the last dimension, and 0 where ``terminal``."""
    value = torch.logsumexp(q_row, -1)
    return value if terminal is None else value.masked_fill(terminal, 0.0)


def ascend(values: Tensor, ratio: float = 1.0) -> Tensor:
    """The same values with their gradient turned round and multiplied by ``ratio``.

    An optimiser that descends in all parameters then ascends in those behind ``values``, with
    ``ratio`` times its step: the dual's time scale under plain SGD.
    """
    _check_weight(ratio)
    return _Reversed.apply(values, ratio)


class _Reversed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, ratio: float) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.ratio = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return -ctx.ratio * gradients[0], None


def _look_up(
    q: Tensor | Array, zeta: Tensor | Array, transitions: Transitions
) -> dict[str, Tensor]:
    q, zeta = torch.as_tensor(q), torch.as_tensor(zeta)
    for name, table in (("q", q), ("zeta", zeta)):
        if table.ndim != 2 or table.shape != q.shape or not table.is_floating_point():
            raise ValueError(
                f"{name} is {table.dtype} {tuple(table.shape)}: q and zeta must be floating-point "
                f"(states, actions), and q is {tuple(q.shape)}"
            )
    transitions.check_tabular(*q.shape)
    columns = {
        name: torch.as_tensor(getattr(transitions, name), device=q.device)
        for name in ("state", "action", "next_state", "terminal", "reward")
    }
    return {
        "q": q[columns["state"], columns["action"]],
        "zeta": zeta[columns["state"], columns["action"]],
        "next_value": soft_value(q[columns["next_state"]], columns["terminal"]),
        "reward": columns["reward"].to(q.dtype),
    }


def _alike(**values: Tensor) -> tuple[Tensor, ...]:
    first = next(iter(values))
    for name, tensor in values.items():
        if tensor.shape != values[first].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and {first} "
                f"{tuple(values[first].shape)}: they must be alike"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}: it must be floating point")
    return tuple(_at_least_float32(tensor) for tensor in values.values())


def _check_observed(reward: Tensor) -> None:
    if not torch.isfinite(reward).all():
        row = int((~torch.isfinite(reward.flatten())).nonzero()[0])
        raise ValueError(f"reward is {reward.flatten()[row].item()} in row {row}: it must be known")


def _check_weight(weight: float) -> None:
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"the weight or ratio is {weight}: it must be positive and finite")


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _count(values: Tensor) -> Tensor:
    return torch.full((), values.numel(), device=values.device)
