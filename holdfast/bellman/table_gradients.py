"""The saddle objective's derivatives where Q and zeta are tables, written out.

With ``lag = V(s') - zeta`` and ``delta = r + discount V(s') - Q`` a row adds ``-2 delta`` to the
derivative in its ``Q(s, a)``, ``2 discount (delta - discount lag)`` to that in ``V(s')``, which the
soft policy of ``s'`` spreads over ``Q(s', .)``, and ``2 discount^2 lag`` to that in its ``zeta(s,
a)``. Recording a graph for so little arithmetic would take ten times as long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.bellman.networks import Tables

if TYPE_CHECKING:
    from holdfast.bellman.problem import Batch


def table_directions(
    primal: Tensor,
    dual: Tensor,
    batch: Batch,
    tables: Tables,
    discount: float,
    anchored: Tensor | None,
    weight: float,
) -> tuple[Tensor, Tensor]:
    """What a step of size one takes off the tables, ``(replicas, pairs)`` each.

    ``anchored``, ``(replicas, rows)``, marks the rows of an anchor; ``None``: offline RL. The other
    parameters are those of :class:`~holdfast.bellman.SaddleProblem`.
    """
    q = primal.view(-1, tables.states, tables.actions)
    values = torch.logsumexp(q, -1)
    policy = torch.exp(q - values[..., None])
    pair = batch.state * tables.actions + batch.action
    ahead = values.gather(1, batch.next_state).masked_fill(batch.terminal, 0.0)
    delta = batch.reward + discount * ahead - primal.gather(1, pair)
    lag = ahead - dual.gather(1, pair)
    share = batch.weight
    if share is None:
        share = torch.full_like(lag, 1.0 / pair.shape[1])
    own = -2.0 * share * delta
    onward = (2.0 * discount) * share * (delta - discount * lag)
    if anchored is None:
        zeta = (-2.0 * discount**2) * share * lag
    else:
        # The likelihood adds pi(. | s) - 1[a] in Q(s, .), and the dual is fitted on all rows.
        own = torch.where(anchored, weight * own, 0.0) - share
        onward = torch.where(anchored, weight * onward, 0.0)
        zeta = -2.0 * share * lag
    level = torch.zeros_like(values)
    level.scatter_add_(1, batch.next_state, onward.masked_fill(batch.terminal, 0.0))
    if anchored is not None:
        level.scatter_add_(1, batch.state, share.expand(pair.shape))
    first = (level[..., None] * policy).view_as(primal)
    first.scatter_add_(1, pair, own)
    return first, torch.zeros_like(dual).scatter_add_(1, pair, zeta)
