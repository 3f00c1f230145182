"""Objectives on data that is there: demonstrations and preferences."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from holdfast.errors import nearest
from holdfast.schema.base import Spec


class DataSpec(Spec):
    """Rows of one objective, and which of them are kept from training."""

    path: str = Field(description=".jsonl, .jsonl.gz, .parquet, .csv, or a hub id")
    split: str = Field("train", description="of a hub data set")
    held_out: int = Field(128, ge=0, description="rows for evaluation, never trained on")
    held_out_path: str | None = Field(None, description="a file of its own for these rows")
    probe: int = Field(32, ge=0, description="rows on which a schedule's gap is evaluated")
    held_out_split: str = Field("train", description="of a hub data set in held_out_path")
    max_rows: int | None = Field(None, ge=1, description="use only this many rows of the file")
    max_length: int = Field(1024, ge=2, description="tokens a row may have")
    bad_rows: Literal["error", "drop"] = Field(
        "error", description="what to do with empty, identical or overlong rows"
    )


class TrainedSpec(Spec):
    """What every objective has, whatever it learns from."""

    held_out_entry: ClassVar[str] = "data.held_out"
    probe_entry: ClassVar[str] = "data.probe"
    added: ClassVar[frozenset[str]] = frozenset()
    """Entries that came later: at their defaults they are no part of a recipe's fingerprint."""

    batch_size: int = Field(8, ge=1, description="rows an optimiser step takes, over all processes")
    micro_batch_size: int | None = Field(None, ge=1, description="rows a forward pass takes")
    optimum: float | Literal["auto"] | None = Field(
        None, description="f*: a number, or auto to find it by training on this objective alone"
    )

    @field_validator("optimum", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        if value is None or value == "auto":
            return value
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"expected a finite number, or auto, but found {value!r}"
                f"{nearest(str(value), ['auto'])}"
            )
        return number

    @property
    def has_held_out(self) -> bool:
        """Whether there is something to evaluate it on."""
        raise NotImplementedError

    @property
    def has_probe(self) -> bool:
        """Whether there is something to evaluate a schedule's gap on."""
        raise NotImplementedError


class ObjectiveSpec(TrainedSpec):
    """An objective on rows of text."""

    data: DataSpec

    @property
    def has_held_out(self) -> bool:
        return bool(self.data.held_out or self.data.held_out_path)

    @property
    def has_probe(self) -> bool:
        return self.data.probe > 0


class NllSpec(ObjectiveSpec):
    """Supervised fine-tuning: negative log-likelihood of completion tokens."""

    kind: Literal["nll"] = "nll"
    aggregation: Literal["token-mean", "sequence-mean", "sequence-sum"] = "token-mean"
    loss_type: Literal["nll", "dft", "chord"] = Field(
        "nll", description="weight of a token: 1; its probability p (DFT); p (1 - p) (CHORD)"
    )

    added: ClassVar[frozenset[str]] = frozenset({"loss_type"})


class DpoSpec(ObjectiveSpec):
    """Direct preference optimisation."""

    kind: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0)
    loss_type: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    reference: str | None = Field(
        None, description="a model directory or hub id; null: the policy before its first update"
    )

    @model_validator(mode="after")
    def _smoothing(self) -> DpoSpec:
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing has no meaning with loss_type {self.loss_type}")
        return self
