"""Schedules: which objectives are updated in a step, and with which weights.

A schedule sees names and losses, nothing else. ``next(probe)`` returns the turn of the coming
optimiser step; ``probe(name)`` evaluates an objective's mean loss without a graph and is called
only when the schedule needs a fresh value. ``observe(name, loss)`` reports the training loss of an
objective that was updated. A schedule that also wants gradients has :meth:`Watching.watch`; no
other pays for it. Everything a schedule remembers is in ``state_dict``, as JSON values and tensors.

Source: Fernando et al., "Mitigating Forgetting in LLM Supervised Fine-Tuning and Preference
Learning" (ALRIGHT: Algorithm 2; MAXRIGHT: Algorithms 3 and 4).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from holdfast.joint.geometry import Gradient
from holdfast.joint.interleave import AdaptiveInterleave, Interleave, WatchedInterleave
from holdfast.joint.mixing import Fade, NoiseAware
from holdfast.joint.progress import optimal_ratio
from holdfast.joint.turn import Probe, Turn

if TYPE_CHECKING:  # torch is slow to import and recipes are checked without it
    from torch import Tensor

__all__ = [
    "AdaptiveInterleave",
    "Alright",
    "Fade",
    "Interleave",
    "Maxright",
    "Mix",
    "NoiseAware",
    "Probe",
    "Schedule",
    "Sequential",
    "Stage",
    "Turn",
    "WatchedInterleave",
    "Watching",
    "check_weights",
    "optimal_ratio",
]


class Schedule(Protocol):
    """The interface shared by all schedules."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """Every objective that the schedule may choose."""
        ...

    @property
    def gaps(self) -> dict[str, float]:
        """The weighted optimality gaps behind the latest turn; empty where none are used."""
        ...

    def next(self, probe: Probe) -> Turn: ...

    def observe(self, name: str, loss: float) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class Watching(Protocol):
    """What a schedule has as well, if it chooses by the geometry of gradients."""

    @property
    def estimates(self) -> dict[str, float]:
        """What it knows, for the record."""
        ...

    def watch(self, gradients: Mapping[str, Gradient], parameters: Sequence[Tensor]) -> None:
        """Look at the mean gradients of a turn, at the parameters where they were taken.

        Called before they are combined and before the step. Their buffers are used again
        afterwards: what is kept must be copied. They may not be finite.
        """
        ...


def check_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights as a plain dict.

    Raises
    ------
    ValueError
        If there are none, one lies outside [0, 1], or they do not sum to 1 (within 1e-6).
    """
    if not weights:
        raise ValueError("weights is empty: name at least one objective")
    for name, weight in weights.items():
        if not (math.isfinite(weight) and 0.0 <= weight <= 1.0):
            raise ValueError(f"weights[{name!r}] is {weight}: every weight must lie in [0, 1]")
    total = math.fsum(weights.values())
    if abs(total - 1.0) > 1e-6:
        listed = ", ".join(f"{name}: {weight}" for name, weight in weights.items())
        raise ValueError(f"weights sum to {total:g}, not 1 ({listed})")
    return {name: float(weight) for name, weight in weights.items()}


class Mix:
    """Every objective in every step, as one weighted sum.

    Parameters
    ----------
    weights : mapping of str to float
        Each in [0, 1], summing to 1. An objective with weight 0 is left out of the turn.
    """

    gaps: dict[str, float] = {}

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = check_weights(weights)

    @property
    def objectives(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def next(self, probe: Probe) -> Turn:
        return Turn({name: weight for name, weight in self.weights.items() if weight > 0})

    def observe(self, name: str, loss: float) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Alright:
    """ALRIGHT: one objective per optimiser step, drawn from a categorical with the given weights.

    With two objectives this is the Bernoulli(λ) coin of Algorithm 2. The draw of step ``t`` depends
    on ``(seed, t)`` alone: it is the same on all ranks and after a resume. The update itself is not
    weighted: in expectation the step is already the weighted sum.

    Parameters
    ----------
    weights : mapping of str to float
        Probability of each objective, in [0, 1], summing to 1.
    seed : int
        Seed of the draws.
    """

    gaps: dict[str, float] = {}

    def __init__(self, weights: Mapping[str, float], seed: int = 0) -> None:
        self.weights = check_weights(weights)
        self.seed = seed
        self.step = 0

    @property
    def objectives(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def next(self, probe: Probe) -> Turn:
        # Sorted, so that the order in which the weights were written changes nothing.
        names = sorted(name for name, weight in self.weights.items() if weight > 0)
        draw = random.Random(f"alright/{self.seed}/{self.step}")
        (chosen,) = draw.choices(names, [self.weights[name] for name in names])
        self.step += 1
        return Turn({chosen: 1.0})

    def observe(self, name: str, loss: float) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = int(state["step"])


class Maxright:
    """MAXRIGHT: the objective with the largest weighted optimality gap is updated.

    The gap of objective ``i`` is ``w_i (f_i - f_i*)``. With ``evaluate_every=1`` (Algorithm 3)
    every ``f_i`` is evaluated at every step. With ``evaluate_every=k`` (the memory-efficient
    Algorithm 4) they are evaluated at steps 0, k, 2k, … and are stale in between, except that the
    value of an updated objective is refreshed with its own training loss. The update is not
    weighted: the weights only decide who is updated.

    Parameters
    ----------
    weights : mapping of str to float
        In [0, 1], summing to 1.
    optima : mapping of str to float
        ``f_i*`` of every weighted objective, in the units of its mean loss.
    evaluate_every : int
        Steps between evaluations, at least 1.
    smoothing : float
        Share of the previous value that an exponential average keeps, in [0, 1). 0: no average.

    Raises
    ------
    ValueError
        For weights or a range as above, or if an objective has no optimum.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        optima: Mapping[str, float],
        evaluate_every: int = 1,
        *,
        smoothing: float = 0.0,
    ) -> None:
        self.weights = check_weights(weights)
        missing = sorted(set(self.weights) - set(optima))
        if missing:
            raise ValueError(f"optima has no value for {', '.join(missing)}")
        for name in self.weights:
            if not isinstance(optima[name], int | float) or not math.isfinite(optima[name]):
                raise ValueError(f"optima[{name!r}] is {optima[name]!r}: a finite number is needed")
        if evaluate_every < 1:
            raise ValueError(f"evaluate_every is {evaluate_every}: it must be at least 1")
        if not 0.0 <= smoothing < 1.0:
            raise ValueError(f"smoothing is {smoothing}: it must lie in [0, 1)")
        self.optima = {name: float(optima[name]) for name in self.weights}
        self.evaluate_every = evaluate_every
        self.smoothing = smoothing
        self.step = 0
        self.losses: dict[str, float] = {}

    @property
    def objectives(self) -> tuple[str, ...]:
        return tuple(self.weights)

    @property
    def gaps(self) -> dict[str, float]:
        return {
            name: self.weights[name] * (loss - self.optima[name])
            for name, loss in self.losses.items()
        }

    def next(self, probe: Probe) -> Turn:
        if self.step % self.evaluate_every == 0:
            for name, weight in self.weights.items():
                if weight > 0:  # otherwise it is never chosen, not even when all others are done
                    self._refresh(name, probe(name))
        self.step += 1
        # Where no loss was finite yet, all gaps count as equal.
        gaps = self.gaps or {name: 0.0 for name, weight in self.weights.items() if weight > 0}
        # Largest gap first; equal gaps go to the name that sorts first.
        chosen = min(gaps, key=lambda name: (-gaps[name], name))
        return Turn({chosen: 1.0})

    def observe(self, name: str, loss: float) -> None:
        # Where every gap is evaluated at every step nothing is stale, and a training loss among the
        # probed ones would only bias the average.
        if self.evaluate_every > 1:
            self._refresh(name, loss)

    def _refresh(self, name: str, loss: float) -> None:
        if not math.isfinite(loss):
            return  # A refused step must not decide every step that follows.
        old = self.losses.get(name, loss)
        self.losses[name] = self.smoothing * old + (1.0 - self.smoothing) * loss

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "losses": dict(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = int(state["step"])
        self.losses = {name: float(loss) for name, loss in state["losses"].items()}


@dataclass(frozen=True)
class Stage:
    """One stage of a sequence.

    Attributes
    ----------
    weights : dict of str to float
        The objectives of the stage, as in :class:`Mix`. One objective alone: ``{name: 1.0}``.
    steps : int, optional
        The most optimiser steps that the stage takes. ``None``: no limit.
    loss_below : float, optional
        The stage ends once every objective's probed loss is at or below this value.
    check_every : int
        Steps between checks of ``loss_below``.
    """

    weights: dict[str, float]
    steps: int | None = None
    loss_below: float | None = None
    check_every: int = field(default=1)

    def __post_init__(self) -> None:
        check_weights(self.weights)
        if self.steps is None and self.loss_below is None:
            raise ValueError("a stage needs steps, loss_below, or both: otherwise it never ends")
        if self.steps is not None and self.steps < 0:
            raise ValueError(f"steps is {self.steps}: it must not be negative")
        if self.check_every < 1:
            raise ValueError(f"check_every is {self.check_every}: it must be at least 1")


class Sequential:
    """Stages one after another: SFT→DPO, DPO→SFT, SFT→RL, or any longer chain.

    Parameters
    ----------
    stages : iterable of Stage or (name, steps) pairs, or mapping of name to steps
        In order. After the last stage the schedule returns a turn without weights.
    """

    gaps: dict[str, float] = {}

    def __init__(self, stages: Mapping[str, int] | Iterable[Stage | tuple[str, int]]) -> None:
        listed = stages.items() if isinstance(stages, Mapping) else stages
        self.stages: Sequence[Stage] = [
            stage if isinstance(stage, Stage) else Stage({stage[0]: 1.0}, steps=stage[1])
            for stage in listed
        ]
        if not self.stages:
            raise ValueError("stages is empty: name at least one stage")
        self.stage = 0
        self.stage_step = 0

    @property
    def objectives(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for stage in self.stages for name in stage.weights))

    def next(self, probe: Probe) -> Turn:
        while self.stage < len(self.stages):
            stage = self.stages[self.stage]
            if not self._ended(stage, probe):
                self.stage_step += 1
                return Turn({name: weight for name, weight in stage.weights.items() if weight > 0})
            self.stage += 1
            self.stage_step = 0
        return Turn({})

    def _ended(self, stage: Stage, probe: Probe) -> bool:
        if stage.steps is not None and self.stage_step >= stage.steps:
            return True
        if stage.loss_below is None or self.stage_step % stage.check_every:
            return False
        return all(probe(name) <= stage.loss_below for name in stage.weights)

    def observe(self, name: str, loss: float) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage, "stage_step": self.stage_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stage = int(state["stage"])
        self.stage_step = int(state["stage_step"])
