"""Guards: they look at a gradient, a proposed update or what a turn showed, and may intervene.

A guard is a small transformation ``(init, update)`` without a state of its own: ``init()`` gives
the state at the start, ``update(seen, state)`` what to do and the next state, and
:class:`~holdfast.joint.guards.chain.Guards` keeps the states, in checkpoints too. No guard acts in
silence: what each did is recorded. A guard whose condition is off changes no bit of the parameters.
"""

from holdfast.joint.guards.base import Guard, Seen, Trip, Verdict
from holdfast.joint.guards.chain import Guards
from holdfast.joint.guards.log_ratio import LogRatioBudget, binary_radius
from holdfast.joint.guards.norms import GradientClip, UpdateNormCap
from holdfast.joint.guards.tripwires import Tripwires

__all__ = [
    "GradientClip",
    "Guard",
    "Guards",
    "LogRatioBudget",
    "Seen",
    "Trip",
    "Tripwires",
    "UpdateNormCap",
    "Verdict",
    "binary_radius",
]
