"""From how an agent chooses to what it earns, exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from holdfast.bellman.mdp import TabularMDP, probabilities
from holdfast.bellman.solve import discounted

Array = NDArray[np.float64]


def inverse_reward(
    policy: ArrayLike,
    transitions: Any,
    anchor_action: ArrayLike,
    anchor_reward: ArrayLike,
    discount: float,
    *,
    terminal: ArrayLike | None = None,
) -> Array:
    """The only reward under which ``policy`` is soft-optimal, given that of an anchor action.

    See :func:`inverse_values`, whose values it reads the reward from: ``r = q - discount * P v``.

    Returns
    -------
    Array
        ``(states, actions)``; 0 in terminal states.
    """
    q, v = inverse_values(
        policy, transitions, anchor_action, anchor_reward, discount, terminal=terminal
    )
    model = TabularMDP(transitions, np.zeros_like(q), discount, terminal=terminal)
    return np.where(model.terminal[:, None], 0.0, q - discount * model.expected(v))


def inverse_values(
    policy: ArrayLike,
    transitions: Any,
    anchor_action: ArrayLike,
    anchor_reward: ArrayLike,
    discount: float,
    *,
    terminal: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """The soft values behind ``policy``, by one linear solve.

    As ``v = q - log pi`` for every action, the Bellman equation of the anchor ``a0`` is linear:
    ``v = r(., a0) - log pi(a0 | .) + discount * P_a0 v`` (Magnac and Thesmar, "Identifying dynamic
    discrete decision processes", proposition 2).

    Parameters
    ----------
    policy : array
        ``(states, actions)``: probabilities of actions, all positive outside terminal states.
    transitions : array or sparse matrix
        As of :class:`~holdfast.bellman.TabularMDP`.
    anchor_action : int or array
        The action whose reward is known; one for all states, or ``(states,)``.
    anchor_reward : float or array
        Its reward; one for all states, or ``(states,)``.
    discount : float
        In [0, 1).
    terminal : array, optional
        ``(states,)``, bool.

    Returns
    -------
    q, v : Array
        ``(states, actions)`` and ``(states,)``. In terminal states 0.

    Raises
    ------
    ValueError
        For shapes that do not fit, an unknown anchor, rows that are no probabilities, or an action
        that is never chosen: its reward has no lower bound.
    """
    choices = np.array(policy, dtype=np.float64)
    if choices.ndim != 2:
        raise ValueError(f"policy has shape {choices.shape}: it must be (states, actions)")
    model = TabularMDP(transitions, np.zeros_like(choices), discount, terminal=terminal)
    live = ~model.terminal
    choices[~live] = 1.0 / model.actions  # never read
    choices = probabilities("policy", choices)
    never = np.argwhere((choices <= 0) & live[:, None])
    if len(never):
        s, a = never[0]
        raise ValueError(
            f"policy is {choices[s, a]} in state {s}, action {a}: it must be positive, as an "
            "action that is never chosen bounds its reward from above only"
        )
    anchor = _anchor(anchor_action, model.states, model.actions)
    known = np.asarray(anchor_reward, dtype=np.float64)
    if known.shape not in ((), (model.states,)) or not np.isfinite(known).all():
        raise ValueError(
            f"anchor_reward must be finite, and a number or ({model.states},); its shape is "
            f"{known.shape}"
        )
    logs = np.log(np.where(live[:, None], choices, 1.0))
    states = np.arange(model.states)
    moves = model.kernel[states * model.actions + anchor]
    earned = np.where(live, known - logs[states, anchor], 0.0)
    if sparse.issparse(moves):
        mask = sparse.diags_array(live.astype(np.float64))
        moves = mask @ moves @ mask
    else:
        moves = np.outer(live, live) * moves
    v = discounted(moves, discount, earned)
    # Once more for what is left: the sparse solution is iterative.
    v = v + discounted(moves, discount, earned - v + discount * (moves @ v))
    return np.where(live[:, None], v[:, None] + logs, 0.0), v


def _anchor(action: ArrayLike, states: int, actions: int) -> NDArray[np.int64]:
    anchor = np.asarray(action)
    if not np.issubdtype(anchor.dtype, np.integer) or anchor.shape not in ((), (states,)):
        raise ValueError(f"anchor_action must be an integer, or integers ({states},)")
    if ((anchor < 0) | (anchor >= actions)).any():
        raise ValueError(f"anchor_action is {anchor.tolist()}: it must lie in 0 ... {actions - 1}")
    return np.broadcast_to(anchor, (states,)).astype(np.int64)
