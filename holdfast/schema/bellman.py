"""Logged decisions: a soft Q-function, and the objectives that fit it to transitions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from holdfast.schema.base import Spec
from holdfast.schema.objectives import TrainedSpec


class SoftQSpec(Spec):
    """A soft Q-function and its dual, as tables or as two networks."""

    kind: Literal["soft_q"] = "soft_q"
    actions: int = Field(ge=1, description="how many there are; numbered from 0")
    states: int | None = Field(None, ge=1, description="how many, for tables; null: observations")
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (64, 64), description="hidden layers of the networks; unused with states"
    )
    step_ratio: float = Field(
        4.0, gt=0, description="zeta's learning rate over q's; training.learning_rates overrides"
    )

    def learning_rates(self, rate: float, given: Mapping[str, float]) -> dict[str, float]:
        """Rates of ``q`` and ``zeta``: the dual's time scale is part of the problem, not a detail.

        One common rate leaves the saddle where the discount is near 1.
        """
        return {"zeta": self.step_ratio * given.get("q", rate), **given}


class TransitionSpec(Spec):
    """A file of logged transitions, and which rows are kept from training."""

    path: str = Field(description=".csv, .parquet, .npz, or a Minari folder")
    held_out: int = Field(0, ge=0, description="rows for evaluation, never trained on")
    probe: int = Field(0, ge=0, description="rows on which a schedule's gap is evaluated")
    columns: dict[str, str] = Field({}, description="Holdfast's column names to the file's own")


class DecisionSpec(TrainedSpec):
    """What objectives on logged transitions have."""

    kind: str
    data: TransitionSpec
    batch_size: int = Field(256, ge=1, description="rows an optimiser step takes")

    @property
    def has_held_out(self) -> bool:
        return self.data.held_out > 0

    @property
    def has_probe(self) -> bool:
        return self.data.probe > 0


class BellmanSpec(DecisionSpec):
    """Bellman consistency, where every reward was observed."""

    kind: Literal["bellman_saddle", "td_error"] = "bellman_saddle"
    discount: float = Field(ge=0, lt=1)


class ChoiceSpec(DecisionSpec):
    """Likelihood of the choices that were made."""

    kind: Literal["choice_likelihood"] = "choice_likelihood"


class AnchorSpec(DecisionSpec):
    """Bellman consistency of the one action whose reward is known."""

    kind: Literal["anchor_bellman"] = "anchor_bellman"
    discount: float = Field(ge=0, lt=1)
    anchor_action: int = Field(ge=0)
    anchor_reward: float | None = Field(None, description="null: the file's")
