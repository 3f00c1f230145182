"""Values and rewards from logged decisions."""

from holdfast.bellman.bus import nfxp
from holdfast.bellman.mdp import TabularMDP
from holdfast.bellman.solve import Solution
from holdfast.bellman.transitions import Transitions

__all__ = ["Solution", "TabularMDP", "Transitions", "nfxp"]
