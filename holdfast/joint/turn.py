"""What a schedule returns, and what it may ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Probe = Callable[[str], float]
"""Evaluates an objective's mean loss without a graph."""


@dataclass(frozen=True)
class Turn:
    """One decision: ``{objective: weight}`` for one optimiser step.

    A turn without weights means that the schedule has nothing left to do and ends the run.
    """

    weights: dict[str, float]
