"""Maximum-entropy inverse reinforcement learning on a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from holdfast.bellman.estimators.choice_model import ChoiceModel, Solution
from holdfast.bellman.estimators.newton import Curve, maximise
from holdfast.bellman.transitions import Transitions

Array = NDArray[np.float64]


class Flow(NamedTuple):
    """Where demonstrations went, discounted and averaged over trajectories."""

    occupancy: Array
    """``(S, A)``: ``mean sum_t discount^t 1[s_t = s, a_t = a]``."""
    inflow: Array
    """``(S,)``: the first state, less the discounted state in which the trajectory was cut off."""


@dataclass(frozen=True)
class MatchedReward:
    """The reward under which the soft-optimal policy shows the demonstrated features."""

    parameters: Array
    """``(K,)``"""
    solution: Solution
    """The fixed point at the parameters: ``q``, ``values``, ``policy``."""
    feature_gap: Array
    """``(K,)``: demonstrated less expected features, discounted; 0 without a ridge."""
    iterations: int

    @property
    def rewards(self) -> Array:
        """``(S, A)``"""
        return self.solution.model.rewards(self.parameters)


def demonstrated_flow(transitions: Transitions, states: int, actions: int, discount: float) -> Flow:
    """What demonstrations say of the occupancy, without the bias of their finite length.

    Along a trajectory, discounted visits less discounted next visits leave its first state less
    ``discount^H`` times its last, whatever is between. A cut after ``H`` steps is therefore booked
    as an outflow there; a trajectory that ended has none.

    Parameters
    ----------
    transitions : Transitions
        Integer states, with the column ``trajectory``.
    states, actions : int
        Size of the table.
    discount : float
        In [0, 1).

    Raises
    ------
    ValueError
        If there is no column ``trajectory``, its rows do not stand together, or a row leaves the
        table.
    """
    transitions.check_tabular(states, actions)
    if transitions.trajectory is None or len(transitions) == 0:
        raise ValueError("transitions has no trajectories: discounting needs the time of a row")
    opens = np.flatnonzero(np.diff(transitions.trajectory, prepend=transitions.trajectory[0] - 1))
    again = np.delete(opens, np.unique(transitions.trajectory[opens], return_index=True)[1])
    if len(again):
        raise ValueError(
            f"trajectory {transitions.trajectory[again[0]]} goes on in row {again[0]} after others"
            ": sort the rows by trajectory and time"
        )
    lengths = np.diff(np.append(opens, len(transitions)))
    time = np.arange(len(transitions)) - np.repeat(opens, lengths)
    weight = discount**time / len(opens)
    last = opens + lengths - 1
    outflow = np.where(transitions.terminal[last], 0.0, discount * weight[last])
    inflow: Array = np.zeros(states)
    np.add.at(inflow, transitions.state[opens], weight[opens])
    np.subtract.at(inflow, transitions.next_state[last], outflow)
    occupancy: Array = np.zeros((states, actions))
    np.add.at(occupancy, (transitions.state, transitions.action), weight)
    return Flow(occupancy, inflow)


def maximum_entropy_irl(model: ChoiceModel, flow: Flow, *, ridge: float = 0.0) -> MatchedReward:
    """Match demonstrated features with the policy of maximum causal entropy.

    Maximises the dual ``sum occupancy * r_theta - sum inflow * W_theta - ridge / 2 |theta|²``
    (Ziebart, Bagnell & Dey, 2010, theorem 3 in its discounted form): its gradient is the difference
    of demonstrated and expected features. If the inflow is the occupancy's own under the model,
    ``sum_a occupancy - discount * transitions' occupancy``, the dual is the log-likelihood of the
    choices weighted by occupancy, so the estimate is the nested fixed point's.

    Parameters
    ----------
    model : ChoiceModel
        On ``S`` states with ``A`` actions and ``K`` features. For rewards that are free in every
        state, one feature a state, one-hot.
    flow : Flow
        From :func:`demonstrated_flow`.
    ridge : float
        At least 0. Features that the demonstrations do not determine, such as a constant, need a
        positive one.

    Raises
    ------
    ValueError
        For shapes that do not fit or a negative ridge.
    TrainingError
        If the demonstrations do not determine the parameters, or no finite ones match.
    """
    occupancy = np.asarray(flow.occupancy, dtype=np.float64)
    inflow = np.asarray(flow.inflow, dtype=np.float64)
    if occupancy.shape != model.offset.shape or inflow.shape != occupancy.shape[:1]:
        raise ValueError(
            f"flow has shapes {occupancy.shape} and {inflow.shape}, not {model.offset.shape} and "
            f"{model.offset.shape[:1]}"
        )
    if not ridge >= 0:
        raise ValueError(f"ridge is {ridge}: it must not be negative")

    def dual(theta: Array) -> Curve:
        solution = model.solve(theta)
        expected = np.linalg.solve(solution.resolvent.T, inflow)  # visits under the policy
        penalty = ridge * np.eye(model.parameters)
        spread = np.einsum("s,skl->kl", expected, solution.covariances)
        # Cut-off trajectories may leave a state with a negative number of expected visits.
        bound = np.einsum("s,skl->kl", expected.clip(min=0), solution.covariances)
        return Curve(
            value=float(
                (occupancy * model.rewards(theta)).sum()
                - inflow @ solution.values
                - ridge / 2 * theta @ theta
            ),
            gradient=_gap(solution, occupancy, inflow) - ridge * theta,
            hessian=-spread - penalty,
            information=bound + penalty,
        )

    found = maximise(dual, np.zeros(model.parameters))
    solution = model.solve(found.parameters)
    return MatchedReward(
        parameters=found.parameters,
        solution=solution,
        feature_gap=_gap(solution, occupancy, inflow),
        iterations=found.iterations,
    )


def _gap(solution: Solution, occupancy: Array, inflow: Array) -> Array:
    shown = np.einsum("sa,sak->k", occupancy, solution.model.features)
    return shown - inflow @ solution.value_slopes
