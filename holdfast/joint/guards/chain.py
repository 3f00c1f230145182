"""The guards of a run, in order, and what they remember."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

from holdfast.joint.guards.base import Guard, Proposed, Seen, Stage, State, Trip
from holdfast.joint.guards.tripwires import Tripwires


class Scalable(Proposed, Protocol):
    """What :meth:`Guards.scale` works on."""

    def scale(self, factor: float) -> None: ...


class Guards:
    """Applies guards in order, each to what those before it left.

    Parameters
    ----------
    guards : sequence of Guard
        At most one of a kind; those on the gradient before those on the update. Tripwires look at
        a turn that is over, wherever they stand.

    Raises
    ------
    ValueError
        If two are of the same kind, or one on the gradient follows one on the update.
    """

    def __init__(self, guards: Sequence[Guard] = ()) -> None:
        names = [guard.name for guard in guards]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"guards: {twice} is named twice; one of a kind is enough")
        for before, after in pairwise(guard for guard in guards if guard.stage != "turn"):
            if (before.stage, after.stage) == ("update", "gradient"):
                raise ValueError(
                    f"guards: {after.name} acts on the gradient, before the optimiser, and cannot "
                    f"follow {before.name}, which acts on its update: put it first"
                )
        self._guards = list(guards)
        self._states: dict[str, State] = {guard.name: guard.init() for guard in guards}

    def of(self, stage: Stage) -> list[Guard]:
        """Those of a stage, in order."""
        return [guard for guard in self._guards if guard.stage == stage]

    def scale(self, stage: Stage, proposed: Scalable) -> tuple[dict[str, Any], str | None]:
        """Let the guards of a stage scale a gradient or an update.

        Returns
        -------
        dict of str to Any
            By guard: its ``factor``, and what it recorded beside.
        str or None
            Why the step must not be taken, if one of them says so.
        """
        records: dict[str, Any] = {}
        for guard in self.of(stage):
            verdict, self._states[guard.name] = guard.update(proposed, self._states[guard.name])
            records[guard.name] = {"factor": verdict.factor, **verdict.record}
            if verdict.refused is not None:
                return records, f"{guard.name}: {verdict.refused}"
            proposed.scale(verdict.factor)
        return records, None

    def watch(self, seen: Seen) -> Trip | None:
        """Let the tripwires look at a turn that is over."""
        wires = self.tripwires
        if wires is None:
            return None
        trip, self._states[wires.name] = wires.update(seen, self._states[wires.name])
        return trip

    @property
    def tripwires(self) -> Tripwires | None:
        return next((guard for guard in self._guards if isinstance(guard, Tripwires)), None)

    @property
    def quiet(self) -> bool:
        """Whether no tripwire has anything against the present state."""
        wires = self.tripwires
        return wires is None or wires.quiet(self._states[wires.name])

    def roll_back(self, state: Mapping[str, Any]) -> None:
        """As :meth:`load_state_dict`, but what must outlive a rollback does."""
        now = self._states
        self.load_state_dict(state)
        wires = self.tripwires
        if wires is not None:
            self._states[wires.name] = wires.rolled_back(self._states[wires.name], now[wires.name])

    def state_dict(self) -> dict[str, Any]:
        return {name: dict(state) for name, state in self._states.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._states = {g.name: dict(state.get(g.name, g.init())) for g in self._guards}
